"""Reference of the operators of a low-rank adapter: the narrow products as PyTorch computes them."""

import torch
import torch.nn.functional as F

from qlora_engine.reference.dropout import dropout_keep, dropped, keep_scale


def narrow_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b`, accumulated in float32 and returned in `dtype` without a rounding in between."""
    if a.dtype == dtype or not a.numel() or not b.numel():
        return (a @ b).to(dtype)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


def lora_down(
    x: torch.Tensor, lora_A: list[torch.Tensor], scaling: float, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_down`."""
    stacked = lora_A[0] if len(lora_A) == 1 else torch.cat(lora_A)
    S = F.linear(dropped(x, dropout_p, seed), stacked.to(x.dtype))
    return S if scaling == 1 else S.mul_(scaling)


def lora_add(
    y: torch.Tensor,
    S: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    addends: list[torch.Tensor],
    dropout_p: float,
    seed: torch.Tensor | None,
) -> None:
    """See `qlora_engine.ops.lora_add`."""
    for addend in addends:
        y.add_(addend)
    if not dropout_p:
        y.addmm_(S, lora_B.to(y.dtype).T, alpha=scaling)
        return
    product = F.linear(S, lora_B.to(y.dtype)).mul_(scaling * keep_scale(dropout_p))
    y.add_(torch.where(dropout_keep(seed, *y.shape, dropout_p), product, 0))


def lora_grad_B(
    grad: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scaling: float, grad_S: torch.Tensor
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_grad_B`."""
    torch.addmm(grad_S, grad, lora_B.to(grad.dtype), beta=0, alpha=scaling, out=grad_S)  # beta 0: reads no grad_S
    grad_B = narrow_product(grad.T, S, lora_B.dtype)
    return grad_B if scaling == 1 else grad_B.mul_(scaling)


def lora_grad_A(
    grad_S: torch.Tensor, x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_grad_A`."""
    return narrow_product(grad_S.T, dropped(x, dropout_p, seed), dtype)
