import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_engine.training import FinetuneOptions, UsageError, step
from qlora_engine.training.finetune import finetune
from tests.training.test_finetune import adapter, losses


@pytest.fixture
def options(tiny_model, tiny_data, tmp_path):
    def make(**changes):
        settings = {
            "model": str(tiny_model),
            "data": str(tiny_data),
            "output": str(tmp_path / "out"),
            "device": "cpu",
            "r": 4,
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "samples": 0,
            "eval_fraction": 0.0,
        }
        return FinetuneOptions(**{**settings, **changes})

    return make


def test_a_budget_of_activations_changes_no_number(options, tmp_path):
    for name, budget in (("a", None), ("b", 0.001)):
        finetune(options(output=str(tmp_path / name), max_steps=3, max_length=32, activation_gib=budget))
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_training_loss_is_trls(options, tmp_path, monkeypatch):
    """On batches of unequal lengths, accumulated: loss, accuracy and tokens of each step, and the adapter."""
    common = {"grad_accum": 2, "max_steps": 3}
    finetune(options(output=str(tmp_path / "ours"), **common))
    monkeypatch.setattr(step, "why_not_own_loss", lambda *_: "TRL's is wanted")
    finetune(options(output=str(tmp_path / "trl"), **common))
    for key in ("loss", "mean_token_accuracy", "tokens", "grad_norm"):
        ours, theirs = losses(tmp_path / "ours", key), losses(tmp_path / "trl", key)
        assert ours == pytest.approx(theirs, rel=1e-4), key
    a, b = adapter(tmp_path / "ours"), adapter(tmp_path / "trl")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda_graphs": True}, "a GPU is needed"),
        ({"liger": "on"}, "--liger on"),
        ({"offload_activations": True, "gradient_checkpointing": "full"}, "model is on cpu"),
        ({"activation_gib": 1e-6}, "Raise it"),
        ({"activation_gib": 1.0, "method": "ia3"}, "--method lora"),
    ],
)
def test_what_a_run_cannot_do_is_said(options, changes, words):
    with pytest.raises(UsageError, match=words):
        finetune(options(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_captured_run_trains_alike(options, tmp_path, checkpointing):
    common = {"device": "cuda", "dtype": "bf16", "grad_accum": 2, "gradient_checkpointing": checkpointing}
    for name, captured in (("a", False), ("b", True)):
        finetune(options(output=str(tmp_path / name), cuda_graphs=captured, eval_fraction=0.1, **common))
    for key in ("loss", "tokens", "mean_token_accuracy", "eval_loss"):
        a, b = losses(tmp_path / "a", key), losses(tmp_path / "b", key)
        assert a.keys() == b.keys()
        tolerance = {"tokens": 0, "mean_token_accuracy": 0.05}.get(key, 0.02)
        assert b == pytest.approx(a, rel=tolerance, abs=tolerance), key


@pytest.mark.gpu
def test_offloaded_inputs_train_alike(options, tmp_path):
    common = {"device": "cuda", "gradient_checkpointing": "full", "max_steps": 3, "dropout": 0.1}
    for name, offload in (("a", False), ("b", True)):
        finetune(options(output=str(tmp_path / name), offload_activations=offload, **common))
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert b == pytest.approx(a, rel=1e-3)
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert load_file(tmp_path / "b" / "adapter" / "adapter_model.safetensors")
