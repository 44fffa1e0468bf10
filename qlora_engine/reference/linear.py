"""Reference of `linear_nf4`, its gradient, and both with an adapter: decode the whole weight, then multiply."""

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


def linear_nf4_lora(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    out_features: int,
    S: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See `qlora_engine.ops.linear_nf4_lora`."""
    y = linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias)
    return y + (S @ B.T).view_as(y)


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


def linear_nf4_backward_lora(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    in_features: int,
    dS: torch.Tensor,
    A: torch.Tensor,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """See `qlora_engine.ops.linear_nf4_backward_lora`."""
    dx = linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features)
    dx = dx + (dS @ A).view_as(dx)
    return dx if addend is None else dx + addend.view_as(dx)


def linear_nf4_backward_add(
    dx: torch.Tensor,
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
) -> None:
    """See `qlora_engine.ops.linear_nf4_backward_add`."""
    product = linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, dx.shape[-1])
    dx += product.view_as(dx)
