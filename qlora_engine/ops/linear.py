"""`linear_nf4`: products with a 4-bit weight, and their gradient with respect to the input."""

import ctypes
from typing import NamedTuple

import torch

from qlora_engine.ops import backend, checks

LINEAR_ENVIRONMENT_VARIABLE = "QLORA_ENGINE_LINEAR"
_PATHS = ("few rows", "fused", "dequantize")
_DTYPE_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class LinearPath(NamedTuple):
    """The way of a product: "few rows", "fused" or "dequantize", and the fused kernel's configuration (else zeros).

    A thread block of the fused kernel takes 128 rows of W and `tokens` rows of x; `pair` blocks share x, or `splits`
    blocks divide in_features among them.
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
) -> LinearPath:
    """Which way `linear_nf4` takes on a GPU for x `[M, K]` and W `[N, K]`, where all addresses are aligned.

    "few rows" and "fused" read the packed weight alone; "dequantize" decodes it to `dtype` and calls cuBLAS. The
    environment variable QLORA_ENGINE_LINEAR forces a way: auto (default), fused, fused:TOKENS,PAIR,SPLITS or
    dequantize.

    Args:
        M: rows of x, the product of all its dimensions but the last.
        N: out_features.
        K: in_features.
        dtype: of x: float16, bfloat16 or float32.
        blocksize: of the weight.
        device: a CUDA device.

    Raises:
        RuntimeError: where the CUDA operators are not compiled, QLORA_ENGINE_LINEAR has another value, or it asks for
            the fused kernel where that does not fit.
    """
    checks.check_compute_dtype("linear_path", "dtype", dtype)
    checks.check_blocksize("linear_path", blocksize)
    if backend.implementation("linear_nf4", "cuda") != "compiled":
        raise RuntimeError("linear_path: the CUDA operators are not compiled; see `qlora env`")
    function = ctypes.CDLL(str(backend.library_path())).qlora_engine_linear_route
    function.restype = ctypes.c_char_p
    function.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_int, ctypes.POINTER(ctypes.c_int32)]
    route = (ctypes.c_int32 * 4)()
    with torch.cuda.device(device):
        error = function(M, N, K, blocksize, _DTYPE_NUMBERS[dtype], route)
    if error:
        raise RuntimeError(error.decode())
    return LinearPath(_PATHS[route[0]], *route[1:])


@torch.library.register_fake("qlora_engine::linear_nf4")
def _(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias):
    checks.linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias)
    return x.new_empty((*x.shape[:-1], out_features))


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


def _save_backward(ctx, inputs, output):
    grad, *weight, blocksize, _in_features = inputs
    ctx.save_for_backward(*weight)
    ctx.blocksize, ctx.out_features = blocksize, grad.shape[-1]


def _linear_double_backward(ctx, grad_x_grad):
    grad_grad = torch.ops.qlora_engine.linear_nf4(
        grad_x_grad, *ctx.saved_tensors, ctx.blocksize, ctx.out_features, None
    )
    return grad_grad, None, None, None, None, None, None


torch.library.register_autograd("qlora_engine::linear_nf4", _linear_backward, setup_context=_save_forward)
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
