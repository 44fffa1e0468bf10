"""Reads and validates training data: every row, before a model is loaded.

Formats, told apart by their columns; one file holds one of them:

prompt, completion    text; the loss is on the completion
messages              a conversation: [{"role": "user", "content": "..."}, {"role": "assistant", ...}]
text                  text; the loss is on all of it
chosen, rejected      two answers of which the first is preferred, for `--objective dpo`, and their `prompt`: text, or
                      lists of messages; without `prompt` it is what both answers begin with
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_engine.training.errors import DataError

FORMATS = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
# of text and of messages; rows of both have `prompt`, `chosen` and `rejected` once they are read
PREFERENCE, PREFERENCE_MESSAGES = "preference", "preference messages"
PREFERENCES = (PREFERENCE, PREFERENCE_MESSAGES)
ANSWERS = ("chosen", "rejected")
CONVERSATIONS = ("messages", PREFERENCE_MESSAGES)  # rows that need the model's chat template
EXPECTED = "expected `prompt` and `completion`, or `messages`, or `text`"
EXPECTED_PREFERENCES = "expected `chosen` and `rejected`, and `prompt` unless they begin with it"
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rows:
    """Validated rows of one format.

    Attributes:
        format: a key of FORMATS, or one of PREFERENCES.
        rows: dicts that hold the format's columns and no others.
        source: the file or folder they came from.
    """

    format: str
    rows: list[dict]
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def dataset(self):
        """The rows as a `datasets.Dataset`."""
        import datasets

        return datasets.Dataset.from_list(self.rows)


def load_rows(path: str | Path, preferences: bool = False) -> Rows:
    """Reads a data file or a saved `datasets` folder, checking every row.

    Args:
        path: .jsonl (or .json with one object a line), .csv, .parquet, or a folder written by
            `Dataset.save_to_disk` (a `DatasetDict` must have a split `train`).
        preferences: whether the rows are preferences, whatever other columns they have; else of another format.

    Raises:
        DataError: naming the file, the line and the reason.
    """
    path = Path(path)
    return _validate(path, _read(path, "train"), preferences)


def load_held_out(path: str | Path, preferences: bool = False) -> Rows | None:
    """The split `validation` or `test` of a saved `DatasetDict`; None where there is no such split."""
    path = Path(path)
    for split in ("validation", "test"):
        if (path / split).is_dir():
            return _validate(path, _read(path, split), preferences)
    return None


def split_rows(rows: Rows, fraction: float, max_rows: int, seed: int) -> tuple[Rows, Rows]:
    """Holds out `fraction` of the rows, at least one and at most `max_rows`, chosen by `seed`.

    Returns:
        (training rows, held-out rows), both in file order.

    Raises:
        DataError: if fewer than two rows are there to split.
    """
    if len(rows) < 2:
        raise DataError(
            f"{rows.source} has {len(rows)} row, so none can be held out; add rows or pass --eval-fraction 0"
        )
    count = min(max(1, round(len(rows) * fraction)), max_rows, len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        Rows(rows.format, [row for i, row in enumerate(rows.rows) if i not in chosen], rows.source),
        Rows(rows.format, [row for i, row in enumerate(rows.rows) if i in chosen], rows.source),
    )


def as_chat(rows: Rows) -> Rows:
    """Rows of a prompt and answers as one user turn and one assistant turn, for the model's chat template."""
    if rows.format not in ("prompt/completion", PREFERENCE):
        raise DataError(
            f"{rows.source} holds `{rows.format}` rows; --chat is for rows of a prompt and answers in text"
        )
    chat = [
        {name: [_turn(name, text if name == "prompt" else text.strip())] for name, text in row.items()}
        for row in rows.rows
    ]
    return Rows(PREFERENCE_MESSAGES if rows.format == PREFERENCE else rows.format, chat, rows.source)


def _turn(column: str, text: str) -> dict:
    return {"role": "user" if column == "prompt" else "assistant", "content": text}


def _read(path: Path, split: str) -> Iterator[tuple[str, object]]:
    """(where, row) for every row; `where` is "line 3" in text files and "row 3" elsewhere."""
    if not path.exists():
        raise DataError(f"the data file {path} does not exist")
    if path.is_dir():
        return _read_saved(path, split)
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}; expected .jsonl, .csv, .parquet or a saved datasets folder"
        )
    return reader(path)


def _read_jsonl(path: Path):
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                        "expected one JSON object a line"
                    ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {number}: not valid UTF-8 ({error.reason})") from error


def _read_csv(path: Path):
    reader = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, None)
            if header is None:
                return
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under a header of {len(header)} columns"
                    )
                yield f"line {reader.line_num}", dict(zip(header, cells, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {reader.line_num if reader else 0}: not valid UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _read_parquet(path: Path):
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}, after row {number}: not a readable Parquet file ({error})") from error


def _read_saved(path: Path, split: str):
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is a folder, but not one written by Dataset.save_to_disk ({error})") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{path} has the splits {', '.join(saved)}; expected one named {split}")
        saved = saved[split]
    for number, row in enumerate(saved, 1):
        yield f"row {number}", row


def _validate(path: Path, located_rows, preferences: bool) -> Rows:
    kind, first, rows = None, None, []
    expected = EXPECTED_PREFERENCES if preferences else EXPECTED
    for where, row in located_rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {where}: a {_json_name(row)}; expected a JSON object, {expected}")
        try:
            row_kind = _preference_kind(row) if preferences else _kind(row)
            if kind is None:
                kind, first = row_kind, where
            elif row_kind != kind:
                raise ValueError(
                    f"a `{row_kind}` row in a file that began with `{kind}` ({first}); expected one format a file"
                )
            rows.append(_CLEAN[kind](row))
        except ValueError as error:
            raise DataError(f"{path}, {where}: {error}") from None
    if not rows:
        raise DataError(f"{path} holds no rows; {expected}")
    return Rows(kind, rows, str(path))


def _kind(row: dict) -> str:
    # a column that is null is a column that is not there: Parquet and Arrow fill in what a row lacks
    present = {key for key, value in row.items() if value is not None}
    kinds = [kind for kind, columns in FORMATS.items() if set(columns) <= present]
    if len(kinds) > 1:
        raise ValueError(f"columns of several formats ({' and '.join(kinds)}); expected one")
    if not kinds:
        if present.issuperset(ANSWERS):
            raise ValueError("`chosen` and `rejected` are preferences; pass --objective dpo to learn from them")
        half = {"prompt": "completion", "completion": "prompt"}
        for column, other in half.items():
            if column in row:
                raise ValueError(f"`{column}` without `{other}`; {EXPECTED}")
        raise ValueError(f"the columns are {_names(row)}; {EXPECTED}")
    return kinds[0]


def _preference_kind(row: dict) -> str:
    missing = [column for column in ANSWERS if row.get(column) is None]
    if missing:
        raise ValueError(
            f"there is no `{'` and no `'.join(missing)}`: the columns are {_names(row)}; {EXPECTED_PREFERENCES}"
        )
    kinds = {isinstance(row[column], str) for column in ANSWERS}
    if len(kinds) > 1:
        raise ValueError("one of `chosen` and `rejected` is text and the other is not; expected both of one kind")
    return PREFERENCE if kinds.pop() else PREFERENCE_MESSAGES


def common_length(one: Sequence, other: Sequence) -> int:
    """How many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _names(row: dict) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _clean_text(*columns: str):
    """What checks text columns and leaves out all others."""

    def clean(row: dict) -> dict:
        for column in columns:
            value = row[column]
            if not isinstance(value, str):
                raise ValueError(f"`{column}` is a {_json_name(value)}; expected text")
            # an empty prompt is a legitimate beginning; an empty answer or text teaches nothing
            if column != "prompt" and not value.strip():
                raise ValueError(f"`{column}` is empty")
        return {column: row[column] for column in columns}

    return clean


def _clean_messages(row: dict) -> dict:
    messages = _conversation("messages", row["messages"])
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("`messages` has no message of the assistant; there is nothing to learn")
    return {"messages": messages}


def _conversation(column: str, messages) -> list[dict]:
    """Checked messages, of their role and content alone."""
    problem = None
    if not isinstance(messages, list) or not messages:
        problem = f"is {'empty' if messages == [] else 'a ' + _json_name(messages)}; expected a list of messages"
    for number, message in enumerate(messages if problem is None else (), 1):
        if not isinstance(message, dict):
            problem = f"has a {_json_name(message)} as message {number}; expected an object with `role` and `content`"
        elif message.get("role") not in ROLES:
            expected = ", ".join(ROLES)
            problem = f"message {number} has the role {message.get('role')!r}; expected one of {expected}"
        elif not isinstance(message.get("content"), str):
            problem = f"message {number} has no text in `content`"
        if problem:
            break
    if problem:
        raise ValueError(f"`{column}` {problem}")
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def _clean_preference(row: dict) -> dict:
    """Text of a prompt and two answers; a missing prompt is the whole words that both answers begin with."""
    row = _clean_text(*ANSWERS, *(["prompt"] if row.get("prompt") is not None else []))(row)
    if "prompt" not in row:
        common = row["chosen"][: common_length(row["chosen"], row["rejected"])]
        end = max((i for i, letter in enumerate(common) if letter.isspace()), default=0)
        row = {"prompt": common[:end]} | {column: row[column][end:] for column in ANSWERS}
        if not row["prompt"].strip() or not all(row[column].strip() for column in ANSWERS):
            raise ValueError(
                "there is no `prompt`, and `chosen` and `rejected` do not begin with one and go on alone"
            )
    return {column: row[column] for column in ("prompt", *ANSWERS)}


def _clean_preference_messages(row: dict) -> dict:
    """Messages of a prompt and of two answers; answers that repeat the prompt begin behind it."""
    chosen, rejected = (_conversation(column, row[column]) for column in ANSWERS)
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = _conversation("prompt", prompt)
        shared = len(prompt) if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt else 0
    else:
        shared = common_length(chosen[:-1], rejected[:-1])  # of equal answers the last message is the answer
        if shared:
            prompt = chosen[:shared]  # a `prompt` in text beside such lists is the same once more
        elif isinstance(prompt, str):
            prompt = [_turn("prompt", prompt)]
        else:
            raise ValueError("there is no `prompt`, and `chosen` and `rejected` begin with no message in common")
    found = {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    for column in ANSWERS:
        if not found[column] or found[column][0]["role"] != "assistant":
            raise ValueError(f"`{column}` does not go on with a message of the assistant behind the prompt")
        if not found[column][-1]["content"].strip():
            raise ValueError(f"`{column}` is empty")
    return found


_CLEAN = {
    "prompt/completion": _clean_text("prompt", "completion"),
    "messages": _clean_messages,
    "text": _clean_text("text"),
    PREFERENCE: _clean_preference,
    PREFERENCE_MESSAGES: _clean_preference_messages,
}


def _json_name(value) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
