"""The options of `qlora finetune`: one dataclass from which the flags and the YAML keys are both derived."""

# ruff: noqa: RUF009  -- option() returns a dataclasses.field

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from qlora_engine.training.errors import OptionError


def option(default, help: str, *, choices: tuple[str, ...] = (), minimum=None, above=None, maximum=None):
    """A dataclass field that knows its help text, its choices and its bounds."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


LORA = "lora"  # the method that `--r` and its like belong to
LM, DPO = "lm", "dpo"  # objectives
PREFERENCE_OPTIONS = ("beta", "loss_type", "label_smoothing", "sft_weight")


@dataclass
class FinetuneOptions:
    """Everything that decides a fine-tuning run.

    Raises:
        OptionError: from `check`, for a value of the wrong type or out of bounds.
    """

    model: str = option("", "model: a folder, a hub id, or a GGUF file")
    data: str = option("", "training data: .jsonl, .csv, .parquet, or a saved `datasets` folder")
    output: str = option("qlora-out", "folder for the adapter, checkpoints and the report")
    eval_data: str | None = option(None, "held-out data; without it, part of the training data is held out")
    eval_fraction: float = option(
        0.05, "part of the data held out when there is no --eval-data", minimum=0, maximum=0.5
    )
    eval_max_rows: int = option(256, "at most so many held-out rows", minimum=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto", "compute dtype (auto: bf16 on a GPU, fp32 on a CPU)", choices=("auto", "fp32", "bf16", "fp16")
    )
    # objective
    objective: str = option(
        LM, "lm: the next token; dpo: the preferred of two answers: docs/preferences.md", choices=(LM, DPO)
    )
    beta: float = option(0.1, "dpo: how strongly the model is held to the base it came from", above=0)
    loss_type: str = option("sigmoid", "dpo: that of DPO, or of IPO", choices=("sigmoid", "ipo"))
    label_smoothing: float = option(
        0.0, "dpo: probability that a pair is the wrong way around", minimum=0, maximum=0.49
    )
    sft_weight: float = option(0.0, "dpo: weight of the chosen answer's next-token loss, which is added", minimum=0)
    # adapter
    method: str = option(LORA, "lora, or another method: docs/methods.md")
    method_options: list[str] = option([], "settings of another method than lora, as name=value: docs/methods.md")
    r: int = option(16, "rank of the adapters", minimum=1)
    alpha: float = option(16.0, "scaling numerator: the update is alpha / r * B A", above=0)
    dropout: float = option(0.0, "dropout on the adapters' input", minimum=0, maximum=0.99)
    rslora: bool = option(False, "scale by alpha / sqrt(r)")
    target_modules: list[str] = option(
        ["all-linear"], "names, suffixes or regular expressions of the layers to adapt"
    )
    exclude_modules: list[str] = option([], "layers not to adapt")
    # base
    blocksize: int = option(64, "elements that share one scale: 32 to 4096, a power of two", minimum=32, maximum=4096)
    double_quant: bool = option(True, "quantize the scales as well")
    scales: str = option(
        "absmax",
        "how scales are found: search leaves a lower error; signed a lower one still, with --no-double-quant",
        choices=("absmax", "search", "signed"),
    )
    quantize_embeddings: bool = option(False, "store the input embeddings in 4 bits as well")
    quantize_head: bool = option(False, "store the output head in 4 bits as well")
    # data
    max_length: int = option(1024, "tokens a sequence is cut to", minimum=8)
    packing: bool = option(False, "put several examples in one sequence (they do not see each other)")
    chat: bool = option(False, "wrap rows of a prompt and answers in the model's chat template")
    completion_only: bool = option(True, "prompt/completion rows: loss on the completion alone")
    assistant_only: bool = option(False, "messages rows: loss on the assistant's turns alone")
    # training
    epochs: float = option(1.0, "passes over the data", above=0)
    max_steps: int = option(0, "optimizer steps; 0: as many as the epochs need", minimum=0)
    batch_size: int = option(8, "sequences a forward pass; dpo: pairs of them", minimum=1)
    grad_accum: int = option(1, "forward passes an optimizer step", minimum=1)
    learning_rate: float = option(2e-4, "peak learning rate", above=0)
    lr_schedule: str = option("linear", "learning rate after the warm-up", choices=("linear", "cosine", "constant"))
    warmup_steps: int = option(0, "steps of linear warm-up", minimum=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", minimum=0)
    optimizer: str = option(
        "paged_adamw",
        "PagedAdamW with 32-bit or 8-bit state, or torch's AdamW",
        choices=("paged_adamw", "paged_adamw_8bit", "adamw_fused", "adamw_foreach"),
    )
    optimizer_gpu_gib: float | None = option(
        None,
        "GiB of the paged optimizer's state on the GPU, the rest in host memory; without it: all",
        minimum=0,
    )
    lora_plus: float = option(1.0, "learning rate of the B factors over that of the rest (LoRA+)", above=0)
    gradient_checkpointing: str = option(
        "auto",
        "layers recomputed in backward: selective (all but the last, or as many as --activation-gib takes), full or "
        "on, none or off (auto: selective on a GPU, else none)",
        choices=("auto", "selective", "full", "none", "on", "off"),
    )
    activation_gib: float | None = option(
        None, "GiB that the layers' activations may take; as few layers as possible are recomputed", above=0
    )
    offload_activations: bool = option(False, "let the inputs of recomputed layers wait in host memory")
    liger: str = option(
        "auto",
        "liger-kernel's RMSNorm and rotary embeddings (auto: where it is installed)",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: bool = option(
        False, "run forward and backward as CUDA graphs: faster for small batches; pads to at most four lengths"
    )
    seed: int = option(0, "seed of the adapters, the split, the order and the dropout", minimum=0)
    sharding: str = option(
        "auto",
        "several processes: none replicates the model (DDP), full shards it (FSDP2); auto: full where accelerate "
        "launch was told to use FSDP, else none",
        choices=("auto", "none", "full"),
    )
    # progress
    eval_every: int = option(0, "steps between evaluations; 0: four a run", minimum=0)
    save_every: int = option(0, "steps between checkpoints; 0: at the end and on interruption", minimum=0)
    keep_checkpoints: int = option(2, "checkpoints kept", minimum=1)
    samples: int = option(4, "held-out prompts generated before and after", minimum=0)
    sample_tokens: int = option(40, "tokens a sample at most", minimum=1)
    resume: bool = option(False, "continue the run in --output from its last checkpoint")
    overwrite: bool = option(False, "replace the run in --output")

    def check(self) -> "FinetuneOptions":
        """Raises OptionError if a value has the wrong type or is out of its bounds; returns self."""
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _checked(spec, getattr(self, spec.name)))
        for name in ("model", "data"):
            if not getattr(self, name):
                raise OptionError(f"no {name} was given; pass {flag(name)} or write `{name}:` in the YAML file")
        if self.blocksize & (self.blocksize - 1):
            raise OptionError(f"{flag('blocksize')} is {self.blocksize}; expected a power of two from 32 to 4096")
        if self.scales == "signed" and self.double_quant:
            raise OptionError("--scales signed cannot be double-quantized; pass --no-double-quant too, or search")
        if self.optimizer_gpu_gib is not None and not self.optimizer.startswith("paged"):
            raise OptionError(
                f"{flag('optimizer_gpu_gib')} was given with --optimizer {self.optimizer}, whose state does not "
                "leave the GPU; choose paged_adamw or paged_adamw_8bit"
            )
        if self.activation_gib is not None and self.gradient_checkpointing not in ("auto", "selective"):
            raise OptionError(
                f"--activation-gib chooses how many layers are recomputed; --gradient-checkpointing "
                f"{self.gradient_checkpointing} does so too. Leave one of them out"
            )
        if self.cuda_graphs and (self.packing or self.offload_activations):
            other = "--packing" if self.packing else "--offload-activations"
            raise OptionError(f"--cuda-graphs cannot capture what {other} does; leave one of them out")
        self._check_objective()
        if self.resume and self.overwrite:
            raise OptionError("--resume and --overwrite contradict each other; pass one of them")
        return self

    def _check_objective(self) -> None:
        if self.objective == LM:
            for spec in dataclasses.fields(self):
                if spec.name in PREFERENCE_OPTIONS and getattr(self, spec.name) != spec.default:
                    raise OptionError(f"{flag(spec.name)} is for {flag('objective')} {DPO}, which was not asked for")
            return
        for name, given, why in (
            ("--packing", self.packing, "a pair of sequences stays one"),
            ("--assistant-only", self.assistant_only, "the loss is on the answers anyway"),
            ("--no-completion-only", not self.completion_only, "the loss is on the answers alone"),
            ("--cuda-graphs", self.cuda_graphs, "the loss of pairs is not captured"),
        ):
            if given:
                raise OptionError(f"{name} does not go with --objective {DPO}: {why}; leave it out")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise OptionError("--label-smoothing is for --loss-type sigmoid; leave one of them out")

    @property
    def sequences(self) -> int:
        """Sequences of a forward pass."""
        return self.batch_size * (2 if self.objective == DPO else 1)

    def to_yaml(self) -> str:
        """The options as the YAML file that `--config` reads; `resume` and `overwrite` are not part of a run."""
        import yaml

        values = dataclasses.asdict(self)
        del values["resume"], values["overwrite"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Adds one flag for each option, or for those of `names`; one not given leaves nothing in the namespace."""
    for spec in dataclasses.fields(FinetuneOptions):
        if names is not None and spec.name not in names:
            continue
        kind, many, _ = _kind(spec)
        shown = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
        shown = " ".join(shown) if many else shown
        text = spec.metadata["help"].replace("%", "%%")
        if shown not in (None, "", []):
            text += f" (default: {shown})"
        settings = {"dest": spec.name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = kind
            settings["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
            if many:
                settings["nargs"] = "+"
            if spec.metadata["choices"]:
                settings["choices"] = spec.metadata["choices"]
                del settings["metavar"]
        parser.add_argument(flag(spec.name), **settings)


def read_yaml(path: str | Path) -> dict:
    """The options in a YAML file, by name.

    Raises:
        OptionError: the file does not exist, is not a YAML mapping, or holds an unknown key.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise OptionError(f"the configuration file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{path} holds a {type(values).__name__}; expected `name: value` lines")
    names = [spec.name for spec in dataclasses.fields(FinetuneOptions)]
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean `{near[0]}`?" if near else "see `qlora finetune --help` for the names"
            raise OptionError(f"{path} has an unknown key `{key}`; {advice}")
        found[name] = value
    return found


def build_options(flags: dict, config: str | Path | None = None) -> FinetuneOptions:
    """The options of a run: defaults, then the YAML file, then the flags.

    Args:
        flags: option name -> value, only those that were given.
        config: YAML file, or None.

    Raises:
        OptionError: see `read_yaml` and `FinetuneOptions.check`.
    """
    values = read_yaml(config) if config else {}
    values.update(flags)
    return FinetuneOptions(**values).check()


def _kind(spec: dataclasses.Field) -> tuple[type, bool, bool]:
    """(type of one value, is it a list, may it be None)"""
    annotation, optional = spec.type, False
    if isinstance(annotation, types.UnionType):
        annotation, optional = typing.get_args(annotation)[0], True
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True, optional
    return annotation, False, optional


def _checked(spec: dataclasses.Field, value):
    kind, many, optional = _kind(spec)
    if value is None and optional:
        return None
    name = f"{flag(spec.name)} (`{spec.name}`)"
    if many:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise OptionError(f"{name} is {value!r}; expected a list of names")
        return list(items)
    value = _converted(kind, value, name)
    bounds = spec.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        raise OptionError(f"{name} is {value!r}; expected one of {', '.join(bounds['choices'])}")
    for limit, bad, words in (
        (bounds["minimum"], lambda limit: value < limit, "at least"),
        (bounds["above"], lambda limit: value <= limit, "more than"),
        (bounds["maximum"], lambda limit: value > limit, "at most"),
    ):
        if limit is not None and bad(limit):
            raise OptionError(f"{name} is {value}; expected {words} {limit}")
    return value


def _converted(kind: type, value, name: str):
    if kind is float:
        # YAML 1.1 reads 1e-4, without a dot, as text
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise OptionError(f"{name} is {value!r}; expected a number") from None
        if isinstance(value, int | float) and not isinstance(value, bool):
            if value != value or value in (float("inf"), float("-inf")):
                raise OptionError(f"{name} is {value}; expected a finite number")
            return float(value)
    elif isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return value
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    raise OptionError(f"{name} is {value!r}; expected {words[kind]}")


def recomputation_policy(options: FinetuneOptions, on_gpu: bool) -> str:
    """The policy of `activations.recompute_layers` that `--gradient-checkpointing` means."""
    if options.gradient_checkpointing == "auto":
        return "selective" if on_gpu or options.activation_gib is not None else "none"
    return {"on": "full", "off": "none"}.get(options.gradient_checkpointing, options.gradient_checkpointing)
