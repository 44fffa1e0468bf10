"""Reference of the `adapter_*` operators: what autograd nodes of layers with adapters do, out of plain products."""

import torch
import torch.nn.functional as F

from qlora_engine.reference.linear import linear_nf4, linear_nf4_backward
from qlora_engine.reference.lora import lora_add, lora_down, lora_grad_B


def _weights(packed, absmax, nested_absmax, nested_offset, blocksizes):
    return zip(packed, absmax, nested_absmax, nested_offset, blocksizes, strict=True)


def adapter_forward(
    x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings
):
    """See `qlora_engine.ops.adapter_forward`."""
    S = lora_down(x, lora_A, 1.0, 0.0, None)
    outputs = []
    weights = _weights(packed, absmax, nested_absmax, nested_offset, blocksizes)
    parts = S.split([A.shape[0] for A in lora_A], dim=1)
    for weight, out, bias, part, B, scaling in zip(
        weights, out_features, biases, parts, lora_B, scalings, strict=True
    ):
        y = linear_nf4(x, *weight, out, bias)
        lora_add(y, part, B, scaling, [], 0.0, None)
        outputs.append(y)
    return outputs, S


def adapter_backward_S(grads, S, lora_B, scalings):
    """See `qlora_engine.ops.adapter_backward_S`."""
    grad_S = torch.empty_like(S)
    ranks = [B.shape[1] for B in lora_B]
    rows = zip(grads, S.split(ranks, dim=1), lora_B, scalings, grad_S.split(ranks, dim=1), strict=True)
    return grad_S, [lora_grad_B(*row) for row in rows]


def adapter_backward_x(grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A):
    """See `qlora_engine.ops.adapter_backward_x`."""
    in_features = lora_A[0].shape[1]
    grad_x = F.linear(grad_S, torch.cat(lora_A).to(grad_S.dtype).T)
    for grad, weight in zip(grads, _weights(packed, absmax, nested_absmax, nested_offset, blocksizes), strict=True):
        grad_x += linear_nf4_backward(grad, *weight, in_features)
    return grad_x
