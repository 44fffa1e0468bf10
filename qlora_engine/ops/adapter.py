"""What an autograd node of layers with adapters computes, in one operator for one to three projections of one input.

They are `linear_nf4_lora`, `linear_nf4_backward_lora` and the narrow products of `ops/lora.py` without dropout,
called together: a small layer's step is bound by the host, and one call costs it less than seven. They have no
gradients of their own.
"""

import torch

from qlora_engine.ops import adapter_checks as checks
from qlora_engine.ops import backend  # noqa: F401  (defines the operators)

Optional = torch.Tensor | None


@torch.library.register_fake("qlora_engine::adapter_forward")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings):
    checks.adapter_forward(
        x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings
    )
    return [x.new_empty(x.shape[0], out) for out in out_features], x.new_empty(
        x.shape[0], sum(A.shape[0] for A in lora_A)
    )


@torch.library.register_fake("qlora_engine::adapter_backward_S")
def _(grads, S, lora_B, scalings):
    checks.adapter_backward_S(grads, S, lora_B, scalings)
    return torch.empty_like(S), [torch.empty_like(B) for B in lora_B]


@torch.library.register_fake("qlora_engine::adapter_backward_x")
def _(grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A):
    checks.adapter_backward_x(grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A)
    return grad_S.new_empty(grad_S.shape[0], lora_A[0].shape[1])


def adapter_forward(
    x: torch.Tensor,
    packed: list[torch.Tensor],
    absmax: list[torch.Tensor],
    nested_absmax: list[Optional],
    nested_offset: list[Optional],
    blocksizes: list[int],
    out_features: list[int],
    biases: list[Optional],
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    scalings: list[float],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Layers with adapters on one input: `y = x @ W.T + bias + (x @ A.T) @ (scaling * B).T` of each.

    Every list has one entry a projection, of which there are one to three.

    Args:
        x: float16, bfloat16 or float32 `[M, in_features]`, contiguous.
        packed, absmax, nested_absmax, nested_offset, blocksizes: 4-bit weights, as in `dequantize_nf4`.
        out_features: rows of each weight.
        biases: dtype of `x`, `[out_features]`, or None.
        lora_A: `[r, in_features]`, float32 or the dtype of `x`, contiguous.
        lora_B: `[out_features, r]`, likewise.
        scalings: factors of the adapters' products.

    Returns:
        The outputs `[M, out_features]`, and `S = x @ cat(lora_A).T` `[M, sum of r]`, in the dtype of `x`.

    Raises:
        RuntimeError: where a tensor's dtype, shape, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.adapter_forward(
        x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings
    )


def adapter_backward_S(
    grads: list[torch.Tensor], S: torch.Tensor, lora_B: list[torch.Tensor], scalings: list[float]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients with respect to S and every B, from those of the outputs of `adapter_forward`.

    Args:
        grads: `[M, out_features]` of each output, dtype of `S`, contiguous.
        S: `[M, sum of r]`, contiguous.
        lora_B, scalings: as in `adapter_forward`.

    Returns:
        The gradient of S, in its dtype, and those of every B in B's, summed in float32.
    """
    return torch.ops.qlora_engine.adapter_backward_S(grads, S, lora_B, scalings)


def adapter_backward_x(
    grads: list[torch.Tensor],
    grad_S: torch.Tensor,
    packed: list[torch.Tensor],
    absmax: list[torch.Tensor],
    nested_absmax: list[Optional],
    nested_offset: list[Optional],
    blocksizes: list[int],
    lora_A: list[torch.Tensor],
) -> torch.Tensor:
    """Gradient with respect to x: `sum of grads @ W + grad_S @ cat(lora_A)`.

    Args:
        grads, grad_S: what `adapter_backward_S` takes and returns.
        packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A: as in `adapter_forward`.

    Returns:
        `[M, in_features]`, dtype of the gradients.
    """
    return torch.ops.qlora_engine.adapter_backward_x(
        grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A
    )
