"""The protocol that every parameter-efficient method keeps, and the registry of methods."""

import abc
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.models.files import atomic_files
from qlora_engine.models.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from qlora_engine.nn import NF4Linear

OWN_FORMAT = "QLORA_ENGINE"  # peft_type in the files of methods that PEFT does not have
METHOD_KEY = "qlora_engine_method"  # in PEFT's configuration, where one peft_type is that of several methods
_ATTRIBUTE = "_qlora_methods"


class MethodError(ValueError):
    """A method a model cannot carry, a wrong target or size, or a file that does not fit; nothing has changed."""


@dataclasses.dataclass
class MethodConfig:
    """Settings of a method; one subclass a method.

    Attributes:
        name: the method's name in the registry.
    """

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The settings as a file has them: what the class is made with."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class MethodReport:
    """What a method trains and stores.

    Attributes:
        method: its name.
        trainable: numbers that are trained.
        total: parameters of the model without the method; a 4-bit weight counts its elements.
        saved_bytes: bytes of the tensors in its file.
        notes: what else the method has to say, such as the share that was pruned.
    """

    method: str
    trainable: int
    total: int
    saved_bytes: int
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        notes = "".join(f", {key} {value}" for key, value in self.notes.items())
        share = self.trainable / max(self.total, 1)
        return f"{self.method}: {self.trainable:,} of {self.total:,} parameters are trained ({share:.3%}){notes}"


class Method(abc.ABC):
    """A method on a model: made by `apply` or `load`, undone by `remove`.

    A subclass writes `_install`, `_uninstall`, `_switch` and `tensors`, and where they have a meaning `merge`,
    `to_peft`, `from_peft` and `notes`. Its parameters must be part of the model (a submodule or a parameter of one),
    so that `model.to`, `model.parameters` and optimizers reach them. It changes models through hooks, module
    replacement and the models' own interfaces alone.

    Attributes:
        model: what the method was applied to; changed in place.
        config: its settings.
        enabled: whether it takes part in the model's forward pass.
    """

    config_class: ClassVar[type[MethodConfig]]
    peft_type: ClassVar[str | None] = None  # PEFT's name, where PEFT has the method

    def __init__(self, model: nn.Module, config: MethodConfig):
        self.model, self.config, self.enabled = model, config, True
        self._required_grad: dict[str, bool] = {}
        self._restored: dict[str, torch.Tensor] | None = None  # while `load` or `reapply` install: what comes next

    @property
    def name(self) -> str:
        """The method's name in the registry."""
        return self.config.name

    # What a method writes

    @abc.abstractmethod
    def _install(self) -> None:
        """Adds the method to the model, its parameters requiring gradients; all others are frozen already.

        Raises:
            MethodError: before anything is changed, where the model cannot carry it.
        """

    @abc.abstractmethod
    def _uninstall(self) -> None:
        """Takes away what `_install` added; base weights are the bits they were."""

    @abc.abstractmethod
    def _switch(self, enabled: bool) -> None:
        """Makes the model's forward pass with the method, or as if it were not there."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file must hold for the method to be loaded: names and tensors, which alias what is used."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that an optimizer should have, by name. Default: those of `tensors`."""
        return {name: t for name, t in self.tensors().items() if isinstance(t, nn.Parameter) and t.requires_grad}

    def merge(self) -> nn.Module:
        """Puts what was learnt into the base weights and removes the method; returns the model.

        Raises:
            MethodError: where that has no meaning for the method.
        """
        raise MethodError(f"{self.name} cannot be merged: what it learnt is not a change of the base weights")

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """`adapter_config.json` and the tensors as PEFT reads them; None where PEFT has no such method or form."""
        return None

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        """Whether `from_peft` is for a file with this `adapter_config.json`."""
        name = cls.config_class.name
        kind = config["peft_type"]
        return kind is not None and kind == cls.peft_type and config.get(METHOD_KEY, name) == name

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        """The inverse of `to_peft`.

        Raises:
            MethodError: where the file asks for what the method does not do.
        """
        raise MethodError(f"{cls.config_class.name} adapters of PEFT cannot be loaded here")

    def folded(self) -> tuple[MethodConfig, dict[str, torch.Tensor]]:
        """Settings and tensors of its file, without what only training needs. Default: its own."""
        return self.config, self.tensors()

    def parameter_groups(self, lr: float, **options) -> list[dict[str, Any]]:
        """Groups for an optimizer; one, unless the method wants several learning rates."""
        ordered = [param for _, param in sorted(self.trainable_parameters().items())]  # the same in a resumed run
        return [{"params": ordered, "lr": lr, **options}]

    def plan(self, steps: int) -> None:  # noqa: B027 - most methods do nothing here
        """Called before the first step, also of a resumed training: how many optimizer steps there are in all.

        Raises:
            MethodError: where the settings do not fit so many.
        """

    def penalty(self) -> torch.Tensor | None:
        """A term that training should add to the loss; None for most methods."""
        return None

    def after_step(self, step: int) -> None:  # noqa: B027 - most methods do nothing here
        """What happens after each optimizer step (from 1 on), while gradients are still there."""

    def progress(self) -> dict[str, torch.Tensor]:
        """What training has gathered besides `tensors`, for `resume`; nothing for most methods."""
        return {}

    def resume(self, step: int, progress: Mapping[str, torch.Tensor] | None = None) -> None:  # noqa: B027
        """What comes back when training goes on after `step` steps, besides what `tensors` hold.

        Args:
            step: optimizer steps done.
            progress: what `progress()` gave then.
        """

    def finish(self) -> None:  # noqa: B027 - most methods do nothing here
        """What happens once, when training is over, such as pruning."""

    def notes(self) -> dict[str, Any]:
        """What the report says beside the counts."""
        return {}

    # What all methods share

    def enable(self) -> None:
        """Takes part in the forward pass again."""
        if not self.enabled:
            self._switch(True)
            self.enabled = True

    def disable(self) -> None:
        """Leaves the forward pass to the base; nothing that was learnt is lost."""
        if self.enabled:
            self._switch(False)
            self.enabled = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without the method inside the context."""
        before = self.enabled
        self.disable()
        try:
            yield
        finally:
            if before:
                self.enable()

    @contextlib.contextmanager
    def _taking_part(self) -> Iterator[None]:
        """Where values of the base are exchanged on `disable`: `tensors` are what was learnt inside the context."""
        before = self.enabled
        self.enable()
        try:
            yield
        finally:
            if not before:
                self.disable()

    def remove(self) -> nn.Module:
        """Undoes `apply`; returns the model. Base weights are the bits they were before.

        Raises:
            MethodError: where the method is not on the model.
        """
        self._check_applied()
        self.enable()
        own = {id(param) for param in self.trainable_parameters().values()}
        self._uninstall()
        methods = applied(self.model)
        later = methods[methods.index(self) + 1 :]
        if later:  # the base stays frozen for them; the next one thaws it in its turn
            later[0]._required_grad.update(self._required_grad)
        flags = {} if later else self._required_grad
        for name, param in self.model.named_parameters():
            param.requires_grad_(flags.get(name, param.requires_grad and id(param) not in own))
        methods.remove(self)
        return self.model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of `tensors` in CPU memory, contiguous."""
        with self._taking_part():
            return {name: t.detach().cpu().contiguous().clone() for name, t in self.tensors().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Writes `state` into `tensors`.

        Raises:
            MethodError: where names, shapes or kinds differ; nothing has been written then.
        """
        own = self.tensors()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise MethodError(
                f"{self.name}: the file does not fit this model; missing: {', '.join(missing[:5]) or 'none'}; "
                f"unexpected: {', '.join(unexpected[:5]) or 'none'}"
            )
        for name, tensor in own.items():
            theirs = state[name]
            if theirs.shape != tensor.shape or theirs.is_floating_point() != tensor.is_floating_point():
                raise MethodError(
                    f"{self.name}: {name} is {theirs.dtype} {tuple(theirs.shape)} in the file; this model needs "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
        with self._taking_part(), torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(state[name])

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`, whole or not at all.

        In PEFT's format where PEFT has the method, so that PEFT loads it.
        """
        from safetensors.torch import save_file

        with self._taking_part():
            found = self.to_peft()
            if found is None:
                settings, tensors = self.folded()
                own = {"method": self.name, "config": settings.to_json()}
                found = {"peft_type": OWN_FORMAT} | own, tensors
            config, tensors = found
            tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        with atomic_files(folder) as temporary:
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})

    def report(self) -> MethodReport:
        """How much is trained and stored."""
        own = {id(p) for p in self.tensors().values()} | {id(p) for p in self.trainable_parameters().values()}
        packed = {id(m.weight): m.in_features * m.out_features for m in _packed(self.model)}
        base = [p for p in self.model.parameters() if id(p) not in own or self._was_there(p)]
        return MethodReport(
            method=self.name,
            trainable=sum(p.numel() for p in self.trainable_parameters().values()),
            total=sum(packed.get(id(p), p.numel()) for p in base),
            saved_bytes=sum(t.nbytes for t in self.folded()[1].values()),
            notes=self.notes(),
        )

    def _was_there(self, param: nn.Parameter) -> bool:
        return any(p is param for name, p in self.model.named_parameters() if name in self._required_grad)

    def _check_applied(self) -> None:
        if self not in applied(self.model):
            raise MethodError(f"{self.name} is not on this model any more")


def _packed(model: nn.Module) -> list[NF4Linear]:
    return [m for m in model.modules() if isinstance(m, NF4Linear)]


METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: makes a method known by its name."""
    METHODS[method.config_class.name] = method
    return method


def applied(model: nn.Module) -> list[Method]:
    """Methods that are on a model, in the order in which they were applied."""
    if _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = []
    return model.__dict__[_ATTRIBUTE]


def apply(model: nn.Module, config: MethodConfig) -> Method:
    """Puts a method on a model, in place, and freezes everything that it does not train.

    Several may be on one model: each trains its own parameters.

    Args:
        model: a transformers model, or any module that the method can carry; in 16 or 32 bits, or in 4 (`prepare`).
        config: settings of a method, such as `BitFit()`.

    Returns:
        The handle through which the method is trained, saved, disabled, merged and removed.

    Raises:
        MethodError: where the model cannot carry it; it is unchanged then.
    """
    if config.name not in METHODS:
        raise MethodError(f"{config.name!r} is not a method; known are {', '.join(sorted(METHODS))}")
    method = METHODS[config.name](model, config)
    _put_on(method)
    return method


def reapply(method: Method, state: dict[str, torch.Tensor]) -> None:
    """Puts a method that is not on its model there, with tensors that it had, here or in a file."""
    method._restored = state
    try:
        _put_on(method)
    finally:
        method._restored = None
    try:
        method.load_state_dict(state)
    except MethodError:
        method.remove()
        raise


def _put_on(method: Method) -> None:
    model = method.model
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    kept = {id(p) for other in applied(model) for p in other.trainable_parameters().values()}
    for param in model.parameters():
        if id(param) not in kept:
            param.requires_grad_(False)
    try:
        method._install()
    except BaseException:
        for name, param in model.named_parameters():
            param.requires_grad_(flags.get(name, param.requires_grad))
        raise
    method._required_grad = flags
    applied(model).append(method)


def load(model: nn.Module, folder: str | os.PathLike) -> Method:
    """Applies a method that was saved, here or in PEFT, with what it had learnt.

    Raises:
        FileNotFoundError: where there is no such file.
        MethodError: where the file is of a method that is not known, or does not fit the model.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an adapter: there is no {CONFIG_FILE} in it")
    try:
        saved = json.loads(path.read_text())
        kind = saved["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise MethodError(f"{path} is not the configuration of an adapter: {error}") from error
    tensors = read_tensors(Path(folder))
    if kind == OWN_FORMAT:
        cls = METHODS.get(saved.get("method"))
        if cls is None:
            raise MethodError(f"{path}: method {saved.get('method')!r} is not known here")
        try:
            config = cls.config_class(**saved["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise MethodError(f"{path}: the settings do not fit {saved['method']}: {error}") from error
    else:
        cls = next((m for m in METHODS.values() if m.reads(saved)), None)
        if cls is None:
            raise MethodError(f"{path}: peft_type {kind!r} is not known here")
        config, tensors = cls.from_peft(saved, tensors)
    method = cls(model, config)
    reapply(method, tensors)
    return method
