"""Where a run keeps its state, and how it is found again."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

from qlora_engine.models.files import atomic_write
from qlora_engine.training.errors import OptionError, as_usage_error
from qlora_engine.training.options import FinetuneOptions

OPTIONS_FILE = "options.yaml"
METRICS_FILE = "metrics.jsonl"
BEFORE_FILE = "before.json"
CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
STATE_FILE = "trainer_state.json"
# options that may differ between the beginning of a run and its continuation: they do not change its numbers
FREE_ON_RESUME = ("output", "save_every", "keep_checkpoints", "samples", "sample_tokens", "sharding")
BATCH = ("batch_size", "grad_accum")  # with the number of processes they make the sequences of a step


def last_checkpoint(output: Path) -> Path | None:
    """The latest complete checkpoint of a run; one without the state, which is written last, was cut short."""
    found = []
    for path in (output / CHECKPOINTS).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and _is_json(path / STATE_FILE):
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(options: FinetuneOptions, ranks: int = 1) -> Path | None:
    """The checkpoint that a run begins from; None for a new run. Nothing is written.

    Args:
        options: the run's.
        ranks: number of its processes; another number than before goes on with as many sequences a step.

    Raises:
        OptionError: where --resume finds no checkpoint or other options, or a run would be overwritten unasked.
    """
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output {output} is a file; expected a folder, new or old")
    checkpoint = last_checkpoint(output)
    if options.resume:
        if checkpoint is None or not (output / OPTIONS_FILE).is_file():
            raise OptionError(f"--resume: there is no checkpoint in {output}; run without --resume to begin")
        _check_same_run(options, output / OPTIONS_FILE, ranks)
        return checkpoint
    if not options.overwrite and (checkpoint or (output / ADAPTER).exists()):
        raise OptionError(
            f"{output} already holds a run; pass --resume to continue it, --overwrite to replace it, or "
            "another --output"
        )
    return None


def begin_run(options: FinetuneOptions) -> None:
    """Makes the output folder of a new run, without what an earlier run left in it.

    Raises:
        OptionError: where the folder cannot be written.
    """
    output = Path(options.output)
    with as_usage_error(OptionError):
        output.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINTS, ADAPTER):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (METRICS_FILE, BEFORE_FILE, "summary.json"):
            (output / name).unlink(missing_ok=True)
        with atomic_write(output / OPTIONS_FILE) as temporary:
            temporary.write_text(options.to_yaml(), encoding="utf-8")


def resume_command(output: Path) -> str:
    """The shell command that continues the run in a folder."""
    return f"qlora finetune --config {shlex.quote(os.fspath(output / OPTIONS_FILE))} --resume"


def _check_same_run(options: FinetuneOptions, settings: Path, ranks: int) -> None:
    import yaml

    before = yaml.safe_load(settings.read_text(encoding="utf-8"))
    ranks_before = json.loads((settings.parent / BEFORE_FILE).read_text(encoding="utf-8")).get("ranks", 1)
    free = FREE_ON_RESUME
    if ranks != ranks_before:
        was, now = (f"{b} x {a} x {n} processes" for b, a, n in _batches(before, ranks_before, options, ranks))
        if len({b * a * n for b, a, n in _batches(before, ranks_before, options, ranks)}) > 1:
            raise OptionError(
                f"--resume: a step had {was} sequences and has {now}; change --batch-size or --grad-accum so that "
                "there are as many"
            )
        free = (*free, *BATCH)
    changed = [
        f"{name} was {value!r} and is {getattr(options, name)!r}"
        for name, value in before.items()
        if name not in free and getattr(options, name, None) != value
    ]
    if changed:
        raise OptionError(
            f"--resume: the options are not those of the run in {options.output}: {'; '.join(changed)}; "
            f"continue with `{resume_command(settings.parent)}`"
        )


def _batches(before: dict, ranks_before: int, options: FinetuneOptions, ranks: int) -> list[tuple[int, int, int]]:
    """Batch size, accumulation and processes of the run before, and now."""
    return [(*(before[name] for name in BATCH), ranks_before), (*(getattr(options, name) for name in BATCH), ranks)]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
