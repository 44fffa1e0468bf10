"""`--objective dpo`: its loss against float64 and TRL, and runs of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from qlora_engine.training import Interrupted, UsageError, reference
from qlora_engine.training.data import as_chat
from qlora_engine.training.finetune import finetune, load_data
from qlora_engine.training.objective import REWARDS
from qlora_engine.training.preferences import preference_loss
from qlora_engine.training.recipe import build_trainer, load_model
from tests.training.test_finetune import InterruptAt, adapter, losses, options  # noqa: F401 - a fixture
from tests.training.tiny_llm import preferences, save_model, write_jsonl

CPU = torch.device("cpu")


@pytest.fixture
def preferred(options, tmp_path):  # noqa: F811
    """Options of a run on preferences."""
    data = write_jsonl(tmp_path / "preferences.jsonl", preferences(80))

    def make(**changes):
        return options(**{"data": str(data), "objective": "dpo", "beta": 0.5, "samples": 1, **changes})

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"beta": 0.7, "label_smoothing": 0.2},
        {"beta": 0.3, "loss_type": "ipo"},
        {"beta": 0.3, "sft_weight": 1.5},
        {"beta": 0.2, "loss_type": "ipo", "sft_weight": 0.5},
    ],
    ids=str,
)
def test_loss_and_gradient_against_float64(settings):
    wide = -20 * torch.rand(6, 2, dtype=torch.float64)
    base, lengths = -20 * torch.rand(6, 2, dtype=torch.float64), torch.randint(1, 9, (6, 2))
    wide.requires_grad_()
    beta, smoothing = settings["beta"], settings.get("label_smoothing", 0.0)
    total = 0.0
    for (chosen, rejected), (base_chosen, base_rejected), (n, m) in zip(wide, base, lengths.tolist(), strict=True):
        better, worse = chosen - base_chosen, rejected - base_rejected
        if "loss_type" in settings:
            total = total + (better / n - worse / m - 1 / (2 * beta)) ** 2
        else:
            right = 1 / (1 + torch.exp(-beta * (better - worse)))
            total = total - (1 - smoothing) * right.log() - smoothing * (1 - right).log()
        total = total - settings.get("sft_weight", 0.0) * chosen / n
    expected = total / 6
    (slopes,) = torch.autograd.grad(expected, wide)
    narrow = wide.detach().float().requires_grad_()
    found = preference_loss(narrow, base.float(), lengths, **settings)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(narrow.grad.double(), slopes, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.rewards.double(), beta * (wide.detach() - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "trls"),
    [
        ({"beta": 0.5}, {}),
        ({"beta": 0.5, "loss_type": "ipo"}, {"loss_type": ["ipo"]}),
        # TRL's mean is over all tokens of the batch and this one's over pairs: they agree on one pair
        ({"sft_weight": 2.0, "batch_size": 1}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}),
        ({"chat": True}, {}),
    ],
    ids=["sigmoid", "ipo", "sft", "chat"],
)
def test_loss_and_gradients_are_trls(preferred, tiny_model, tmp_path, settings, trls):
    """A batch of a model with adapters that do something: tokens, loss, gradients and rewards of TRL's DPOTrainer."""
    from trl import DPOConfig, DPOTrainer

    chosen = preferred(**{"batch_size": 3, **settings})
    rows, _ = load_data(chosen)
    rows = as_chat(rows) if chosen.chat else rows
    model, tokenizer = load_model(chosen, tiny_model, CPU, torch.float32)
    loop = build_trainer(chosen, model, tokenizer, rows, None, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def step(trainer):
        model.train()
        dataset = trainer.train_dataset
        batch = trainer.data_collator([dataset[i] for i in range(chosen.batch_size)])
        loss = trainer.compute_loss(model, batch)
        return loss, torch.autograd.grad(loss, list(adapters.values())), batch["input_ids"]

    ours, our_gradients, our_ids = step(loop)
    figures, tokens = loop.objective.take(training=True)
    model.__dict__.pop("forward")
    base, _ = load_model(chosen, tiny_model, CPU, torch.float32)  # fresh adapters change nothing
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=chosen.beta,
        max_length=chosen.max_length,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **trls,
    )
    judge = DPOTrainer(
        model=model, ref_model=base, args=arguments, train_dataset=rows.dataset(), processing_class=tokenizer
    )
    theirs, their_gradients, their_ids = step(judge)
    assert torch.equal(our_ids.transpose(0, 1).flatten(0, 1), their_ids)  # they have all chosen answers first
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, one, other in zip(adapters, our_gradients, their_gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7, name
    for name in REWARDS:
        assert figures[name] == pytest.approx(judge._metrics["train"][name], rel=1e-4, abs=1e-5), name
    assert tokens == judge._total_train_tokens


def test_a_run_learns_to_prefer_on_unseen_pairs(preferred, tmp_path):
    result = finetune(preferred(max_steps=20, r=8, eval_fraction=0.2))
    out, summary = tmp_path / "out", result.summary
    before, after = summary["eval_rewards"]["before"], summary["eval_rewards"]["after"]
    assert losses(out)[1] == pytest.approx(0.6931, abs=1e-3), "the model begins as its reference: log 2"
    assert before["margins"] == pytest.approx(0, abs=1e-3)
    assert before["accuracies"] < 0.8 < after["accuracies"]
    assert after["margins"] == pytest.approx(after["chosen"] - after["rejected"], abs=1e-5)
    assert after["margins"] > 1
    assert summary["eval_loss"]["after"] < summary["eval_loss"]["before"]
    assert {"step", "loss", "tokens", *REWARDS} <= json.loads(
        (out / "metrics.jsonl").read_text().splitlines()[1]
    ).keys()
    assert list(losses(out, "eval_rewards/accuracies")) == [0, 5, 10, 15, 20]
    card = (out / "README.md").read_text()
    assert f"**{after['accuracies']:.1%}** after" in card
    assert "| preferences (DPO), beta 0.5, loss_type sigmoid |" in card
    assert "**Reference**" in (out / "samples.md").read_text()
    kept = load_file(out / "reference.safetensors")
    assert {name: len(t) for name, t in kept.items()} == {"train_dataset": 64, "eval_dataset": 16}


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"offload_activations": True, "gradient_checkpointing": "full"}], ids=str)
def test_on_a_gpu_in_bf16(preferred, tmp_path, changes):
    result = finetune(preferred(device="cuda", max_steps=20, r=8, eval_fraction=0.2, **changes))
    assert result.summary["dtype"] == "bfloat16"
    assert losses(tmp_path / "out")[1] == pytest.approx(0.6931, abs=0.02)
    assert result.summary["eval_rewards"]["after"]["accuracies"] > 0.8


def test_the_curve_has_margins_and_accuracy(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    from qlora_engine.training import report

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    records = [{"step": 0, "eval_loss": 0.7, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.5}]
    records += [{"step": n, "loss": 0.7, "rewards/margins": n / 4, "rewards/accuracies": n / 8} for n in range(1, 5)]
    report.draw_losses(records, tmp_path / "curve.png", "title")
    labels = [axes.get_ylabel() for axes in drawn[0].axes]
    assert labels == ["loss", "reward margin", "reward accuracy"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[1].get_lines()}
    assert lines["training, each step"] == [[n, n / 4] for n in range(1, 5)]
    assert lines["held out"] == [[0, 0.0]]


def test_interrupted_and_resumed_equals_uninterrupted(preferred, tmp_path, monkeypatch):
    """Dropout, accumulation, a smaller last batch; the reference is not computed again."""
    computed, compute = [], reference.compute
    monkeypatch.setattr(reference, "compute", lambda *given: computed.append(1) or compute(*given))
    settings = {"dropout": 0.2, "grad_accum": 2, "max_steps": 5, "eval_every": 2, "batch_size": 5, "samples": 0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(preferred(output=str(whole), **settings))
    with monkeypatch.context() as patch:
        InterruptAt(patch, step=3)
        with pytest.raises(Interrupted):
            finetune(preferred(output=str(parts), **settings))
    assert len(computed) == 4  # training and held-out pairs of two runs
    finetune(preferred(output=str(parts), resume=True, **settings))
    assert len(computed) == 4
    for key in ("loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies", "tokens"):
        assert losses(parts, key) == losses(whole, key), key
    assert all(torch.equal(t, adapter(parts)[name]) for name, t in adapter(whole).items())


def test_a_kept_reference_is_of_these_pairs_and_this_base(preferred, tiny_model, tmp_path):
    from datasets import Dataset

    rows = [{"prompt": [1], "chosen": [2, 3], "rejected": [4]}, {"prompt": [1], "chosen": [2], "rejected": [3]}]
    base, _ = load_model(preferred(), tiny_model, CPU, torch.float32)
    first = reference.base_digest(base)
    with torch.no_grad():
        next(p for name, p in base.named_parameters() if "lora_B" in name).add_(1)
    assert reference.base_digest(base) == first, "what is trained is not part of it"
    other, _ = load_model(preferred(blocksize=32), tiny_model, CPU, torch.float32)
    digests = [reference.pairs_digest(Dataset.from_list(rows), first)]
    digests.append(reference.pairs_digest(Dataset.from_list(rows), reference.base_digest(other)))
    digests.append(reference.pairs_digest(Dataset.from_list(rows[::-1]), first))
    digests.append(reference.pairs_digest(Dataset.from_list([{**rows[0], "chosen": [2], "rejected": [3, 4]}]), first))
    assert len(set(digests)) == 4
    file = tmp_path / "kept"
    save_file({"a": torch.ones(2, 2)}, file, metadata={"a": digests[0]})
    assert reference.read(file, {"a": digests[0], "b": digests[1]}).keys() == {"a"}
    assert reference.read(file, {"a": digests[1]}) == {}
    file.write_bytes(b"cut short")
    assert reference.read(file, {"a": digests[0]}) == {}
    assert reference.read(tmp_path / "none", {"a": digests[0]}) == {}


def test_accumulation_and_recomputation_change_no_number(preferred, tmp_path):
    common = {"max_steps": 3, "samples": 0, "eval_fraction": 0.0, "max_length": 32}
    runs = {
        "whole": {"batch_size": 4},
        "accumulated": {"batch_size": 2, "grad_accum": 2},
        "recomputed": {"batch_size": 4, "activation_gib": 0.001},
        "trl": {"batch_size": 4},
    }
    for name, changes in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "trl":  # as several processes and other methods have it
                patch.setattr("qlora_engine.training.step.why_not_own_loss", lambda *_: "TRL's is wanted")
            finetune(preferred(output=str(tmp_path / name), **common, **changes))
    for name in runs:
        for key in ("loss", "rewards/margins", "grad_norm", "tokens"):
            expected, got = losses(tmp_path / "whole", key), losses(tmp_path / name, key)
            assert got == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, key)


def test_the_reference_of_other_methods_is_the_base(preferred, tmp_path):
    common = {"max_steps": 2, "samples": 0}
    finetune(preferred(output=str(tmp_path / "lora"), **common))
    base = load_file(tmp_path / "lora" / "reference.safetensors")
    for method, settings in (("fishmask", ["share=0.05"]), ("prompt_tuning", ["num_virtual_tokens=4"])):
        folder = tmp_path / method
        finetune(preferred(output=str(folder), method=method, method_options=settings, **common))
        found = load_file(folder / "reference.safetensors")
        for name, expected in base.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
        begins_as_base = method != "prompt_tuning"  # its virtual tokens say something from the beginning
        assert (losses(folder)[1] == pytest.approx(0.6931, abs=1e-3)) == begins_as_base


def test_the_reference_is_what_the_model_says_without_adapters(preferred, tiny_model):
    chosen = preferred()
    rows, held_out = load_data(chosen)
    model, tokenizer = load_model(chosen, tiny_model, CPU, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    loop = build_trainer(chosen, model, tokenizer, rows, held_out, CPU, torch.float32)
    base, _ = load_model(chosen, tiny_model, CPU, torch.float32)
    for row in (loop.train_dataset[0], loop.eval_dataset[3]):
        for index, name in enumerate(("chosen", "rejected")):
            ids = torch.tensor([row["prompt"] + row[name]])
            scores = F.log_softmax(base(ids).logits.double(), -1)[0, :-1]
            expected = scores.gather(1, ids[0, 1:, None])[len(row["prompt"]) - 1 :].sum()
            assert row["reference"][index] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_prompts_longer_than_the_sequence_are_left_out(preferred, tiny_model, tmp_path):
    rows = [*preferences(6), {"prompt": "long " * 40, "chosen": " x", "rejected": " y"}]
    chosen = preferred(data=str(write_jsonl(tmp_path / "long.jsonl", rows)), max_length=12, eval_fraction=0)
    model, tokenizer = load_model(chosen, tiny_model, CPU, torch.float32)
    loop = build_trainer(chosen, model, tokenizer, load_data(chosen)[0], None, CPU, torch.float32)
    assert len(loop.train_dataset) == 6
    assert all(len(row["prompt"] + row[name]) <= 12 for row in loop.train_dataset for name in ("chosen", "rejected"))


def test_a_model_without_chat_template(preferred, tmp_path):
    plain = save_model(tmp_path / "plain", chat_template=False)
    with pytest.raises(UsageError, match="has no chat template"):
        finetune(preferred(model=str(plain), chat=True))
