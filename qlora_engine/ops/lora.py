"""The narrow products of a low-rank adapter, `S = drop(x) A^T` and its relatives: one read of the wide operand each.

They compute and have no gradients of their own: `functional` puts them into autograd nodes.
"""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)


@torch.library.register_fake("qlora_engine::lora_down")
def _(x, lora_A, scaling, dropout_p, seed):
    checks.lora_down(x, lora_A, scaling, dropout_p, seed)
    return x.new_empty(x.shape[0], sum(A.shape[0] for A in lora_A))


@torch.library.register_fake("qlora_engine::lora_add")
def _(y, S, lora_B, scaling, addends, dropout_p, seed):
    checks.lora_add(y, S, lora_B, scaling, addends, dropout_p, seed)


@torch.library.register_fake("qlora_engine::lora_grad_B")
def _(grad, S, lora_B, scaling, grad_S):
    checks.lora_grad_B(grad, S, lora_B, scaling, grad_S)
    return lora_B.new_empty(lora_B.shape)


@torch.library.register_fake("qlora_engine::lora_grad_A")
def _(grad_S, x, dropout_p, seed, dtype):
    checks.lora_grad_A(grad_S, x, dropout_p, seed, dtype)
    return x.new_empty(grad_S.shape[1], x.shape[1], dtype=dtype)


def lora_down(
    x: torch.Tensor,
    lora_A: list[torch.Tensor],
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with the narrow matrices of one adapter or several, stacked: `S = scaling * drop(x) @ cat(lora_A).T`.

    Args:
        x: float16, bfloat16 or float32 `[M, K]`, contiguous.
        lora_A: matrices `[r, K]` of any compute dtype and strides; rounded to the dtype of `x`.
        scaling: factor of the product.
        dropout_p: probability with which an element of `x` is dropped, in steps of 1/65536.
        seed: int64, one element; the same seed drops the elements at the same rows and columns in every operator here
            (`reference/dropout.py`).

    Returns:
        `[M, sum of r]`, dtype of `x`, accumulated in float32.

    Raises:
        RuntimeError: where a dtype, shape, layout or device does not fit.
    """
    return torch.ops.qlora_engine.lora_down(x, lora_A, scaling, dropout_p, seed)


def lora_add(
    y: torch.Tensor,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float = 1.0,
    addends: list[torch.Tensor] | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> None:
    """Adds an adapter's wide product in place: `y += sum(addends) + drop'(scaling * S @ lora_B.T)`.

    Forward with the adapter's B; backward, with A transposed for `lora_B`, adds the adapter's part to the gradient of
    `x`, where dropout is the one that `lora_down` applied to `x`.

    Args:
        y: float16, bfloat16 or float32 `[M, N]`, contiguous; changed in place, rounded once.
        S: dtype of `y` `[M, r]`; rows may be strided.
        lora_B: `[N, r]` of any compute dtype and strides; rounded to the dtype of `y`.
        scaling: factor of the product.
        addends: at most two matrices like `y`.
        dropout_p, seed: as in `lora_down`, over the elements of `y`.

    Raises:
        RuntimeError: where a dtype, shape, layout or device does not fit.
    """
    torch.ops.qlora_engine.lora_add(y, S, lora_B, scaling, addends or [], dropout_p, seed)


def lora_grad_B(
    grad: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scaling: float, grad_S: torch.Tensor
) -> torch.Tensor:
    """Gradients of `scaling * S @ lora_B.T` with respect to both factors, in one read of `grad` up to rank 64.

    Args:
        grad: float16, bfloat16 or float32 `[M, N]`, contiguous.
        S: dtype of `grad` `[M, r]`; rows may be strided.
        lora_B: `[N, r]` of any compute dtype.
        scaling: factor of the product.
        grad_S: dtype of `grad` `[M, r]`; receives the gradient of S. Rows may be strided.

    Returns:
        The gradient of `lora_B`, in its dtype, summed in float32 in an order that shapes decide.

    Raises:
        RuntimeError: where a dtype, shape, layout or device does not fit.
    """
    return torch.ops.qlora_engine.lora_grad_B(grad, S, lora_B, scaling, grad_S)


def lora_grad_A(
    grad_S: torch.Tensor,
    x: torch.Tensor,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Gradient of `drop(x) @ A.T` with respect to A: `grad_S.T @ drop(x)`.

    Args:
        grad_S: dtype of `x` `[M, r]`; rows may be strided.
        x: float16, bfloat16 or float32 `[M, K]`, contiguous.
        dropout_p, seed: as in `lora_down`.
        dtype: of the result.

    Returns:
        `[r, K]`, summed in float32 in an order that shapes decide.

    Raises:
        RuntimeError: where a dtype, shape, layout or device does not fit.
    """
    return torch.ops.qlora_engine.lora_grad_A(grad_S, x, dropout_p, seed, dtype)
