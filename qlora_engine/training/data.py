"""Reads and validates training data: every row, before a model is loaded.

Three formats, told apart by their columns; one file holds one of them:

prompt, completion    text; the loss is on the completion
messages              a conversation: [{"role": "user", "content": "..."}, {"role": "assistant", ...}]
text                  text; the loss is on all of it
"""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_engine.training.errors import DataError

FORMATS = {"prompt/completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
EXPECTED = "expected `prompt` and `completion`, or `messages`, or `text`"
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rows:
    """Validated rows of one format.

    Attributes:
        format: a key of FORMATS.
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


def load_rows(path: str | Path) -> Rows:
    """Reads a data file or a saved `datasets` folder, checking every row.

    Args:
        path: .jsonl (or .json with one object a line), .csv, .parquet, or a folder written by
            `Dataset.save_to_disk` (a `DatasetDict` must have a split `train`).

    Raises:
        DataError: naming the file, the line and the reason.
    """
    path = Path(path)
    return _validate(path, _read(path, "train"))


def load_held_out(path: str | Path) -> Rows | None:
    """The split `validation` or `test` of a saved `DatasetDict`; None where there is no such split."""
    path = Path(path)
    for split in ("validation", "test"):
        if (path / split).is_dir():
            return _validate(path, _read(path, split))
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
    """Prompt/completion rows as one user turn and one assistant turn, for the model's chat template."""
    if rows.format != "prompt/completion":
        raise DataError(f"{rows.source} holds `{rows.format}` rows; --chat is for prompt/completion rows")
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
        }
        for row in rows.rows
    ]
    return Rows(rows.format, chat, rows.source)


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


def _validate(path: Path, located_rows) -> Rows:
    kind, first, rows = None, None, []
    for where, row in located_rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {where}: a {_json_name(row)}; expected a JSON object, {EXPECTED}")
        row_kind = _format_of(path, where, row)
        if kind is None:
            kind, first = row_kind, where
        elif row_kind != kind:
            raise DataError(
                f"{path}, {where}: a `{row_kind}` row in a file that began with `{kind}` ({first}); "
                "expected one format a file"
            )
        for column in FORMATS[kind]:
            problem = _problem(column, row[column])
            if problem:
                raise DataError(f"{path}, {where}: `{column}` {problem}")
        rows.append(_clean(kind, row))
    if not rows:
        raise DataError(f"{path} holds no rows; {EXPECTED}")
    return Rows(kind, rows, str(path))


def _format_of(path: Path, where: str, row: dict) -> str:
    # a column that is null is a column that is not there: Parquet and Arrow fill in what a row lacks
    present = {key for key, value in row.items() if value is not None}
    kinds = [kind for kind, columns in FORMATS.items() if set(columns) <= present]
    if len(kinds) > 1:
        raise DataError(f"{path}, {where}: columns of several formats ({' and '.join(kinds)}); expected one")
    if not kinds:
        half = {"prompt": "completion", "completion": "prompt"}
        for column, other in half.items():
            if column in row:
                raise DataError(f"{path}, {where}: `{column}` without `{other}`; {EXPECTED}")
        names = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{path}, {where}: the columns are {names}; {EXPECTED}")
    return kinds[0]


def _problem(column: str, value) -> str | None:
    if column == "messages":
        return _conversation_problem(value)
    if not isinstance(value, str):
        return f"is a {_json_name(value)}; expected text"
    # an empty prompt is a legitimate beginning; an empty completion or text teaches nothing
    if column != "prompt" and not value.strip():
        return "is empty"
    return None


def _conversation_problem(messages) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f"is {'empty' if messages == [] else 'a ' + _json_name(messages)}; expected a list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"has a {_json_name(message)} as message {number}; expected an object with `role` and `content`"
        if message.get("role") not in ROLES:
            return f"message {number} has the role {message.get('role')!r}; expected one of {', '.join(ROLES)}"
        if not isinstance(message.get("content"), str):
            return f"message {number} has no text in `content`"
    if not any(message["role"] == "assistant" for message in messages):
        return "has no message of the assistant; there is nothing to learn"
    return None


def _clean(kind: str, row: dict) -> dict:
    if kind == "messages":
        keep = ("role", "content")
        return {"messages": [{key: message[key] for key in keep} for message in row["messages"]]}
    return {column: row[column] for column in FORMATS[kind]}


def _json_name(value) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
