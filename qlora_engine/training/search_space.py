"""What `qlora search` varies: texts such as `r=4,8,16` and `learning_rate=1e-4..1e-2`, and the points they span."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_engine import peft
from qlora_engine.training.errors import OptionError
from qlora_engine.training.options import LORA, FinetuneOptions, flag

# options that neither the base nor the data depend on, so that all trials share both
SEARCHED = (
    "method",
    "r",
    "alpha",
    "dropout",
    "rslora",
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "lora_plus",
)
OF_METHOD = ("r", "alpha", "dropout", "rslora")  # settings of a method, where it has one of that name
DEFAULT_SPACE = ("r=4,8,16,32", "alpha=8,16,32", "learning_rate=1e-4..3e-3")
_NAMES = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values of one option, from which a trial takes one."""

    values: tuple[Any, ...]

    def suggest(self, trial, name: str) -> Any:
        """Asks an optuna trial for a value."""
        return trial.suggest_categorical(name, self.values)

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included; equal factors are equally likely where both are positive."""

    low: float
    high: float

    def suggest(self, trial, name: str) -> Any:
        """Asks an optuna trial for a value."""
        log = self.low > 0
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, self.high, log=log)
        return trial.suggest_float(name, self.low, self.high, log=log)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


Space = dict[str, Choice | Range]


def parse_space(items: Sequence[str], options: FinetuneOptions) -> Space:
    """The space that texts describe.

    Args:
        items: `name=a,b,c` for a choice, `name=low..high` for a range.
        options: the options of every trial but for what is searched; each value must be one that they could have.

    Raises:
        OptionError: for a name that cannot be searched, or a value that the option refuses.
    """
    space: Space = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not text:
            raise OptionError(f"--space: {item!r} is not name=a,b,c or name=low..high")
        if name not in SEARCHED:
            raise OptionError(f"--space: {name!r} cannot be searched; expected one of {', '.join(SEARCHED)}")
        if name in space:
            raise OptionError(f"--space: {name} is there twice")
        low, dots, high = text.partition("..")
        try:
            if dots:
                space[name] = _range(name, low, high, options)
            else:
                values = [_value(name, part.strip(), options) for part in text.split(",")]
                space[name] = Choice(tuple(dict.fromkeys(values)))
        except OptionError as error:
            raise OptionError(f"--space: {item}: {error}") from None
    return space


def _range(name: str, low: str, high: str, options: FinetuneOptions) -> Range:
    found = Range(_value(name, low.strip(), options), _value(name, high.strip(), options))
    if isinstance(found.low, bool) or not isinstance(found.low, int | float):
        raise OptionError(f"{name} has no range; list its values with commas")
    if found.low >= found.high:
        raise OptionError(f"the range must rise; {found.low} is not below {found.high}")
    return found


def _value(name: str, text: str, options: FinetuneOptions) -> Any:
    """A value of an option as its own type, checked as if it had been given."""
    kind = FinetuneOptions.__dataclass_fields__[name].type
    try:
        value = _NAMES.get(text.lower(), text) if kind is bool else kind(text)
    except ValueError:
        raise OptionError(f"{flag(name)} is {text!r}; expected a {'whole ' if kind is int else ''}number") from None
    found = getattr(dataclasses.replace(options, **{name: value}).check(), name)
    if name == "method" and found != LORA and found not in peft.METHODS:
        raise OptionError(f"{found!r} is not a method; known are {', '.join(sorted(peft.METHODS))}")
    return found


def settings_of(method: str) -> set[str]:
    """Those of `OF_METHOD` that a method has."""
    return set(OF_METHOD) & {field.name for field in dataclasses.fields(peft.METHODS[method].config_class)}


def names_for(space: Space, method: str) -> list[str]:
    """What of the space has a meaning for a method, the method first."""
    own = settings_of(method)
    left_out = {name for name in OF_METHOD if name not in own} | (set() if method == LORA else {"lora_plus"})
    return sorted((name for name in space if name not in left_out), key=lambda name: name != "method")


def suggest(trial, space: Space, method: str) -> dict[str, Any]:
    """A point of the space for an optuna trial; `method` is that of all trials where it is not searched."""
    point = {}
    if "method" in space:
        point["method"] = method = space["method"].suggest(trial, "method")
    for name in names_for(space, method):
        if name != "method":
            point[name] = space[name].suggest(trial, name)
    return point


def grid(space: Space, method: str) -> list[dict[str, Any]]:
    """All points of a space of choices, each once: what a method does not have is not varied for it.

    Raises:
        OptionError: where there is a range.
    """
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if ranges:
        raise OptionError(
            f"--strategy grid needs values, and {', '.join(ranges)} is a range; list values, as in {ranges[0]}=1,2,4"
        )
    points = []
    for each in space["method"].values if "method" in space else (method,):
        names = [name for name in names_for(space, each) if name != "method"]
        for values in itertools.product(*(space[name].values for name in names)):
            points.append(({"method": each} if "method" in space else {}) | dict(zip(names, values, strict=True)))
    return points


def options_at(options: FinetuneOptions, point: Mapping[str, Any]) -> FinetuneOptions:
    """The options of a run at a point of the space, as `qlora finetune` takes them.

    A method other than LoRA gets r, alpha and the like as `method_options`, in the place of those of that name.
    """
    found = dataclasses.replace(options, **{k: v for k, v in point.items() if k not in OF_METHOD})
    own = {name: value for name, value in point.items() if name in OF_METHOD}
    if found.method == LORA:
        return dataclasses.replace(found, method_options=[], **own)
    same = found.method == options.method  # the options that were given are for that one
    given = [item for item in options.method_options if same and item.partition("=")[0] not in own]
    return dataclasses.replace(found, method_options=given + [f"{name}={value}" for name, value in own.items()])
