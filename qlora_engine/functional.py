"""Products with a 4-bit weight as differentiable functions: a frozen one, and one with a low-rank adapter."""

import torch
import torch.nn.functional as F

from qlora_engine import ops
from qlora_engine.quantization.weight import NF4Weight


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with `x` is computed: autocast's where it is on, else that of `x`."""
    device = x.device.type
    if x.is_floating_point() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def nf4_linear(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Product with a frozen 4-bit weight: `y = x @ W.T + bias`.

    Differentiable in `x` and `bias`. Nothing of the weight's size is computed for backward or saved.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        w4: a weight of shape `[out_features, in_features]`.
        bias: `[out_features]`, or None.

    Returns:
        `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where the weight is not a matrix or does not fit `x`.

    >>> from qlora_engine import quantize
    >>> w4 = quantize(torch.randn(8, 64))
    >>> nf4_linear(torch.randn(2, 3, 64), w4).shape
    torch.Size([2, 3, 8])
    """
    out_features, _ = _matrix_shape(x, w4)
    dtype = compute_dtype(x)
    bias = bias if bias is None else bias.to(dtype)
    return ops.linear_nf4(x.to(dtype), *w4.arguments, out_features, bias)


def qlora_linear(
    x: torch.Tensor,
    w4: NF4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Product with a frozen 4-bit weight and a low-rank adapter: `y = x W.T + scaling * (drop(x) A.T) B.T + bias`.

    Hu et al. 2021, "LoRA", equation 3, on the base of Dettmers et al. 2023, "QLoRA", equation 5. One autograd
    node: backward keeps `x`, the narrow product `S = drop(x) A.T` and references to the parameters, nothing
    else. The dropout mask is drawn again from its seed.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        w4: a weight of shape `[out_features, in_features]`.
        lora_A: `[r, in_features]`, float32 or the dtype of `x`; its gradient has its own dtype.
        lora_B: `[out_features, r]`, likewise.
        scaling: factor of the adapter's product, such as alpha / r.
        bias: `[out_features]`, or None.
        dropout_p: probability with which an element of `x` is dropped before the adapter, in [0, 1).

    Returns:
        `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where shapes do not fit, or `dropout_p` is out of range.

    >>> from qlora_engine import quantize
    >>> A, B = torch.randn(4, 64, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    >>> qlora_linear(torch.randn(2, 64), quantize(torch.randn(8, 64)), A, B, scaling=2.0).sum().backward()
    >>> A.grad.shape, B.grad.shape
    (torch.Size([4, 64]), torch.Size([8, 4]))
    """
    out_features, in_features = _matrix_shape(x, w4)
    rank = lora_A.shape[0]
    if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_A is {list(lora_A.shape)} and lora_B {list(lora_B.shape)}; for a weight of "
            f"[{out_features}, {in_features}] they must be [r, {in_features}] and [{out_features}, r]"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability of at least 0 and below 1")
    dtype = compute_dtype(x)
    x = x.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    if dropout_p and torch.compiler.is_compiling():
        # a seeded generator cannot be traced; the mask is then the compiler's to keep
        y = ops.linear_nf4(x, *w4.arguments, out_features, bias)
        dropped = F.dropout(x, dropout_p)
        return y + scaling * F.linear(F.linear(dropped, lora_A.to(dtype)), lora_B.to(dtype))
    # drawn from the global CPU generator: reproducible by torch.manual_seed, and again the same when a
    # checkpointed forward is recomputed
    seed = int(torch.randint(2**62, ())) if dropout_p else 0
    return _QLoRALinear.apply(x, lora_A, lora_B, bias, float(scaling), float(dropout_p), seed, *w4.arguments)


def _matrix_shape(x: torch.Tensor, w4: NF4Weight) -> tuple[int, int]:
    if len(w4.shape) != 2:
        raise ValueError(f"the 4-bit weight has shape {list(w4.shape)}; expected a matrix [out, in]")
    if x.dim() == 0 or x.shape[-1] != w4.shape[1]:
        raise ValueError(
            f"x has shape {list(x.shape)}; its last dimension must be the weight's in_features, {w4.shape[1]}"
        )
    return w4.shape


def _dropped(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    if not probability:
        return x
    return x * _dropout_factors(x, probability, seed)


def _dropout_factors(x: torch.Tensor, probability: float, seed: int) -> torch.Tensor:
    """0 with `probability`, else 1 / (1 - probability); the same for the same seed and shape."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - probability, generator=generator)
    return kept.div_(1 - probability)


def _narrow_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b`, accumulated in float32 and returned in `dtype` without a rounding in between."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.float() @ b.float()).to(dtype)


class _QLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lora_A, lora_B, bias, scaling, dropout_p, seed, *weight):
        out_features, dtype = lora_B.shape[0], x.dtype
        y = ops.linear_nf4(x, *weight, out_features, bias)
        S = F.linear(_dropped(x, dropout_p, seed), lora_A.to(dtype))
        flat = y.reshape(-1, out_features)
        y = flat.addmm_(S.reshape(-1, S.shape[-1]), lora_B.to(dtype).T, alpha=scaling).reshape(y.shape)
        ctx.save_for_backward(x, S, lora_A, lora_B, *weight[:4])
        ctx.blocksize, ctx.scaling, ctx.dropout_p, ctx.seed = weight[4], scaling, dropout_p, seed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, S, lora_A, lora_B, *weight = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dtype, in_features, rank = x.dtype, x.shape[-1], lora_A.shape[0]
        flat = grad.reshape(-1, grad.shape[-1])
        dx = dA = dB = dbias = dS = None
        if need_x or need_A:
            dS = (flat @ lora_B.to(dtype)).mul_(ctx.scaling)
        if need_B:
            dB = _narrow_product(flat.T, S.reshape(-1, rank), lora_B.dtype).mul_(ctx.scaling)
        if need_A:
            dropped = _dropped(x, ctx.dropout_p, ctx.seed).reshape(-1, in_features)
            dA = _narrow_product(dS.T, dropped, lora_A.dtype)
        if need_x:
            dx = ops.linear_nf4_backward(flat, *weight, ctx.blocksize, in_features)
            if ctx.dropout_p:
                through_adapter = (dS @ lora_A.to(dtype)).reshape(x.shape)
                dx = dx.reshape(x.shape) + through_adapter * _dropout_factors(x, ctx.dropout_p, ctx.seed)
            else:
                dx = dx.addmm_(dS, lora_A.to(dtype)).reshape(x.shape)
        if need_bias:
            dbias = flat.sum(dim=0)
        return dx, dA, dB, dbias, None, None, None, None, None, None, None, None
