"""Changing the weight of a linear layer for good, whether it is in 4 bits or not."""

from collections.abc import Callable

import torch
from torch import nn

from qlora_engine.nn import NF4Linear
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.quantization.weight import quantize


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
