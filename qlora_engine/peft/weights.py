"""Changing the weight of a linear layer for good, whether it is in 4 bits or not."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from qlora_engine.nn import NF4Linear
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.peft.base import MethodError
from qlora_engine.quantization.weight import quantize


def check_mergeable(model: nn.Module, paths: Iterable[str], learnt: Iterable[torch.Tensor]) -> None:
    """Whether what was learnt can become part of the weights of layers.

    Raises:
        MethodError: where it has NaN or infinity, or where a layer shares its weight with another module, which would
            change as well. Nothing has been changed.
    """
    for tensor in learnt:
        if not torch.isfinite(tensor).all():
            raise MethodError("what was learnt has NaN or infinity; nothing was merged")
    paths = set(paths)
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None:
                users.setdefault(id(param), []).append(path)
    for path in sorted(paths):
        others = [user for user in users[id(model.get_submodule(path).weight)] if user != path]
        if others:
            raise MethodError(
                f"{path} shares its weight with {', '.join(others)}, which merging would change as well; nothing was "
                "merged. Keep the method, or leave this layer out of its target_modules"
            )


@torch.no_grad()
def change_weight(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces a weight by a function of it, in place.

    A 4-bit weight is decoded and quantized again with its settings, which rounds: what is smaller than half a step
    between its levels is lost.

    Args:
        layer: `NF4Linear`, `nn.Linear`, transformers' `Conv1D`, or a convolution.
        change: function of the float32 weight `[out, in, ...]` that returns the new one; it may write into its
            argument.
    """
    if isinstance(layer, NF4Linear):
        new = change(layer.dequantize(torch.float32)).to(layer.weight_dtype)
        layer.set_nf4_weight(quantize(new, layer.blocksize, layer.double_quant))
        return
    transposed = is_transposed_linear(layer)
    weight = layer.weight.detach().float().clone()
    new = change(weight.T if transposed else weight)
    layer.weight.copy_(new.T if transposed else new)
