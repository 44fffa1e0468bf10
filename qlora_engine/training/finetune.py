"""The recipe of `qlora finetune`: data, model, training, evaluation, report."""

import contextlib
import dataclasses
import functools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_engine.models.files import atomic_write
from qlora_engine.training import checkpoints, data, memory, parallel
from qlora_engine.training.device import choose_device, choose_dtype, see_one_gpu
from qlora_engine.training.errors import DataError, Interrupted, OptionError, out_of_memory_as_usage_error
from qlora_engine.training.options import DPO, LORA, FinetuneOptions
from qlora_engine.training.source import resolve_model

MEMORY_ADVICE = "Lower --batch-size (and raise --grad-accum) or --max-length; or pass --gradient-checkpointing full"


def memory_advice(options: FinetuneOptions, folder: Path, device: torch.device) -> str:
    """What to do about a run that ran out of memory: on a GPU, by the estimator."""
    if device.type != "cuda" or options.method != LORA:
        return MEMORY_ADVICE
    from qlora_engine.training import estimator

    gpu = torch.cuda.get_device_properties(device).total_memory
    return estimator.advice(dataclasses.replace(options, model=str(folder)), gpu)


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
    that was interrupted and resumed gives, on a CPU, bit for bit the adapter of one that was not. In several
    processes (torchrun, accelerate launch) each gets `batch_size` sequences of a step, and the first writes files.

    Raises:
        UsageError: for what the user can put right: data, model, targets, memory, options.
        Interrupted: after Ctrl-C, when a checkpoint has been written.
    """
    began = time.perf_counter()
    # everything that can be wrong with the input shows before the slow part: TRL's import and the model
    options.check()
    train_rows, held_out = load_data(options)
    ranks = parallel.find_ranks(options)
    checkpoint = checkpoints.checkpoint_to_resume(options, ranks.size)
    device = choose_device(ranks.device_name(options.device) if ranks.size > 1 else see_one_gpu(options.device))
    dtype = choose_dtype(options.dtype, device)
    folder = resolve_model(options.model)
    need = memory.estimate(
        folder,
        compute_bytes=dtype.itemsize,
        r=options.r,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
        quantize_embeddings=options.quantize_embeddings,
        quantize_head=options.quantize_head,
    )
    memory.check_memory(need, str(device))

    from qlora_engine import peft
    from qlora_engine.models.adapter import save_adapter
    from qlora_engine.training import methods, report, sampling, trainer
    from qlora_engine.training.recipe import build_trainer, load_model
    from qlora_engine.training.sizes import model_sizes

    methods.method_config(options)  # a mistake in it shows before the model is read
    with out_of_memory_as_usage_error(f"The model needs {need}"):
        model, tokenizer = load_model(options, folder, device, dtype, ranks.first)
    loaded = time.perf_counter()
    if options.chat or train_rows.format in data.CONVERSATIONS:
        sampling.check_chat_template(tokenizer)
    if options.chat:
        train_rows, held_out = data.as_chat(train_rows), held_out and data.as_chat(held_out)
    sizes = model_sizes(model)
    output = Path(options.output)
    if checkpoint is None and ranks.first:
        checkpoints.begin_run(options)
    metrics = trainer.MetricsLog(
        output / checkpoints.METRICS_FILE, checkpoints.step_of(checkpoint) if checkpoint else None, ranks.first
    )
    advice = functools.partial(memory_advice, options, folder, device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(out_of_memory_as_usage_error(advice))
        loop = build_trainer(options, model, tokenizer, train_rows, held_out, device, dtype, ranks)
        stop = stack.enter_context(trainer.stop_on_interrupt())  # from here on there is a step to stop after
        stack.enter_context(parallel.end_with_peers(ranks, _resume_advice(output)))
        bar = (trainer.ProgressBar(metrics, str(device)),) if ranks.first else ()
        for callback in (metrics, *bar, trainer.StopCallback(stop, ranks)):
            loop.add_callback(callback)
        if checkpoint is None:
            methods.choose(loop)
        prompts = sampling.sample_prompts(held_out or train_rows, options.samples)

        def samples() -> list[str]:
            return sampling.greedy_samples(model, tokenizer, [prompt for prompt, _ in prompts], options.sample_tokens)

        if checkpoint is None:
            before = _state_before(loop, samples, output / checkpoints.BEFORE_FILE, ranks)
        else:
            before = json.loads((output / checkpoints.BEFORE_FILE).read_text(encoding="utf-8"))
        loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done = loop.state.global_step
        if done < loop.state.max_steps:
            saved = checkpoints.last_checkpoint(output)
            raise Interrupted(done, str(saved), checkpoints.resume_command(output))
        trained = time.perf_counter()
        changed = loop.method is not None and type(loop.method).finish is not peft.Method.finish
        if changed:
            loop.method.finish()
        if held_out and (changed or not _evaluated_at(metrics, done)):
            loop.evaluate()
        # TRL put its fused head in front of the model's own forward
        model.__dict__.pop("forward", None)
        after = samples()
        adapter = output / checkpoints.ADAPTER
        if loop.method is not None and ranks.first:
            loop.method.save(adapter)
        elif loop.method is None and (ranks.first or ranks.sharded):
            save_adapter(model, adapter)
        ranks.barrier()

    if ranks.first:
        tokenizer.save_pretrained(adapter)
    summary = report.summarize(
        options=options,
        metrics=metrics,
        sizes=sizes,
        method=loop.method,
        adapter_bytes=(adapter / "adapter_model.safetensors").stat().st_size,
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
    if ranks.first:
        report.write(output, summary, metrics.records, report.pair_samples(prompts, before["samples"], after))
    return FinetuneResult(output, adapter, model, tokenizer, summary)


def load_data(options: FinetuneOptions) -> tuple[data.Rows, data.Rows | None]:
    """(training rows, held-out rows) that the options name or split off; None where none are held out.

    Raises:
        OptionError: where an option is for rows of another format.
        DataError: where the data cannot be read.
    """
    preferences = options.objective == DPO
    rows = data.load_rows(options.data, preferences)
    for name, wanted, formats in (
        ("--chat", options.chat, ("prompt/completion", data.PREFERENCE)),
        ("--assistant-only", options.assistant_only, ("messages",)),
    ):
        if wanted and rows.format not in formats:
            raise OptionError(f"{name} is for {' or '.join(formats)} rows; {options.data} holds `{rows.format}` rows")
    if options.eval_data:
        held_out = data.load_rows(options.eval_data, preferences)
    else:
        held_out = data.load_held_out(options.data, preferences)
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


def _resume_advice(output: Path) -> str:
    """What to do where the run ends before its time."""
    return f"Continue from the last checkpoint, if there is one yet, with: {checkpoints.resume_command(output)}"


def _state_before(loop, samples, file: Path, ranks: parallel.Ranks) -> dict:
    """Held-out loss (into the metrics) and samples of the model as it came; kept in `file` for a resumed run."""
    if loop.eval_dataset is not None:
        loop.evaluate()
    before = {"samples": samples(), "ranks": ranks.size}
    if ranks.first:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(before, ensure_ascii=False) + "\n", encoding="utf-8")
    return before


def _evaluated_at(metrics, step: int) -> bool:
    return any(record["step"] == step and "eval_loss" in record for record in metrics.records)
