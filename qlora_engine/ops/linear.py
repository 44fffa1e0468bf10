"""`linear_nf4`: products with a 4-bit weight, their gradient with respect to the input, and both with an adapter."""

import ctypes
from typing import NamedTuple

import torch

from qlora_engine.ops import backend, checks

LINEAR_ENVIRONMENT_VARIABLE = "QLORA_ENGINE_LINEAR"
BACKWARD_ENVIRONMENT_VARIABLE = "QLORA_ENGINE_BACKWARD"
_PATHS = ("few rows", "fused", "dequantize", "fused sm80", "levels")
_GRADIENT_PATHS = ("few rows", "many rows", "dequantize", "levels")
_DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class LinearPath(NamedTuple):
    """The way of a product: "few rows", "levels", "fused", "fused sm80" or "dequantize"; a kernel's configuration.

    "levels" and "fused" are kernels for compute capability 9.0: a thread block takes 128 rows of W and `tokens` rows
    of x; `pair` blocks share x, or `splits` blocks divide in_features among them. "fused sm80" is the one for 8.0 and
    later, taken there for few rows and elsewhere by name: a block takes 128 rows of W, or 256 beside 128 rows of x.
    Zeros for the other ways.
    """

    name: str
    tokens: int = 0
    pair: int = 0
    splits: int = 0


def linear_path(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    blocksize: int = 64,
    device: torch.device | str | int = "cuda",
    adapter: bool = False,
) -> LinearPath:
    """Which way `linear_nf4` takes on a GPU for x `[M, K]` and W `[N, K]`, where all addresses are aligned.

    "dequantize" decodes the weight to `dtype` and calls cuBLAS; the others read the packed weight alone. The
    environment variable QLORA_ENGINE_LINEAR forces a way: auto (default: the fastest measured for the nearest
    product, csrc/cuda/linear_table.h), few, levels:TOKENS,PAIR,SPLITS, fused, fused:TOKENS,PAIR,SPLITS, fused:sm80,
    fused:sm80:TOKENS,SPLITS or dequantize.

    Args:
        M: rows of x, the product of all its dimensions but the last.
        N: out_features.
        K: in_features.
        dtype: of x: float16, bfloat16 or float32.
        blocksize: of the weight.
        device: a CUDA device.
        adapter: the way of `linear_nf4_lora` instead.

    Raises:
        RuntimeError: where the CUDA operators are not compiled, QLORA_ENGINE_LINEAR has another value, or it asks for
            the fused kernel where that does not fit.
    """
    return LinearPath(*_route("linear_path", _PATHS, M, N, K, dtype, blocksize, device, adapter, False))


class GradientPath(NamedTuple):
    """The way of a gradient: "few rows", "levels", "many rows" or "dequantize"; a kernel's configuration.

    config: of "levels", rows of dY a thread block, 1, and blocks that divide out_features; of "many rows", blocks
    that share what they decode, parts of the sum, and tiles of rows that are done together. Zeros for the others.
    """

    name: str
    config: tuple[int, int, int] = (0, 0, 0)


def gradient_path(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    blocksize: int = 64,
    device: torch.device | str | int = "cuda",
    adapter: bool = False,
) -> GradientPath:
    """Which way `linear_nf4_backward` takes on a GPU for dY `[M, N]` and W `[N, K]`, all addresses being aligned.

    The environment variable QLORA_ENGINE_BACKWARD forces a way: auto (default: the fastest measured for the nearest
    product), few, levels:TOKENS,1,SPLITS, many, many:CLUSTER,SPLITS,GROUP or dequantize. Where it is not set, fused
    and dequantize of QLORA_ENGINE_LINEAR count here too. Arguments and errors are those of `linear_path`; adapter:
    the way of `linear_nf4_backward_lora` instead.
    """
    name, *config = _route("gradient_path", _GRADIENT_PATHS, M, N, K, dtype, blocksize, device, adapter, True)
    return GradientPath(name, tuple(config))


def _route(op, paths, M, N, K, dtype, blocksize, device, adapter, gradient) -> tuple[str, int, int, int]:
    checks.check_compute_dtype(op, "dtype", dtype)
    checks.check_blocksize(op, blocksize)
    if backend.implementation("linear_nf4", "cuda") != "compiled":
        raise RuntimeError(f"{op}: the CUDA operators are not compiled; see `qlora env`")
    function = ctypes.CDLL(str(backend.library_path())).qlora_engine_linear_route
    function.restype = ctypes.c_char_p
    function.argtypes = [*[ctypes.c_int64] * 4, *[ctypes.c_int] * 3, ctypes.POINTER(ctypes.c_int32)]
    route = (ctypes.c_int32 * 4)()
    with torch.cuda.device(device):
        error = function(M, N, K, blocksize, _DTYPE_NUMBERS[dtype], int(adapter), int(gradient), route)
    if error:
        raise RuntimeError(error.decode())
    return paths[route[0]], *route[1:]


@torch.library.register_fake("qlora_engine::linear_nf4")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias):
    checks.linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("qlora_engine::linear_nf4_lora")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, S, B, bias):
    checks.linear_nf4_lora(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, S, B, bias)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("qlora_engine::linear_nf4_backward_lora")
def _(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, dS, A, addend):
    checks.linear_nf4_backward_lora(
        grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, dS, A, addend
    )
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("qlora_engine::linear_nf4_backward_add")
def _(dx, grad, packed, absmax, nested_absmax, nested_offset, blocksize):
    checks.linear_nf4_backward_add(dx, grad, packed, absmax, nested_absmax, nested_offset, blocksize)


@torch.library.register_fake("qlora_engine::linear_nf4_backward")
def _(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features):
    checks.linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _save_forward(ctx, inputs, output):
    x, *weight, blocksize, _out_features, _bias = inputs
    ctx.save_for_backward(*weight)  # the packed weight itself: no copy, and nothing of x
    ctx.blocksize, ctx.in_features = blocksize, x.shape[-1]


def _linear_backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_engine.linear_nf4_backward(grad, *ctx.saved_tensors, ctx.blocksize, ctx.in_features)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x, None, None, None, None, None, None, grad_bias


def _save_lora(ctx, inputs, output):
    x, *weight, blocksize, _out_features, S, B, _bias = inputs
    ctx.save_for_backward(*weight, S, B)
    ctx.blocksize, ctx.in_features = blocksize, x.shape[-1]


def _lora_backward(ctx, grad):
    *weight, S, B = ctx.saved_tensors
    need_x, need_S, need_B, need_bias = (ctx.needs_input_grad[i] for i in (0, 7, 8, 9))
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = (
        torch.ops.qlora_engine.linear_nf4_backward(grad, *weight, ctx.blocksize, ctx.in_features) if need_x else None
    )
    grad_S = flat @ B if need_S else None
    grad_B = flat.T @ S if need_B else None
    grad_bias = flat.sum(dim=0) if need_bias else None
    return grad_x, None, None, None, None, None, None, grad_S, grad_B, grad_bias


def _save_backward(ctx, inputs, output):
    grad, *weight, blocksize, _in_features = inputs
    ctx.save_for_backward(*weight)
    ctx.blocksize, ctx.out_features = blocksize, grad.shape[-1]


def _linear_double_backward(ctx, grad_x_grad):
    grad_grad = torch.ops.qlora_engine.linear_nf4(
        grad_x_grad, *ctx.saved_tensors, ctx.blocksize, ctx.out_features, None
    )
    return grad_grad, None, None, None, None, None, None


def _save_backward_lora(ctx, inputs, output):
    grad, *weight, blocksize, _in_features, dS, A, _addend = inputs
    ctx.save_for_backward(*weight, dS, A)
    ctx.blocksize, ctx.out_features = blocksize, grad.shape[-1]


def _lora_double_backward(ctx, grad_x_grad):
    *weight, dS, A = ctx.saved_tensors
    need_grad, need_dS, need_A, need_addend = (ctx.needs_input_grad[i] for i in (0, 7, 8, 9))
    flat = grad_x_grad.reshape(-1, grad_x_grad.shape[-1])
    grad_grad = None
    if need_grad:
        grad_grad = torch.ops.qlora_engine.linear_nf4(grad_x_grad, *weight, ctx.blocksize, ctx.out_features, None)
    grad_dS = flat @ A.T if need_dS else None
    grad_A = dS.T @ flat if need_A else None
    grad_addend = grad_x_grad.clone() if need_addend else None
    return grad_grad, None, None, None, None, None, None, grad_dS, grad_A, grad_addend


torch.library.register_autograd("qlora_engine::linear_nf4", _linear_backward, setup_context=_save_forward)
torch.library.register_autograd("qlora_engine::linear_nf4_lora", _lora_backward, setup_context=_save_lora)
torch.library.register_autograd(
    "qlora_engine::linear_nf4_backward_lora", _lora_double_backward, setup_context=_save_backward_lora
)
torch.library.register_autograd(
    "qlora_engine::linear_nf4_backward", _linear_double_backward, setup_context=_save_backward
)


def linear_nf4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with a 4-bit weight: `y = x @ W.T + bias`, accumulated in float32.

    Differentiable in `x` and `bias`; the weight is frozen, and backward saves nothing but references to it.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`; its dtype is the compute dtype.
        packed, absmax, nested_absmax, nested_offset, blocksize: the weight `[out_features, in_features]`, as
            in `dequantize_nf4`.
        out_features: rows of the weight.
        bias: dtype of `x`, `[out_features]`, or None.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.linear_nf4(
        x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias
    )


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
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with a 4-bit weight and a low-rank addition: `y = x @ W.T + S @ B.T + bias`.

    With `S = x @ lora_A.T` and `B = scaling * lora_B` the layer of Hu et al. 2021, "LoRA", equation 3. In the fused
    product the addition is further columns, summed in float32 with the rest; where the weight is decoded, the narrow
    product is written first, rounded, and the wide one adds to it. Differentiable in `x`, `S`, `B` and `bias`.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        packed, absmax, nested_absmax, nested_offset, blocksize, out_features: as in `linear_nf4`.
        S: dtype of `x`, `[M, r]` for the M rows of x; rows may be strided. Without a copy where r, the stride and the
            address are multiples of 8 elements.
        B: dtype of `x`, `[out_features, r]`.
        bias: dtype of `x`, `[out_features]`, or None.

    Returns:
        `[..., out_features]`, dtype of `x`.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.linear_nf4_lora(
        x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, S, B, bias
    )


def linear_nf4_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    in_features: int,
) -> torch.Tensor:
    """Gradient of `linear_nf4` with respect to its input: `grad @ W`.

    Args:
        grad: float16, bfloat16 or float32 `[..., out_features]`.
        packed, absmax, nested_absmax, nested_offset, blocksize: the weight `[out_features, in_features]`.
        in_features: columns of the weight.

    Returns:
        `[..., in_features]`, dtype of `grad`.
    """
    return torch.ops.qlora_engine.linear_nf4_backward(
        grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features
    )


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
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of a layer with an adapter with respect to its input: `grad @ W + dS @ A + addend`.

    Args:
        grad: float16, bfloat16 or float32 `[..., out_features]`.
        packed, absmax, nested_absmax, nested_offset, blocksize, in_features: as in `linear_nf4_backward`.
        dS: dtype of `grad`, `[M, r]` for the M rows of grad, the gradient of S; rows may be strided. Adapters of
            several projections of one input are one, with their dS beside and their A below each other.
        A: dtype of `grad`, `[r, in_features]`.
        addend: dtype of `grad`, `[..., in_features]`, or None.

    Returns:
        `[..., in_features]`, dtype of `grad`. An addend, and where the weight is decoded dS A, is rounded before the
        sum and the sum again.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.linear_nf4_backward_lora(
        grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, dS, A, addend
    )


def linear_nf4_backward_add(
    dx: torch.Tensor,
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
) -> None:
    """Adds a projection's gradient to that of another of the same input: `dx += grad @ W`. Has no gradient itself.

    Args:
        dx: dtype of `grad`, `[..., in_features]`, contiguous; changed.
        grad: float16, bfloat16 or float32 `[..., out_features]`.
        packed, absmax, nested_absmax, nested_offset, blocksize: the weight `[out_features, in_features]`.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    torch.ops.qlora_engine.linear_nf4_backward_add(dx, grad, packed, absmax, nested_absmax, nested_offset, blocksize)
