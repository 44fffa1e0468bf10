"""`qlora search`: its space, its trials, what it leaves, and how it goes on."""

import json

import pytest

from qlora_engine.cli.main import main
from qlora_engine.training import FinetuneOptions
from qlora_engine.training.errors import OptionError
from qlora_engine.training.options import build_options
from qlora_engine.training.search_space import Choice, Range, grid, options_at, parse_space

pytest.importorskip("optuna")

from qlora_engine.training import search as searching
from qlora_engine.training.search import SearchOptions, search
from qlora_engine.training.search_report import table

BASE = FinetuneOptions(model="m", data="d")


@pytest.fixture
def options(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        settings = {
            "model": str(tiny_model),
            "data": str(tiny_data),
            "output": str(tmp_path / "found"),
            "device": "cpu",
            "max_steps": 4,
            "batch_size": 4,
            "eval_fraction": 0.1,
        }
        return FinetuneOptions(**{**settings, **changes})

    return make


def test_space():
    space = parse_space(["r=4, 8,8", "learning-rate=1e-4..1e-2", "rslora=true,false", "method=lora,dora"], BASE)
    assert space == {
        "r": Choice((4, 8)),
        "learning_rate": Range(1e-4, 1e-2),
        "rslora": Choice((True, False)),
        "method": Choice(("lora", "dora")),
    }


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (["r"], "'r' is not name=a,b,c or name=low..high"),
        (["rank=4"], "'rank' cannot be searched; expected one of method, r"),
        (["r=4", "r=8"], "r is there twice"),
        (["r=4,x"], "--r is 'x'; expected a whole number"),
        (["r=0"], "expected at least 1"),
        (["learning_rate=1e-2..1e-4"], "must rise"),
        (["rslora=true..false"], "rslora has no range"),
        (["method=lora,dorra"], "'dorra' is not a method"),
    ],
)
def test_a_wrong_space_is_explained(items, reason):
    with pytest.raises(OptionError) as caught:
        parse_space(items, BASE)
    assert reason in str(caught.value)


def test_a_grid_varies_for_a_method_only_what_it_has():
    space = parse_space(["method=lora,prompt_tuning", "r=4,8", "learning_rate=0.1"], BASE)
    assert grid(space, "lora") == [
        {"method": "lora", "r": 4, "learning_rate": 0.1},
        {"method": "lora", "r": 8, "learning_rate": 0.1},
        {"method": "prompt_tuning", "learning_rate": 0.1},
    ]
    with pytest.raises(OptionError, match="list values, as in r=1,2,4"):
        grid(parse_space(["r=4..8"], BASE), "lora")


def test_a_point_as_options_of_a_run():
    found = options_at(BASE, {"r": 4, "learning_rate": 0.5})
    assert (found.r, found.learning_rate, found.method_options) == (4, 0.5, [])
    given = FinetuneOptions(model="m", data="d", method="dora", method_options=["r=2", "init=gaussian"])
    found = options_at(given, {"method": "dora", "r": 4, "alpha": 8.0})
    assert found.method_options == ["init=gaussian", "r=4", "alpha=8.0"]
    assert options_at(given, {"method": "prompt_tuning"}).method_options == []


def test_interrupted_and_resumed_tries_every_point_once(options, tmp_path, monkeypatch):
    how = SearchOptions(space=("method=lora,bitfit", "r=4", "learning_rate=1e-5,3e-2"), strategy="grid")
    with monkeypatch.context() as patch:
        call, calls = searching._Runner.__call__, []

        def interrupted(self, *arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return call(self, *arguments)

        patch.setattr(searching._Runner, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(options(), how)
    with pytest.raises(OptionError, match="already holds a search"):
        search(options(), how)
    with pytest.raises(OptionError, match="begun with another max_steps"):
        search(options(resume=True, max_steps=5), how)
    result = search(options(resume=True), how)
    # Llama has no biases: those trials say so, and the others go on
    states = [(t["point"]["method"], t["point"]["learning_rate"], t["state"]) for t in result.trials]
    finished = [state for state in states if state[2] == "complete"]
    assert sorted(finished) == [("lora", 1e-5, "complete"), ("lora", 3e-2, "complete")]
    assert [t["error"][:20] for t in result.trials if "error" in t] == ["LlamaForCausalLM has"] * 2
    assert result.best["point"] == {"method": "lora", "r": 4, "learning_rate": 3e-2}
    folder = tmp_path / "found"
    assert json.loads((folder / "trials.json").read_text())["best"] == result.best
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")
    best = build_options({}, folder / "best.yaml")
    assert (best.r, best.learning_rate, best.output) == (4, 3e-2, str(folder / "best"))
    lines = table(result.trials).splitlines()
    assert lines[0].split() == ["trial", "method", "r", "learning_rate", "trained", "held-out", "loss"]
    assert lines[1].split()[3] == "0.03"


def test_trials_are_independent_of_each_other(options):
    """The same point twice on one base: the first trial has left nothing behind."""
    space = ("learning_rate=1e-2", "method=lora", "dropout=0.0,0.0001")
    result = search(options(max_steps=2), SearchOptions(space=space, strategy="grid"))
    first, second = (trial["eval_loss"] for trial in result.trials)
    assert abs(first - second) < 1e-2 * first
    with pytest.raises(OptionError, match="needs held-out data"):
        search(options(overwrite=True, eval_fraction=0.0), SearchOptions(space=space))


def test_hopeless_trials_are_stopped(options, monkeypatch):
    losses = iter([[1.0, 0.9], [1.0, 0.8], [1.0, 0.9], [1.0, 0.85], [3.0, 2.9]])

    def run(self, changed, trial):
        for step, loss in enumerate(next(losses), 1):
            trial.report(loss, step)
            if step == 2 and trial.should_prune():
                return {"eval_loss": loss, "steps": step, "stopped": True, "trainable": 1}
        return {"eval_loss": loss, "steps": step, "stopped": False, "trainable": 1}

    monkeypatch.setattr(searching._Runner, "__init__", lambda self, *arguments: None)
    monkeypatch.setattr(searching._Runner, "__call__", run)
    result = search(options(), SearchOptions(trials=5))
    assert [trial["state"] for trial in result.trials] == ["complete"] * 4 + ["stopped"]
    assert result.best["eval_loss"] == 0.8


def test_command_line(options, tiny_model, tiny_data, tmp_path, capsys):
    command = ["search", "--model", str(tiny_model), "--data", str(tiny_data), "--output", str(tmp_path / "cli")]
    command += ["--device", "cpu", "--max-steps", "2", "--batch-size", "4", "--eval-fraction", "0.1"]
    assert main([*command, "--space", "rank=4"]) == 2
    assert main([*command, "--strategy", "grid"]) == 2
    assert main([*command, "--resume"]) == 2
    error = capsys.readouterr().err
    for words in ("'rank' cannot be searched", "learning_rate is a range", "there is no search in"):
        assert words in error
    assert main([*command, "--strategy", "random", "--trials", "1", "--space", "r=2..4"]) == 0
    assert main([*command, "--resume", "--trials", "2"]) == 0
    assert "best held-out loss" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "cli" / "trials.json").read_text())["trials"]) == 2
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "qlora finetune --config found/best.yaml" in capsys.readouterr().out


def test_trials_on_preferences_share_the_reference(options, tmp_path, monkeypatch):
    from qlora_engine.training import reference
    from tests.training.tiny_llm import preferences, write_jsonl

    computed, compute = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *given: computed.append(1) or compute(*given))
    data = str(write_jsonl(tmp_path / "preferences.jsonl", preferences(30)))
    chosen = options(objective="dpo", data=data, max_steps=2)
    found = search(chosen, SearchOptions(space=("method=lora,ia3",), strategy="grid"))
    assert [trial["state"] for trial in found.trials] == ["complete"] * 2
    assert len(computed) == 2  # training and held-out pairs, once
