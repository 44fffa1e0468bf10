"""Layers that a low-rank change can be put beside: their weights as matrices, and a change as their output."""

import re
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine.models.config import ALL_LINEAR
from qlora_engine.models.prepare import replace_module
from qlora_engine.models.targets import check_patterns, is_linear, left_by_default, matches_any
from qlora_engine.nn import NF4Linear, QLoRALinear
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.peft.base import MethodError, applied

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a 1- or 2-dimensional convolution."""
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is a table of embeddings."""
    return isinstance(module, nn.Embedding)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a low-rank change can be put beside a module."""
    return is_linear(module) or is_convolution(module) or is_embedding(module)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a layer's weight as a matrix; see `weight_matrix`."""
    if is_transposed_linear(module):
        return module.weight.shape[1], module.weight.shape[0]
    if is_embedding(module):
        return module.embedding_dim, module.num_embeddings
    if is_convolution(module):
        return module.out_channels, module.weight[0].numel()
    return module.out_features, module.in_features


def weight_matrix(module: nn.Module) -> torch.Tensor:
    """A layer's weight in float32 as `[out, in]`.

    `in` is the inputs of a linear layer, channels times positions of a convolution's kernel, the vocabulary of a
    table of embeddings. A 4-bit weight is decoded.
    """
    if isinstance(module, NF4Linear):
        return module.dequantize(torch.float32)
    weight = module.weight.detach().float()
    if is_transposed_linear(module) or is_embedding(module):
        return weight.T
    return weight.flatten(1)


def like_weight(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of `weight_matrix` for a layer that is not in 4 bits: `[out, in]` in the weight's own layout."""
    if is_transposed_linear(module) or is_embedding(module):
        return matrix.T.contiguous()
    return matrix.reshape(module.weight.shape).contiguous()


def factor_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B beside a layer, as PEFT has them: those of a convolution are convolutions."""
    out_size, in_size = matrix_shape(module)
    if is_convolution(module):
        return (rank, *module.weight.shape[1:]), (out_size, rank, *[1] * len(module.kernel_size))
    return (rank, in_size), (out_size, rank)


def project(module: nn.Module, x: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layer's input through A, with the layer's stride, padding and so on: `r` takes the place of `out`."""
    if is_embedding(module):
        scale = getattr(module, "embed_scale", None)  # Gemma's embeddings are multiplied by it
        found = F.embedding(x, A.T.to(dtype), module.padding_idx)
        return found if scale is None else found * scale
    if is_convolution(module):
        return module._conv_forward(x.to(dtype), A.to(dtype), None)
    return F.linear(x.to(dtype), A.to(dtype))


def expand(module: nn.Module, S: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """From `r` to `out`: what `project` returned through B."""
    if is_convolution(module):
        convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
        return convolve(S, B.to(dtype))
    return F.linear(S, B.to(dtype))


def along_output(module: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    """A vector `[out]` in a shape that broadcasts against the layer's output."""
    return vector.view(-1, *[1] * len(module.kernel_size)) if is_convolution(module) else vector


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several, as several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def exact_patterns(paths: Iterable[str]) -> list[str]:
    """Patterns that mean the layers at these paths and no others."""
    return [f"re:{re.escape(path)}" for path in paths]


def choose_layers(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] = (),
    carries=is_adaptable,
) -> dict[str, nn.Module]:
    """Layers that patterns (see `QLoRAConfig`) mean, among those that can carry a method.

    Args:
        model: the model.
        target_modules: patterns; "all-linear" are the linear layers except heads and such.
        exclude_modules: patterns; layers that are left out although `target_modules` matches.
        carries: says of a module with a weight whether it can carry the method. Layers that other methods brought
            cannot.

    Raises:
        TargetError: where a pattern matches no such layer; near names are in the message.
        MethodError: where no layer is left, or a convolution has groups.
    """
    targets, excluded = as_patterns(target_modules), as_patterns(exclude_modules)
    brought = _brought_by_methods(model)
    able = {p: m for p, m in model.named_modules() if p and carries(m) and id(m.weight) not in brought}
    if not able:
        raise MethodError(f"{type(model).__name__} has no layer that could carry this method")
    named = [pattern for pattern in targets if pattern != ALL_LINEAR]
    check_patterns(named, list(able), "target_modules")
    check_patterns(excluded, list(able), "exclude_modules")
    left = left_by_default(model) if ALL_LINEAR in targets else set()
    chosen = {
        path: m
        for path, m in able.items()
        if (matches_any(named, path) or (ALL_LINEAR in targets and is_linear(m) and path not in left))
        and not matches_any(excluded, path)
    }
    if not chosen:
        names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in able})[:20])
        raise MethodError(f"target_modules {list(targets)} leaves no layer; layers that can carry it: {names}")
    grouped = [path for path, m in chosen.items() if is_convolution(m) and m.groups > 1]
    if grouped:
        raise MethodError(
            f"{', '.join(grouped[:5])}: a convolution in groups has no low-rank change of its own; name it in "
            "exclude_modules"
        )
    return chosen


def _brought_by_methods(model: nn.Module) -> set[int]:
    """Ids of parameters that are no part of the model but of methods on it, such as a prompt's encoder."""
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    return {own for method in applied(model) for name, own in names.items() if name not in method._required_grad}


def with_adapters(model: nn.Module, path: str, places) -> QLoRALinear:
    """The 4-bit layer at a path as one with adapters, whose fused product is used; `without_adapters` undoes it.

    What other methods put on the layer (hooks, submodules, a bias) is carried over.
    """
    layer = model.get_submodule(path)
    if isinstance(layer, QLoRALinear):
        return layer
    new = QLoRALinear.from_nf4(layer, r=0)
    _carry(layer, new)
    new.__dict__["layer_before"] = layer
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)  # else they would keep memory
    layer.absmax = layer.nested_absmax = layer.nested_offset = None  # when the model moves to another device
    replace_module(model, path, new, places)
    return new


def without_adapters(model: nn.Module, path: str, places) -> None:
    """Puts the layer from before `with_adapters` back, once its last adapter is gone."""
    layer = model.get_submodule(path)
    before = layer.__dict__.get("layer_before")
    if before is None or layer.adapters:
        return
    before.set_nf4_weight(layer.nf4_weight)
    _carry(layer, before)
    replace_module(model, path, before, places)


def _carry(old: nn.Module, new: nn.Module) -> None:
    new.bias = old.bias
    new.train(old.training)
    for attribute in HOOKS:
        setattr(new, attribute, getattr(old, attribute))  # the same dictionaries: handles stay valid
    for name, child in old._modules.items():
        if name not in ("lora_A", "lora_B"):
            new._modules[name] = child
    for name in [n for n in new._modules if n not in old._modules and n not in ("lora_A", "lora_B")]:
        del new._modules[name]


def shared_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, list[str]]:
    """Layers among `paths` whose weight other modules use as well -> paths of those."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    found = {}
    for path in paths:
        others = [p for p in holders.get(id(model.get_submodule(path).weight), ()) if p != path]
        if others:
            found[path] = others
    return found
