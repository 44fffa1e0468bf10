"""The recipe of `qlora finetune`: data, model, training, evaluation, report."""

import json
import random
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PrinterCallback, set_seed
from trl import SFTConfig

from qlora_engine.models.adapter import save_adapter
from qlora_engine.models.checkpoint import load_quantized
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.nn import NF4Linear
from qlora_engine.training import data, memory, report, sampling
from qlora_engine.training.device import choose_device, choose_dtype, see_one_gpu
from qlora_engine.training.errors import (
    DataError,
    Interrupted,
    OptionError,
    UsageError,
    as_usage_error,
    out_of_memory_as_usage_error,
)
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.sizes import folder_bytes, model_sizes
from qlora_engine.training.source import resolve_model
from qlora_engine.training.trainer import (
    MetricsLog,
    ProgressBar,
    QLoRATrainer,
    StopCallback,
    last_checkpoint,
    resume_command,
    stop_on_interrupt,
)

OPTIONS_FILE = "options.yaml"
METRICS_FILE = "metrics.jsonl"
BEFORE_FILE = "before.json"
# options that may differ between the beginning of a run and its continuation: they do not change its numbers
FREE_ON_RESUME = ("output", "resume", "overwrite", "save_every", "keep_checkpoints", "samples", "sample_tokens")
MEMORY_ADVICE = "Lower --batch-size (and raise --grad-accum), lower --max-length, or pass --gradient-checkpointing on"


@dataclass(frozen=True)
class FinetuneResult:
    """What a run left.

    Attributes:
        output: the report's folder.
        adapter: the folder with the adapter in PEFT's format.
        model, tokenizer: the fine-tuned model, ready to generate.
        summary: the content of summary.json.
    """

    output: Path
    adapter: Path
    model: torch.nn.Module
    tokenizer: object
    summary: dict


def finetune(options: FinetuneOptions) -> FinetuneResult:
    """Fine-tunes a model and writes adapter and report into `options.output`.

    The 4-bit base is read from `options.model`; checkpoints hold only the adapter and the training state. A run
    that was interrupted and resumed gives, on a CPU, bit for bit the adapter of one that was not.

    Raises:
        UsageError: for what the user can put right: data, model, targets, memory, options.
        Interrupted: after Ctrl-C, when a checkpoint has been written.
    """
    began = time.perf_counter()
    options.check()
    train_rows, held_out = _load_data(options)
    output = Path(options.output)
    checkpoint = _prepare_output(options, output)
    device = choose_device(see_one_gpu(options.device))
    dtype = choose_dtype(options.dtype, device)
    model, tokenizer = _load_model(options, device, dtype)
    loaded = time.perf_counter()
    if options.chat:
        sampling.check_chat_template(tokenizer)
        train_rows, held_out = data.as_chat(train_rows), held_out and data.as_chat(held_out)
    elif train_rows.format == "messages":
        sampling.check_chat_template(tokenizer)
    sizes = model_sizes(model)

    metrics = MetricsLog(output / METRICS_FILE, int(checkpoint.name.split("-")[1]) if checkpoint else None)
    progress = ProgressBar(metrics, str(device))
    with out_of_memory_as_usage_error(MEMORY_ADVICE), stop_on_interrupt() as stop:
        trainer = _build_trainer(options, model, tokenizer, train_rows, held_out, device, dtype)
        trainer.add_callback(metrics)
        trainer.add_callback(progress)
        trainer.add_callback(StopCallback(stop))
        prompts = sampling.sample_prompts(held_out or train_rows, options.samples)
        if checkpoint is None:
            before = _state_before(options, trainer, model, tokenizer, prompts, output)
        else:
            before = json.loads((output / BEFORE_FILE).read_text())
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            saved = last_checkpoint(output / "checkpoints")
            raise Interrupted(trainer.state.global_step, str(saved), resume_command(output / OPTIONS_FILE))
        trained = time.perf_counter()
        if held_out and not _evaluated_at(metrics, trainer.state.global_step):
            trainer.evaluate()
        # the fused head that TRL put in front of the model's own forward
        model.__dict__.pop("forward", None)
        samples = sampling.greedy_samples(model, tokenizer, [p for p, _ in prompts], options.sample_tokens)

    adapter = output / "adapter"
    save_adapter(model, adapter)
    tokenizer.save_pretrained(adapter)
    summary = report.summarize(
        options=options,
        metrics=metrics,
        sizes=sizes,
        adapter_bytes=folder_bytes(adapter / "adapter_model.safetensors"),
        rows=(train_rows, held_out),
        peak=memory.peak_memory(str(device)),
        seconds={
            "load": loaded - began,
            "train": metrics.seconds,
            "session": trained - loaded,
            "total": time.perf_counter() - began,
        },
        device=device,
        dtype=dtype,
    )
    report.write(
        output, summary, metrics.records, report.pair_samples(tokenizer, prompts, before["samples"], samples)
    )
    return FinetuneResult(output, adapter, model, tokenizer, summary)


def _load_data(options: FinetuneOptions) -> tuple[data.Rows, data.Rows | None]:
    rows = data.load_rows(options.data)
    for name, wanted, formats in (
        ("--chat", options.chat, ("prompt/completion",)),
        ("--assistant-only", options.assistant_only, ("messages",)),
    ):
        if wanted and rows.format not in formats:
            raise OptionError(f"{name} is for {' or '.join(formats)} rows; {options.data} holds `{rows.format}` rows")
    held_out = data.load_rows(options.eval_data) if options.eval_data else data.load_held_out(options.data)
    if held_out is None:
        if options.eval_fraction == 0:
            return rows, None
        return data.split_rows(rows, options.eval_fraction, options.eval_max_rows, options.seed)
    if held_out.format != rows.format:
        raise DataError(
            f"{held_out.source} holds `{held_out.format}` rows and {rows.source} `{rows.format}` rows; "
            "expected the same format"
        )
    if len(held_out) > options.eval_max_rows:
        chosen = sorted(random.Random(options.seed).sample(range(len(held_out)), options.eval_max_rows))
        held_out = data.Rows(held_out.format, [held_out.rows[i] for i in chosen], held_out.source)
    return rows, held_out


def _prepare_output(options: FinetuneOptions, output: Path) -> Path | None:
    """Makes the output folder; returns the checkpoint to resume from, if any."""
    settings = output / OPTIONS_FILE
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output {output} is a file; expected a folder, new or old")
    if options.resume:
        checkpoint = last_checkpoint(output / "checkpoints")
        if checkpoint is None or not settings.is_file():
            raise OptionError(f"--resume: there is no checkpoint in {output}; run without --resume to begin")
        _check_same_run(options, settings)
        return checkpoint
    if settings.exists():
        if not options.overwrite:
            raise OptionError(
                f"{output} already holds a run; pass --resume to continue it, --overwrite to replace it, or "
                "another --output"
            )
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    with as_usage_error(OptionError):
        output.mkdir(parents=True, exist_ok=True)
        settings.write_text(options.to_yaml(), encoding="utf-8")
    return None


def _check_same_run(options: FinetuneOptions, settings: Path) -> None:
    import yaml

    before = yaml.safe_load(settings.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {value!r} and is {getattr(options, name)!r}"
        for name, value in before.items()
        if name not in FREE_ON_RESUME and getattr(options, name) != value
    ]
    if changed:
        raise OptionError(
            f"--resume: the options are not those of the run in {options.output}: {'; '.join(changed)}; "
            f"continue with `{resume_command(settings)}`"
        )


def _load_model(options: FinetuneOptions, device: torch.device, dtype: torch.dtype):
    folder = resolve_model(options.model)
    need = memory.estimate(
        folder,
        compute_bytes=dtype.itemsize,
        r=options.r,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
    )
    memory.check_memory(need, str(device))
    config = QLoRAConfig(
        r=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
    )
    set_seed(options.seed)  # the adapters' first values
    with as_usage_error(), out_of_memory_as_usage_error(f"The model needs {need}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load_quantized(folder, config, device=device, dtype=dtype)
    head = model.get_output_embeddings()
    if isinstance(head, NF4Linear):
        raise UsageError(
            "the output head cannot be quantized or adapted here: the loss is computed from its 16-bit weight; "
            "take it out of --target-modules"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UsageError(f"the tokenizer of {options.model} has neither a padding nor an end token; set one of them")
    return model, tokenizer


def _build_trainer(options, model, tokenizer, train_rows, held_out, device, dtype) -> QLoRATrainer:
    on_gpu = device.type == "cuda"
    checkpointing = options.gradient_checkpointing == "on" or (options.gradient_checkpointing == "auto" and on_gpu)
    settings = {
        "output_dir": str(Path(options.output) / "checkpoints"),
        "seed": options.seed,
        "use_cpu": not on_gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "max_length": options.max_length,
        "packing": options.packing,
        "eval_packing": False,  # so that the held-out loss does not depend on it
        "completion_only_loss": options.completion_only and train_rows.format == "prompt/completion",
        "assistant_only_loss": options.assistant_only,
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
    with warnings.catch_warnings():
        # transformers 5.23 renamed gradient_checkpointing; TRL 1.16 still speaks the old name
        warnings.simplefilter("ignore", FutureWarning)
        arguments = SFTConfig(**settings)
    fused = options.optimizer == "adamw_fused"
    optimizer = {"lr": options.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer |= {"fused": True} if fused else {"foreach": True}
    with as_usage_error():
        trainer = QLoRATrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows.dataset(),
            eval_dataset=held_out.dataset() if held_out else None,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, optimizer),
        )
    trainer.remove_callback(PrinterCallback)  # ProgressBar says it better
    for name, dataset in (("training", trainer.train_dataset), ("held-out", trainer.eval_dataset)):
        if dataset is not None and len(dataset) == 0:
            raise DataError(
                f"no {name} row is left: within --max-length {options.max_length} every prompt fills the whole "
                "sequence; raise it"
            )
    return trainer


def _state_before(options, trainer, model, tokenizer, prompts, output: Path) -> dict:
    """Held-out loss (into the metrics) and samples of the model as it came."""
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    before = {"samples": sampling.greedy_samples(model, tokenizer, [p for p, _ in prompts], options.sample_tokens)}
    (output / BEFORE_FILE).write_text(json.dumps(before, ensure_ascii=False) + "\n", encoding="utf-8")
    return before


def _evaluated_at(metrics: MetricsLog, step: int) -> bool:
    return any(record["step"] == step and "eval_loss" in record for record in metrics.records)
