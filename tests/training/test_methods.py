"""`qlora finetune --method`: every method in a run, its checkpoints, and what is refused."""

import json

import pytest
import torch

from qlora_engine import peft
from qlora_engine.models.checkpoint import load_quantized
from qlora_engine.training import Interrupted
from qlora_engine.training.errors import OptionError, UsageError
from qlora_engine.training.finetune import finetune
from qlora_engine.training.methods import method_config
from qlora_engine.training.recipe import _optimizer
from tests.training.test_finetune import InterruptAt, losses, options  # noqa: F401 - a fixture
from tests.training.tiny_llm import pairs, write_jsonl

# settings with which a tiny model learns something in 30 steps
METHODS = {
    "adalora": ["init_r=6", "target_r=3", "total_steps=30"],
    "bitfit": ["add_missing=true"],
    "bottleneck": [],
    "diff_pruning": [],
    "dora": ["r=4"],
    "fishmask": ["share=0.05"],
    "ia3": [],
    "selection": ["norms=true"],
    "lora_fa": ["r=4"],
    "lora_plus": ["r=4"],
    "p_tuning": ["num_virtual_tokens=4", "encoder=mlp"],
    "p_tuning_v2": ["num_virtual_tokens=4"],
    "prefix_tuning": ["num_virtual_tokens=4"],
    "prompt_tuning": ["num_virtual_tokens=4"],
    "vera": ["r=16"],
}


def test_every_method_is_here():
    assert set(METHODS) == set(peft.METHODS) - {"lora"}


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """(training rows, held-out rows) as files; no held-out row is in the training rows."""
    folder = tmp_path_factory.mktemp("unseen")
    rows = {row["prompt"] + row["completion"]: row for row in pairs(400)}
    held = {text: row for text, row in rows.items() if (len(row["prompt"]) + len(row["completion"])) % 4 == 0}
    assert 5 < len(held) < 30
    train = [row for text, row in rows.items() if text not in held]
    return write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "held.jsonl", list(held.values()))


@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_beats_the_frozen_model_on_unseen_rows_and_is_loaded_again(options, unseen, tmp_path, tiny_model, name):  # noqa: F811
    data, held = map(str, unseen)
    chosen = options(
        data=data, eval_data=held, method=name, method_options=METHODS.get(name, []), max_steps=30, samples=1
    )
    result = finetune(chosen)
    held_out = result.summary["eval_loss"]
    assert held_out["after"] < held_out["before"] - 0.05
    assert result.summary["adapter"]["method"] == name
    assert result.summary["adapter"]["trainable_parameters"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| adapter | {'LoRA' if name == 'lora' else name}" in card
    other = load_quantized(tiny_model, device="cpu", dtype=torch.float32)
    peft.load(other, result.adapter)
    ids = torch.arange(4, 12).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("adalora", 3),
        ("dora", 3),
        ("fishmask", 3),
        ("prefix_tuning", 3),
        ("diff_pruning", 3),
        ("diff_pruning", 5),  # what is kept is chosen after step 4
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(options, tmp_path, monkeypatch, name, step):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    chosen = ["init_r=6", "target_r=2", "total_steps=6", "t_final=1"] if name == "adalora" else METHODS[name]
    settings = {"method": name, "method_options": chosen, "max_steps": 6, "samples": 0}
    finetune(options(output=str(whole), **settings))
    with monkeypatch.context() as patch:
        InterruptAt(patch, step=step)
        with pytest.raises(Interrupted):
            finetune(options(output=str(parts), **settings))
    finetune(options(output=str(parts), resume=True, **settings))
    assert losses(parts) == losses(whole)
    assert losses(parts, "eval_loss") == losses(whole, "eval_loss")


def test_a_method_is_told_the_number_of_steps(options, tmp_path):  # noqa: F811
    settings = {"method": "diff_pruning", "max_steps": 0, "epochs": 0.2, "samples": 0}
    result = finetune(options(**settings))
    steps = max(losses(tmp_path / "out"))
    config = json.loads((result.adapter / "adapter_config.json").read_text())["config"]
    assert config["fix_at"] == 2 * steps // 3 > 1
    chosen = {"method_options": [f"fix_at={steps + 1}"], "output": str(tmp_path / "other")}
    with pytest.raises(UsageError, match=f"fix_at is {steps + 1}, but there are {steps} steps"):
        finetune(options(**settings, **chosen))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "bitfti"}, "did you mean 'bitfit'?"),
        ({"method": "telepathy"}, "known are adalora, bitfit"),
        ({"method_options": ["r=4"]}, "LoRA's settings are --r"),
        ({"method": "dora", "method_options": ["zzz=4"]}, "dora has no 'zzz'; known are"),
        ({"method": "dora", "method_options": ["alhpa=4"]}, "did you mean 'alpha'?"),
        ({"method": "dora", "method_options": ["r"]}, "'r' is not name=value"),
        ({"method": "dora", "method_options": ["r=["]}, "not valid YAML behind the ="),
        ({"method": "fishmask", "method_options": ["share=7"]}, "the share is 7"),
        ({"method": "diff_pruning", "method_options": ["fix_at=0"]}, "fix_at is 0; expected a number of steps"),
    ],
)
def test_mistakes_are_explained(options, changes, reason):  # noqa: F811
    with pytest.raises(OptionError) as caught:
        method_config(options(**changes))
    assert reason in str(caught.value)


def test_a_model_that_cannot_carry_it_is_said(options, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="has no bias to train"):
        finetune(options(method="bitfit"))
    assert not (tmp_path / "out").exists()


def test_command_line(options, tiny_model, tmp_path, capsys):  # noqa: F811
    from qlora_engine.cli.main import main

    finetune(options(method="prompt_tuning", method_options=["num_virtual_tokens=4"], max_steps=2, samples=0))
    adapter = str(tmp_path / "out" / "adapter")
    assert (
        json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    )
    common = ["--model", str(tiny_model), "--device", "cpu", "--adapter", adapter]
    assert main(["generate", *common, "--prompt", "the cat is", "--max-new-tokens", "3"]) == 0
    assert main(["merge", *common, "--output", str(tmp_path / "merged")]) == 2
    assert "cannot be merged" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_small_steps_add_up_in_16_bits(options, optimizer):  # noqa: F811
    """What a method trains of a 16-bit model's own: near 1, bfloat16 numbers are 40 of these steps apart."""
    weight = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    kind, settings = _optimizer(options(optimizer=optimizer, learning_rate=1e-4))
    steps = kind([weight], **settings)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        steps.step()
    assert weight.detach().float().mean().item() == pytest.approx(0.99, abs=0.003)
