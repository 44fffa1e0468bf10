"""TRL's trainers, transformers' Trainer and an Accelerate loop over 4-bit models, with PagedAdamW."""

import copy

import pytest
import torch

import qlora_engine as qe
from qlora_engine.models.skeleton import decode_modules
from qlora_engine.optim import PagedAdamW
from tests.training.tiny_llm import pairs

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from qlora_engine.integrations import peft as integration  # noqa: E402

COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "max_length": 64,
}
PAGED = (PagedAdamW, {"lr": 5e-3})


def model_of(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=qe.NF4Config(), dtype=dtype, device_map={"": "cpu"}
    )


def lora(**options):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return integration.register(peft.LoraConfig(**settings))


def sft(model, folder, data_folder, steps, peft_config=None, resume=None, optimizer=PAGED, **options):
    torch.manual_seed(0)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        **COMMON,
        **options,
    )
    rows = datasets.Dataset.from_list(pairs(32))
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        peft_config=peft_config,
        processing_class=transformers.AutoTokenizer.from_pretrained(data_folder),
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def paged(model):
    return PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.compat(
    "Training",
    "TRL's SFTTrainer: accumulation, checkpointing with either reentrancy, evaluation, resuming exactly, PagedAdamW",
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_sft_learns_as_over_decoded_weights_and_resumes(reentrant, tiny_chat_model, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    base = model_of(tiny_chat_model)
    plain = copy.deepcopy(base)
    plain.dequantize()
    mine = sft(base, tmp_path / "mine", tiny_chat_model, 4, lora(), **options)
    assert any(isinstance(m, integration.FusedLoraLinear) for m in mine.model.modules())
    assert type(mine.optimizer.optimizer) is PagedAdamW
    unfused = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adamw = (torch.optim.AdamW, {"lr": 5e-3})
    theirs = sft(plain, tmp_path / "theirs", tiny_chat_model, 4, unfused, optimizer=adamw, **options)
    assert losses(mine) == pytest.approx(losses(theirs), rel=2e-3)
    assert losses(mine, "eval_loss") == pytest.approx(losses(theirs, "eval_loss"), rel=2e-3)
    assert losses(mine)[-1] < losses(mine)[0]
    assert all(p.dtype == torch.float32 for p in trainable(mine.model).values())

    resumed = sft(
        model_of(tiny_chat_model),
        tmp_path / "mine",
        tiny_chat_model,
        4,
        lora(),
        resume=str(tmp_path / "mine" / "checkpoint-2"),
        **options,
    )
    expected = trainable(mine.model)
    for name, tensor in trainable(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.compat(
    "Training",
    "SFTTrainer over adapters of this package, without PEFT",
)
def test_sft_with_this_packages_own_adapters(tiny_chat_model, tmp_path):
    """A model prepared here, without PEFT, passes the checks of a quantized model."""
    model = qe.prepare(model_of(tiny_chat_model), qe.QLoRAConfig(r=4, alpha=8))
    before = trainable(model)
    trainer = sft(model, tmp_path, tiny_chat_model, 2)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainable(model).items() if "lora_B" in name)


@pytest.mark.compat(
    "Training",
    "TRL's DPOTrainer",
)
def test_dpo(tiny_chat_model, tmp_path):
    torch.manual_seed(0)
    rows = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(pairs(8), pairs(8, seed=1), strict=True)
    ]
    model = peft.get_peft_model(model_of(tiny_chat_model), lora())
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_steps=2, save_strategy="no", **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_chat_model),
        optimizers=(paged(model), None),
    )
    trainer.train()
    first, *_, last = losses(trainer)
    assert first == pytest.approx(0.6931, abs=1e-3), "the policy begins as its reference: log 2"
    assert last < first


@pytest.mark.compat(
    "Training",
    "an Accelerate loop, in float32 and bfloat16, saving and loading its state",
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop(precision, tiny_chat_model, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it keeps the precision of the test before
    model = peft.get_peft_model(model_of(tiny_chat_model), lora(lora_dropout=0.1))
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="those that are trained"):
        PagedAdamW(model.parameters())
    optimizer = paged(model)
    ids = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(ids, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch():
        found = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return sum(found)

    model.train()
    first = epoch()
    accelerator.save_state(tmp_path / "state")
    second = epoch()
    expected = trainable(model)
    epoch()
    accelerator.load_state(tmp_path / "state")
    assert epoch() == second < first
    for name, tensor in trainable(model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.compat(
    "Training",
    "autocast in bfloat16 and float16",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, tiny_chat_model):
    """The product runs in autocast's dtype; adapters in float32 get gradients in float32 near those without it."""
    model = peft.get_peft_model(model_of(tiny_chat_model), lora())
    plain = model.get_base_model()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, exact in grads[0].items():
        mine = grads[1][name]
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() < 0.1 * exact.norm(), name


def test_decoded_model_is_what_the_layers_compute(tiny_chat_model):
    model = model_of(tiny_chat_model)
    ids = torch.randint(3, 300, (1, 9))
    expected = model(ids).logits
    decode_modules(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
