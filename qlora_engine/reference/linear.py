"""Reference of `linear_nf4` and `linear_nf4_backward`: decode the whole weight, then multiply."""

import torch
import torch.nn.functional as F

from qlora_engine.reference.dequantize import dequantize_nf4


def linear_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    out_features: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See `qlora_engine.ops.linear_nf4`."""
    shape = [out_features, x.shape[-1]]
    weight = dequantize_nf4(packed, absmax, nested_absmax, nested_offset, blocksize, shape, x.dtype)
    return F.linear(x, weight, bias)


def linear_nf4_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    in_features: int,
) -> torch.Tensor:
    """See `qlora_engine.ops.linear_nf4_backward`."""
    shape = [grad.shape[-1], in_features]
    return grad @ dequantize_nf4(packed, absmax, nested_absmax, nested_offset, blocksize, shape, grad.dtype)
