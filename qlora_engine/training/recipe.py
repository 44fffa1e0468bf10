"""Turns the options into a model and a trainer: the part of a run that TRL and transformers do."""

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig

from qlora_engine.models.checkpoint import load_quantized
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.nn import QLoRALinear
from qlora_engine.optim import PagedAdamW
from qlora_engine.training import step
from qlora_engine.training.checkpoints import CHECKPOINTS
from qlora_engine.training.data import Rows
from qlora_engine.training.errors import DataError, UsageError, as_usage_error
from qlora_engine.training.memory import GIB
from qlora_engine.training.methods import apply_method, method_config
from qlora_engine.training.objective import NextToken, Objective
from qlora_engine.training.options import DPO, FinetuneOptions, recomputation_policy
from qlora_engine.training.parallel import Ranks, training_arguments
from qlora_engine.training.preferences import Preferences
from qlora_engine.training.trainer import QLoRATrainer


def load_model(options: FinetuneOptions, folder: Path, device: torch.device, dtype: torch.dtype, first: bool = True):
    """(4-bit model with fresh adapters or another method on it, tokenizer); the first process shows its progress.

    Raises:
        UsageError: where the model or the targets do not fit; the library's sentence is kept.
    """
    method = method_config(options)
    model, tokenizer = load_base(options, folder, device, dtype, first, r=options.r if method is None else 0)
    apply_method(model, method)
    check_head(model)
    return model, tokenizer


def load_base(
    options: FinetuneOptions, folder: Path, device: torch.device, dtype: torch.dtype, first: bool = True, r: int = 0
) -> tuple[torch.nn.Module, object]:
    """(4-bit model, tokenizer), with fresh adapters of rank `r`, or with none.

    Raises:
        UsageError: where the model, the tokenizer or the targets do not fit; the library's sentence is kept.
    """
    config = QLoRAConfig(
        r=r,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
        scales=options.scales,
        quantize_embeddings=options.quantize_embeddings,
        quantize_head=options.quantize_head,
    )
    set_seed(options.seed)  # the adapters' first values
    with as_usage_error():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load_quantized(folder, config, device=device, dtype=dtype, progress=sys.stderr.isatty() and first)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UsageError(f"the tokenizer of {options.model} has neither a padding nor an end token; set one of them")
    return model, tokenizer


def check_head(model: torch.nn.Module) -> None:
    """Raises UsageError where the output head has an adapter."""
    head = model.get_output_embeddings()
    if isinstance(head, QLoRALinear) and head.adapters:
        raise UsageError(
            "the output head cannot have an adapter here: the loss is computed from its weight alone; take it out of "
            "--target-modules"
        )


def _optimizer(options: FinetuneOptions) -> tuple[type[torch.optim.Optimizer], dict]:
    """What Trainer builds the optimizer from."""
    arguments = {"lr": options.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8}
    if not options.optimizer.startswith("paged"):
        return torch.optim.AdamW, arguments | {options.optimizer.removeprefix("adamw_"): True}
    if options.optimizer_gpu_gib is not None:
        arguments["device_budget"] = int(options.optimizer_gpu_gib * GIB)
    # for methods that train a 16-bit model's own norms and biases: their steps are too small to add up in 16 bits
    return PagedAdamW, arguments | {"bits": 8 if options.optimizer.endswith("8bit") else 32, "master_weights": True}


def build_objective(options: FinetuneOptions, tokenizer) -> Objective:
    """What `--objective` names."""
    return Preferences(options, tokenizer) if options.objective == DPO else NextToken(options)


class OneDevice(SFTConfig):
    """Arguments of a process that trains on one GPU, also where it sees several, which `see_one_gpu` cannot hide once
    CUDA is initialized: transformers would replicate the model over them. Several are for a launcher."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def build_trainer(
    options: FinetuneOptions,
    model: torch.nn.Module,
    tokenizer,
    train_rows: Rows,
    held_out: Rows | None,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    keep: Path | None = None,
) -> QLoRATrainer:
    """The trainer of a run; building it tokenizes the data, and computes what the objective needs of the base.

    Args:
        keep: folder where the latter is kept, for runs on the same data and base; default: the run's.

    Raises:
        UsageError: where the data do not fit the tokenizer or the length.
    """
    on_gpu = device.type == "cuda"
    checkpointing = False  # by transformers; `step.set_up` turns on this engine's own
    if step.leaves_recomputation_to_transformers(options, model):
        checkpointing = recomputation_policy(options, on_gpu) != "none"
    settings = {
        "output_dir": str(Path(options.output) / CHECKPOINTS),
        "seed": options.seed,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.grad_accum,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_schedule if options.lr_schedule != "constant" else "constant_with_warmup",
        "warmup_steps": options.warmup_steps,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": options.eval_every or 0.25,  # below one: a part of all steps
        "prediction_loss_only": True,
        "logging_strategy": "steps",
        "logging_steps": 1,  # a longer mean would lose its first part when a run is interrupted
        "save_strategy": "steps" if options.save_every else "no",
        "save_steps": options.save_every or 500,
        "save_total_limit": options.keep_checkpoints,
        "dataloader_pin_memory": on_gpu,
        "disable_tqdm": True,
        "report_to": "none",
    }
    ranks, objective = ranks or Ranks(), build_objective(options, tokenizer)
    settings |= objective.settings(train_rows) | training_arguments(ranks, on_gpu)
    with warnings.catch_warnings():
        # transformers 5.23 renamed gradient_checkpointing; TRL 1.16 still speaks the old name
        warnings.simplefilter("ignore", FutureWarning)
        arguments = OneDevice(**settings)
    with as_usage_error():
        trainer = QLoRATrainer(
            objective=objective,
            model=model,
            args=arguments,
            train_dataset=objective.dataset(train_rows),
            eval_dataset=objective.dataset(held_out) if held_out else None,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=_optimizer(options),
            lora_plus=options.lora_plus,
            ranks=ranks,
        )
    step.set_up(options, trainer, device)
    trainer.remove_callback(PrinterCallback)  # ProgressBar says it better
    for name, dataset in (("training", trainer.train_dataset), ("held-out", trainer.eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise DataError(
                f"no {name} row is left: within --max-length {options.max_length} every prompt fills the whole "
                "sequence; raise it"
            )
    objective.prepare(trainer, keep or Path(options.output))
    return trainer
