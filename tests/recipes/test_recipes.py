"""Every recipe, run by the command in its head on a tiny model."""

import json
import shlex
from pathlib import Path

import pytest

from qlora_engine.cli.main import main
from qlora_engine.training.errors import OptionError
from qlora_engine.training.options import build_options, read_yaml
from tests.training.tiny_llm import pairs, preferences, save_model, write_jsonl

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# what makes a run short
SHORT = "--max-steps 2 --max-length 48 --batch-size 2 --grad-accum 1 --device cpu --samples 1 --sample-tokens 2"
SHORT += " --eval-max-rows 2 --r 2"


def rows(recipe: Path) -> list[dict]:
    """Rows of the columns that the recipe's head shows."""
    found = pairs(24)
    if '"rejected"' in recipe.read_text():
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return [{name: [{"role": roles[name], "content": row[name]}] for name in row} for row in preferences(24)]
    if '"messages"' in recipe.read_text():
        turns = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in found]
        return [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    if '{"text"' in recipe.read_text():
        return [{"text": row["prompt"] + row["completion"]} for row in found]
    return found


def commands(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's head."""
    lines = recipe.read_text().splitlines()
    return [shlex.split(line.lstrip("# "))[1:] for line in lines if line.startswith("#   qlora ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    save_model(folder / "tiny")
    return folder


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} >= {"chat", "instruction", "classification", "pretraining", "dpo"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_runs(recipe, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (place / "recipes").mkdir(exist_ok=True)
    (place / "recipes" / recipe.name).write_text(recipe.read_text())
    finetune, estimate = commands(recipe)
    assert finetune[:3] == ["finetune", "--config", f"recipes/{recipe.name}"]
    write_jsonl(place / finetune[finetune.index("--data") + 1], rows(recipe))
    assert main([*finetune, "--model", "tiny", *SHORT.split()]) == 0, capsys.readouterr().err
    summary = json.loads((place / finetune[finetune.index("--output") + 1] / "summary.json").read_text())
    assert summary["train_loss"]["last"] > 0
    capsys.readouterr()
    assert main([estimate[0], "tiny", *estimate[1:]]) == 0, capsys.readouterr().err
    assert "fits into" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(recipe, tmp_path):
    for name in (name for name in read_yaml(recipe) if len(name) > 4):
        file = tmp_path / "wrong.yaml"
        file.write_text(f"{name[:-1]}: 1\n")
        with pytest.raises(OptionError, match=rf"unknown key `{name[:-1]}`; did you mean `{name}`"):
            build_options({}, file)
