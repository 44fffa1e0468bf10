import csv
import json

import pytest

from qlora_engine.training.data import as_chat, load_held_out, load_rows, split_rows
from qlora_engine.training.errors import DataError
from tests.training.tiny_llm import pairs, write_jsonl

PAIR = {"prompt": "a", "completion": " b"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
TEXT = {"text": "once upon a time"}


@pytest.mark.parametrize(
    ("row", "format"), [(PAIR, "prompt/completion"), (CHAT, "messages"), (TEXT, "text")], ids=["pair", "chat", "text"]
)
def test_jsonl_formats(tmp_path, row, format):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [row, row]))
    assert (rows.format, rows.rows) == (format, [row, row])
    assert rows.dataset()[1] == row


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "ho"), ("assistant", "no")))
FOLLOWS = {"role": "user", "content": "and?"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c", "text": "x"}, ("a", " b", " c")),
        ({"chosen": "Q: a\nA: be so", "rejected": "Q: a\nA: bad"}, ("Q: a\nA:", " be so", " bad")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, FOLLOWS, GOOD]}, ([USER], [GOOD], [BAD, FOLLOWS, GOOD])),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, ([USER], [GOOD], [GOOD])),
        # as UltraFeedback has it, and answers that repeat their prompt
        (
            {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER]},
            ([USER], [GOOD], [BAD]),
        ),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
    ],
    ids=["text", "implicit text", "messages", "implicit", "equal", "text beside", "text before", "repeated"],
)
def test_preferences(tmp_path, row, expected):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [row]), preferences=True)
    assert rows.format == ("preference" if isinstance(expected[0], str) else "preference messages")
    assert rows.rows == [dict(zip(("prompt", "chosen", "rejected"), expected, strict=True))]
    assert rows.dataset()[0] == rows.rows[0]


def test_preferences_as_chat(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi", "chosen": "ho ", "rejected": "no"}]), True)
    assert as_chat(rows).rows == [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}]
    assert as_chat(rows).format == "preference messages"
    with pytest.raises(DataError, match="holds `preference messages` rows"):
        as_chat(as_chat(rows))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR, "there is no `chosen` and no `rejected`: the columns are completion, prompt; expected `chosen`"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "there is no `rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "one of `chosen` and `rejected` is text"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "`rejected` is empty"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "`prompt` is a list; expected text"),
        ({"chosen": "one", "rejected": "other"}, "there is no `prompt`, and `chosen` and `rejected` do not begin"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "begin with no message in common"),
        ({"prompt": "a", "chosen": [], "rejected": [BAD]}, "`chosen` is empty; expected a list of messages"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "`rejected` does not go on with a message of the"),
        ({"prompt": [USER], "chosen": [{**GOOD, "content": ""}], "rejected": [BAD]}, "`chosen` is empty"),
        ({"prompt": [{"role": "bot"}], "chosen": [GOOD], "rejected": [BAD]}, "`prompt` message 1 has the role 'bot'"),
    ],
)
def test_bad_preferences(tmp_path, row, reason):
    path = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(DataError) as caught:
        load_rows(path, preferences=True)
    assert f"{path}, line 1: " in str(caught.value)
    assert reason in str(caught.value)


def test_other_columns_are_dropped_and_blank_lines_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**PAIR, "id": 7}) + "\n\n  \n" + json.dumps({**PAIR, "text": None}) + "\n")
    assert load_rows(path).rows == [PAIR, PAIR]


def test_byte_order_mark_is_not_part_of_the_data(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\na,b\n")
    assert load_rows(path).rows == [{"prompt": "a", "completion": "b"}]


def test_csv_keeps_line_breaks_and_counts_lines_as_an_editor_does(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), ("two\nlines", "x"), ("p", "")])
    with pytest.raises(DataError, match=r"a\.csv, line 4: `completion` is empty"):
        load_rows(path)


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    import datasets

    rows = pairs(10)
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "a.parquet").rows == rows
    assert load_rows(tmp_path / "saved").rows == rows
    assert load_held_out(tmp_path / "saved") is None


def test_saved_splits(tmp_path):
    import datasets

    parts = {"train": datasets.Dataset.from_list(pairs(6)), "test": datasets.Dataset.from_list(pairs(3, seed=1))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved").rows == pairs(6)
    assert load_held_out(tmp_path / "saved").rows == pairs(3, seed=1)
    datasets.DatasetDict({"test": parts["test"]}).save_to_disk(str(tmp_path / "test only"))
    with pytest.raises(DataError, match="has the splits test; expected one named train"):
        load_rows(tmp_path / "test only")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([PAIR, "{not json"], "line 2: not valid JSON"),
        ([PAIR, [1]], "line 2: a list; expected a JSON object"),
        ([PAIR, TEXT], "line 2: a `text` row in a file that began with `prompt/completion`"),
        ([{**PAIR, **TEXT}], "line 1: columns of several formats"),
        ([PAIR, {"prompt": "a"}], "line 2: `prompt` without `completion`"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "are preferences; pass --objective dpo"),
        ([{"question": "a"}], "line 1: the columns are question; expected `prompt` and `completion`"),
        ([{**PAIR, "prompt": 3}], "line 1: `prompt` is a number; expected text"),
        ([{**PAIR, "completion": " "}], "line 1: `completion` is empty"),
        ([{"text": "  "}], "line 1: `text` is empty"),
        ([{"messages": []}], "line 1: `messages` is empty"),
        ([{"messages": "hi"}], "line 1: `messages` is a text"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], "message 1 has the role 'bot'; expected one of system"),
        ([{"messages": [{"role": "user"}]}], "message 1 has no text in `content`"),
        ([{"messages": CHAT["messages"][:1]}], "has no message of the assistant"),
        ([{"messages": ["hi"]}], "has a text as message 1"),
        ([], "holds no rows"),
    ],
)
def test_bad_rows_name_file_line_and_reason(tmp_path, lines, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "\xff"}\n', "not valid UTF-8"),
        ("a.csv", b"prompt,completion\na\n", "line 2: 1 cells under a header of 2 columns"),
        ("a.csv", b'prompt,completion\n"a"b,c\n', "line 2: not valid CSV"),
        ("a.csv", b"", "holds no rows"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.docx", b"", "ends in '.docx'; expected .jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / name)
    assert reason in str(caught.value)


def test_missing_file_and_foreign_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder, but not one written by"):
        load_rows(tmp_path)


def test_split_is_a_partition_that_only_the_seed_decides(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(100)]))
    train, held = split_rows(rows, 0.1, 64, seed=3)
    assert len(held) == 10
    assert sorted(r["text"] for r in train.rows + held.rows) == sorted(r["text"] for r in rows.rows)
    assert split_rows(rows, 0.1, 64, seed=3)[1].rows == held.rows
    assert split_rows(rows, 0.1, 64, seed=4)[1].rows != held.rows
    assert len(split_rows(rows, 0.5, 7, seed=3)[1]) == 7


def test_one_row_cannot_be_split(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    with pytest.raises(DataError, match="none can be held out"):
        split_rows(rows, 0.1, 10, seed=0)


def test_as_chat(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    assert as_chat(rows).rows == [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    ]
    with pytest.raises(DataError, match="--chat is for rows of a prompt and answers in text"):
        as_chat(load_rows(write_jsonl(tmp_path / "b.jsonl", [TEXT])))
