import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from qlora_engine.nn import TiedNF4Linear
from qlora_engine.training import FinetuneOptions, Interrupted, UsageError
from qlora_engine.training.data import load_rows
from qlora_engine.training.device import see_one_gpu
from qlora_engine.training.errors import DataError, MemoryShortage, ModelError, OptionError
from qlora_engine.training.finetune import finetune
from qlora_engine.training.loss import causal_lm_loss, decoded_head
from qlora_engine.training.recipe import OneDevice, build_trainer, load_model
from qlora_engine.training.sizes import model_sizes
from tests.training.tiny_llm import COLOURS, THINGS, pairs, save_model, write_jsonl


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
            "samples": 2,
            "sample_tokens": 4,
            "eval_fraction": 0.1,
        }
        return FinetuneOptions(**{**settings, **changes})

    return make


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder, key="loss"):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}


class InterruptAt:
    """Sends this process SIGINT in the middle of an optimizer step, as Ctrl-C does."""

    def __init__(self, monkeypatch, step):
        from qlora_engine.training.trainer import QLoRATrainer

        original, sent = QLoRATrainer.training_step, []

        def training_step(trainer, *arguments, **named):
            if trainer.state.global_step + 1 == step and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGINT)
            return original(trainer, *arguments, **named)

        monkeypatch.setattr(QLoRATrainer, "training_step", training_step)


def test_a_run_learns_and_leaves_its_report(options, tmp_path):
    result = finetune(options(max_steps=30, r=8))
    out = tmp_path / "out"
    before, after = result.summary["eval_loss"]["before"], result.summary["eval_loss"]["after"]
    assert after < before - 1
    assert {file.name for file in out.iterdir()} >= {
        "adapter",
        "metrics.jsonl",
        "loss_curve.png",
        "samples.md",
        "README.md",
        "summary.json",
        "options.yaml",
    }
    # evaluated before, and four times a run
    assert list(losses(out, "eval_loss")) == [0, 8, 16, 24, 30]
    assert list(losses(out)) == list(range(1, 31))
    assert result.summary["bytes"]["adapter"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert json.loads((out / "summary.json").read_text()) == result.summary
    # the model that is handed back generates what it learned
    tokenizer = result.tokenizer
    inputs = tokenizer("the tree is", return_tensors="pt")
    text = tokenizer.decode(result.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert any(word in text for word in COLOURS + THINGS[:1] + ["like"])
    assert "forward" not in result.model.__dict__


def test_loss_is_that_of_the_completion_alone(options, tiny_model, tmp_path):
    """The first evaluation, recomputed: cross-entropy over completion and end token, from transformers' logits."""
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs(8))
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "the cat is", "completion": " blue like a house"}])
    chosen = options(data=str(rows), eval_data=str(held), max_steps=1)
    finetune(chosen)
    model, tokenizer = load_model(chosen, tiny_model, torch.device("cpu"), torch.float32)
    prompt = tokenizer("the cat is")["input_ids"]
    ids = torch.tensor([tokenizer("the cat is blue like a house<|im_end|>")["input_ids"]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss.item()
    assert losses(tmp_path / "out", "eval_loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("optimizer", "r"), [("paged_adamw", 4), ("paged_adamw_8bit", 64), ("adamw_fused", 4)])
def test_interrupted_and_resumed_equals_uninterrupted(options, tmp_path, monkeypatch, optimizer, r):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # dropout and accumulation: random states and the data's order must come back as well
    settings = {"dropout": 0.2, "grad_accum": 2, "max_steps": 7, "eval_every": 3, "lr_schedule": "cosine"}
    settings |= {"optimizer": optimizer, "r": r}  # of smaller tensors the state is kept in 32 bits
    finetune(options(output=str(whole), **settings))
    with monkeypatch.context() as patch:
        InterruptAt(patch, step=4)
        with pytest.raises(Interrupted) as stop:
            finetune(options(output=str(parts), **settings))
    assert stop.value.step == 4
    assert stop.value.checkpoint == str(parts / "checkpoints" / "checkpoint-4")
    assert stop.value.resume == f"qlora finetune --config {parts / 'options.yaml'} --resume"
    finetune(options(output=str(parts), resume=True, **settings))
    assert losses(parts) == losses(whole)
    assert losses(parts, "eval_loss") == losses(whole, "eval_loss")
    expected, got = adapter(whole), adapter(parts)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_checkpoints_hold_the_adapter_and_not_the_model(options, tmp_path):
    finetune(options(save_every=2, keep_checkpoints=2))
    folders = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert folders == ["checkpoint-4", "checkpoint-6"]
    latest = tmp_path / "out" / "checkpoints" / "checkpoint-6"
    names = {file.name for file in latest.iterdir()}
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json"}
    assert all(".lora_" in name for name in load_file(latest / "adapter_model.safetensors"))


def test_a_checkpoint_cut_short_is_passed_over(options, tmp_path, monkeypatch):
    finetune(options(save_every=2))
    broken = tmp_path / "out" / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    broken.write_text(broken.read_text()[:40])
    resumed = finetune(options(resume=True, save_every=2))
    assert resumed.summary["steps"] == 6
    assert list(losses(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]


def test_what_resume_refuses(options, tmp_path):
    with pytest.raises(OptionError, match="there is no checkpoint in"):
        finetune(options(resume=True))
    finetune(options(save_every=2))
    with pytest.raises(OptionError, match=r"learning_rate was 0\.01 and is 0\.5"):
        finetune(options(resume=True, learning_rate=0.5))
    with pytest.raises(OptionError, match="already holds a run; pass --resume"):
        finetune(options())
    assert finetune(options(overwrite=True, max_steps=1)).summary["steps"] == 1
    assert not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))


def first_losses(options, rows, model, steps=1, **changes):
    """Loss of the training set in evaluation mode, packed or not."""
    chosen = options(**changes)
    loaded, tokenizer = load_model(chosen, model, torch.device("cpu"), torch.float32)
    trainer = build_trainer(chosen, loaded, tokenizer, rows, None, torch.device("cpu"), torch.float32)
    loaded.eval()
    total = tokens = 0
    for batch in trainer.get_train_dataloader():
        labels = batch["labels"]
        # labels are shifted: a sequence's first token is never predicted; packed sequences mark theirs with -100
        count = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += trainer.compute_loss(loaded, batch).item() * count
        tokens += count
    return total / tokens, len(trainer.train_dataset)


def test_packed_examples_do_not_see_each_other(options, tiny_model, tiny_data):
    from qlora_engine.training.data import load_rows

    rows = load_rows(tiny_data)
    apart, count = first_losses(options, rows, tiny_model)
    packed, sequences = first_losses(options, rows, tiny_model, packing=True, max_length=64)
    assert sequences < count / 2
    assert packed == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("format", ["text", "messages", "chat"])
def test_every_format_trains(options, tmp_path, format):
    rows = pairs(20)
    if format == "text":
        rows = [{"text": row["prompt"] + row["completion"]} for row in rows]
    elif format == "messages":
        roles = (("user", "prompt"), ("assistant", "completion"))
        rows = [{"messages": [{"role": role, "content": row[key]} for role, key in roles]} for row in rows]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = finetune(options(data=str(data), chat=format == "chat", max_steps=2))
    assert result.summary["steps"] == 2
    assert "**After**" in (tmp_path / "out" / "samples.md").read_text()


def test_gradient_checkpointing_changes_nothing(options, tmp_path):
    finetune(options(output=str(tmp_path / "a"), gradient_checkpointing="off"))
    finetune(options(output=str(tmp_path / "b"), gradient_checkpointing="on"))
    a, b = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_every_optimizer_trains_alike(options, tmp_path):
    curves = {}
    for name in ("adamw_fused", "adamw_foreach", "paged_adamw", "paged_adamw_8bit"):
        finetune(options(output=str(tmp_path / name), optimizer=name, samples=0, r=64))
        curves[name] = torch.tensor(list(losses(tmp_path / name).values()))
    for name, curve in curves.items():
        bound = 0.05 if name == "paged_adamw_8bit" else 1e-4
        assert (curve - curves["adamw_foreach"]).abs().max() < bound, name


def test_lora_plus_lets_b_learn_faster(options, tiny_model):
    settings = options(lora_plus=16.0)
    model, tokenizer = load_model(settings, tiny_model, torch.device("cpu"), torch.float32)
    rows = load_rows(settings.data)
    trainer = build_trainer(settings, model, tokenizer, rows, None, torch.device("cpu"), torch.float32)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert rates[id(param)] == settings.learning_rate * (16 if "lora_B" in name else 1), name


def test_a_process_trains_on_one_of_the_gpus_that_it_sees(tmp_path):
    arguments = OneDevice(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 4  # what transformers counts where four are visible
    assert arguments.n_gpu == 1


def test_another_gpu_is_chosen_before_cuda_is_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert see_one_gpu("cuda") == "cuda"
    assert see_one_gpu("cuda:0") == "cuda:0"
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=2 and --device cuda"):
        see_one_gpu("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert see_one_gpu("cuda:2") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_without_held_out_rows(options, tmp_path):
    result = finetune(options(eval_fraction=0, max_steps=2))
    assert result.summary["eval_loss"] is None
    assert "held-out loss" not in (tmp_path / "out" / "README.md").read_text()


def test_with_embeddings_and_head_in_four_bits(options, tmp_path):
    """A tied model: TRL's loss for the evaluations, this engine's for the steps."""
    result = finetune(options(max_steps=20, r=8, quantize_embeddings=True, quantize_head=True))
    model, summary = result.model, result.summary
    assert isinstance(model.lm_head, TiedNF4Linear)
    assert "get_output_embeddings" not in model.__dict__
    assert summary["eval_loss"]["after"] < summary["eval_loss"]["before"] - 1
    assert summary["bytes"]["model_4bit"] == model_sizes(model).bytes_4bit
    row = torch.tensor([[5, 6, 7, 8, 9]])
    own = causal_lm_loss(model, row, row).loss
    with decoded_head(model):
        weight = model.get_output_embeddings().weight
    hidden = model.model(row).last_hidden_state
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T)[0, :-1], row[0, 1:])
    assert float(own.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_in_bf16(options):
    result = finetune(options(device="cuda", max_steps=30, r=8))
    assert result.summary["dtype"] == "bfloat16"
    assert result.summary["eval_loss"]["after"] < result.summary["eval_loss"]["before"] - 1
    assert any(name.startswith("cuda") for name in result.summary["peak_memory_bytes"])


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        ({"model": "/no/such/model"}, ModelError, "the model path /no/such/model does not exist"),
        ({"data": "/no/rows.jsonl"}, DataError, "the data file /no/rows.jsonl does not exist"),
        ({"target_modules": ["q_porj"]}, UsageError, "q_proj"),
        ({"target_modules": ["lm_head"]}, UsageError, "output head"),
        ({"assistant_only": True}, OptionError, "--assistant-only is for messages rows"),
        ({"device": "tpu"}, UsageError, "the device 'tpu' is unknown"),
        ({"device": "cuda:99"}, UsageError, "the device 'cuda:99' is not here"),
        ({"dtype": "fp16"}, UsageError, "fp16 cannot train on a CPU"),
    ],
)
def test_mistakes_are_explained_and_leave_no_output(options, tmp_path, changes, kind, reason):
    with pytest.raises(kind) as caught:
        finetune(options(**changes))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_near_model_names_are_offered(options, tiny_model):
    with pytest.raises(ModelError, match=r"near it: .*tiny"):
        finetune(options(model=str(tiny_model) + "y"))


def test_a_model_without_chat_template(options, tmp_path):
    plain = save_model(tmp_path / "plain", chat_template=False)
    with pytest.raises(UsageError, match="has no chat template"):
        finetune(options(model=str(plain), chat=True))


def test_prompts_longer_than_the_sequence(options, tmp_path):
    rows = [{"prompt": "long " * 40, "completion": " x"}] * 4
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    with pytest.raises(DataError, match="no training row is left: within --max-length 8"):
        finetune(options(data=str(data), max_length=8))


def test_too_little_memory_is_said_before_loading(options, tmp_path, tiny_model):
    """A header that promises 4 TiB: only headers are read, so the file can be sparse."""
    import shutil

    big = tmp_path / "big"
    shutil.copytree(tiny_model, big)
    size = 4 * 2**40
    tensor = {"dtype": "F16", "shape": [2**21, 2**20], "data_offsets": [0, size]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    with (big / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MemoryShortage, match=r"too little memory on cpu: the model needs [\d.]+ GiB"):
        finetune(options(model=str(big)))
