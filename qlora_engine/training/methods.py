"""Methods besides LoRA in a run: their settings from the options, and what training does for them."""

import dataclasses
import difflib
import itertools
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from qlora_engine import peft
from qlora_engine.training.checkpoints import step_of
from qlora_engine.training.errors import OptionError, as_usage_error
from qlora_engine.training.options import LORA, FinetuneOptions, flag

STATE_FILE = "method_state.safetensors"  # of a checkpoint: what training needs and the adapter's own file leaves out
PROGRESS = "progress:"  # before the names of `Method.progress` in that file
SAMPLES = 256  # rows from which a method chooses what it trains


def method_config(options: FinetuneOptions) -> peft.MethodConfig | None:
    """Settings of the method that `--method` and `--method-options` name; None for LoRA, which `prepare` installs.

    Raises:
        OptionError: for a method or a setting that there is not, or a value that it refuses.
    """
    if options.method == LORA:
        if options.method_options:
            raise OptionError(f"{flag('method_options')} is for other methods; LoRA's settings are --r, --alpha, ...")
        return None
    if options.method not in peft.METHODS:
        raise OptionError(f"{flag('method')} is {options.method!r}; {_near(options.method, sorted(peft.METHODS))}")
    kind = peft.METHODS[options.method].config_class
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    settings = {}
    for item in options.method_options:
        name, equals, value = item.partition("=")
        if not equals:
            raise OptionError(f"{flag('method_options')}: {item!r} is not name=value")
        if name not in known:
            raise OptionError(f"{flag('method_options')}: {options.method} has no {name!r}; {_near(name, known)}")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"{flag('method_options')}: {item!r} is not valid YAML behind the =") from error
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{flag('method_options')}: {options.method}: {error}") from error


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def apply_method(model: torch.nn.Module, config: peft.MethodConfig | None) -> None:
    """Puts the method on a model.

    Raises:
        UsageError: where the model cannot carry it; the method's sentence is kept.
    """
    if config is not None:
        with as_usage_error():
            peft.apply(model, config)


def method_of(model: torch.nn.Module) -> peft.Method | None:
    """The method that `apply_method` put on a model."""
    return next(iter(peft.applied(model)), None)


def choose(trainer) -> None:
    """Lets a method that chooses what it trains choose, by the first rows of the training data."""
    method = method_of(trainer.model)
    if hasattr(method, "select"):
        rows = trainer.get_train_dataloader()
        batches = itertools.islice(rows, -(-SAMPLES // trainer.args.per_device_train_batch_size))
        with as_usage_error():
            batches = [trainer.objective.as_model_inputs(batch) for batch in batches]
            method.select([{name: t.to(trainer.args.device) for name, t in batch.items()} for batch in batches])


def save_checkpoint(method: peft.Method, folder: str | Path) -> None:
    """Writes the method's own file, and beside it all that it holds."""
    method.save(folder)
    gathered = {f"{PROGRESS}{name}": t.detach().cpu().contiguous() for name, t in method.progress().items()}
    save_file(method.state_dict() | gathered, Path(folder) / STATE_FILE)


def load_checkpoint(method: peft.Method, folder: str | Path) -> None:
    """Reads what `save_checkpoint` wrote into a method that is on its model."""
    found = load_file(Path(folder) / STATE_FILE)
    gathered = {name.removeprefix(PROGRESS): found.pop(name) for name in list(found) if name.startswith(PROGRESS)}
    method.load_state_dict(found)
    method.resume(step_of(Path(folder)), gathered)


class MethodSteps(TrainerCallback):
    """What a method does before the first optimizer step and after each."""

    def __init__(self, method: peft.Method):
        self.method = method

    def on_train_begin(self, args, state, control, **kwargs):
        with as_usage_error():
            self.method.plan(state.max_steps)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.method.after_step(state.global_step + 1)
