"""Named adapters of a whole model: choose, switch off, delete, count."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from qlora_engine.nn.qlora_linear import QLoRALinear


def adapter_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Paths and layers that can hold adapters.

    Raises:
        ValueError: where there is none.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QLoRALinear)}
    if not layers:
        raise ValueError("the model has no adapters; call qlora_engine.prepare(model, config) first")
    return layers


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in adapter_layers(model).values() for name in layer.adapters))


def set_adapters(model: nn.Module, names: str | Iterable[str]) -> None:
    """Chooses the adapters that act in every layer that has them; their products add up.

    Raises:
        KeyError: where no layer has an adapter of a name.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    _check_known(model, names)
    for layer in adapter_layers(model).values():
        layer.set_adapters([name for name in names if name in layer.adapters])


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter from every layer that has it.

    Raises:
        KeyError: where no layer has one of that name.
    """
    _check_known(model, (name,))
    for layer in adapter_layers(model).values():
        if name in layer.adapters:
            layer.delete_adapter(name)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what the frozen 4-bit base computes.

    >>> import torch, qlora_engine as qe
    >>> model = qe.prepare(nn.Sequential(nn.Linear(64, 64)), qe.QLoRAConfig(r=4))
    >>> with adapters_disabled(model):
    ...     base = model(torch.ones(1, 64))
    """
    layers = list(adapter_layers(model).values())
    before = [layer.adapters_enabled for layer in layers]
    try:
        for layer in layers:
            layer.adapters_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise KeyError(f"there is no adapter {name!r}; the model has {known or 'none'}")
