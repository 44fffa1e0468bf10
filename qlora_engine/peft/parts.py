"""What a method adds to single layers: submodules of them, called by hooks around their forward passes."""

import functools
from collections.abc import Mapping

import torch
from torch import nn

from qlora_engine.peft.base import MethodError


class Part(nn.Module):
    """A submodule of a layer that changes what goes into the layer or what comes out of it.

    A subclass overrides `before`, `after` or both. The hooks are functions of the layer and the part's name in it, so
    a deep copy of a model calls its own parts.
    """

    def __init__(self):
        super().__init__()
        self.enabled = True

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's input as the layer is to see it."""
        return x

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The layer's output as the model is to see it; `x` is what the layer saw."""
        return y


class Attached:
    """Parts on the layers of a model, each under one name.

    Args:
        model: the model.
        parts: path of a layer -> its part.
        name: what the submodule is called; a number follows where a layer has one of that name.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], name: str):
        self._model, self._handles = model, []
        layers = {path: model.get_submodule(path) for path in parts}
        self.name = _free_name(layers.values(), name)
        self.parts = dict(parts)
        for path, layer in layers.items():
            part = parts[path]
            layer.add_module(self.name, part.train(layer.training))
            if type(part).before is not Part.before:
                hook = functools.partial(_before, self.name)
                self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if type(part).after is not Part.after:
                hook = functools.partial(_after, self.name)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def enable(self, enabled: bool) -> None:
        """Lets the parts work, or leaves the layers to themselves."""
        for part in self.parts.values():
            part.enabled = enabled

    def detach(self) -> None:
        """Takes the parts and their hooks away."""
        for handle in self._handles:
            handle.remove()
        for path in self.parts:
            delattr(self._model.get_submodule(path), self.name)


def first_tensor(args: tuple, kwargs: dict) -> torch.Tensor:
    """The tensor that a layer was called with: attention layers get theirs by keyword.

    Raises:
        MethodError: where there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    raise MethodError("a layer with an adapter was called without a tensor")


def _before(name: str, layer: nn.Module, args: tuple, kwargs: dict):
    part = getattr(layer, name)
    if not part.enabled:
        return None
    x = first_tensor(args, kwargs)
    new = part.before(x)
    args = tuple(new if value is x else value for value in args)
    return args, {key: new if value is x else value for key, value in kwargs.items()}


def _after(name: str, layer: nn.Module, args: tuple, kwargs: dict, output):
    part = getattr(layer, name)
    if not part.enabled:
        return None
    x = first_tensor(args, kwargs)
    if isinstance(output, tuple):  # attention layers: the hidden states, then weights
        return (part.after(x, output[0]), *output[1:])
    return part.after(x, output)


def _free_name(layers, name: str) -> str:
    names = [name, *(f"{name}_{number}" for number in range(2, 1000))]
    layers = list(layers)
    return next(n for n in names if not any(hasattr(layer, n) for layer in layers))
