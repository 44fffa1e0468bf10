"""Makes wordnet_definitions.jsonl from WordNet 3.0's data files: the demo's data, committed beside this script.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet     # Debian 1:3.0-37, 6.5 MB
    python demo/make_wordnet.py wordnet/usr/share/wordnet demo/wordnet_definitions.jsonl

One row a word: {"prompt": 'Define "X" (noun).', "completion": " its definition"}. The choice does not depend on
the machine or the Python version: the rows with the smallest SHA-256 of word and part of speech are taken.
WordNet is Princeton University's; its licence is in WORDNET_LICENSE.
"""

import argparse
import hashlib
import json
from pathlib import Path

PARTS = {"data.noun": "noun", "data.verb": "verb", "data.adj": "adjective"}


def definitions(folder: Path) -> dict[tuple[str, str], str]:
    """(word, part of speech) -> definition, the first sense in file order, without usage examples."""
    found = {}
    for filename, part in PARTS.items():
        for line in (folder / filename).read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence, which heads every file
                continue
            # offset, lexicographer file, type, word count, first word, ... | definition; "example"; "example"
            head, gloss = line.split(" | ", 1)
            word = head.split(" ")[4].split("(")[0].replace("_", " ")
            definition = gloss.split('; "')[0].strip().rstrip(";")
            if 20 <= len(definition) <= 200:
                found.setdefault((word, part), definition)
    return found


def main():
    parser = argparse.ArgumentParser(description="Select WordNet definitions for the demo.")
    parser.add_argument("folder", type=Path, help="folder with data.noun, data.verb and data.adj")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("--rows", type=int, default=3000)
    args = parser.parse_args()
    chosen = sorted(
        definitions(args.folder).items(), key=lambda item: hashlib.sha256("|".join(item[0]).encode()).digest()
    )[: args.rows]
    with args.output.open("w", encoding="utf-8") as out:
        for (word, part), definition in chosen:
            row = {"prompt": f'Define "{word}" ({part}).', "completion": f" {definition}"}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(chosen)} definitions -> {args.output}")


if __name__ == "__main__":
    main()
