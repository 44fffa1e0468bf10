"""Argument checks of the operators for the fake kernels and the reference; `csrc/checks.h` has the same words."""

import math

import torch

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NESTED_BLOCKSIZE = 256


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_compute_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in COMPUTE_DTYPES:
        raise RuntimeError(f"{op}: {name} is {_name(dtype)}; expected float16, bfloat16 or float32")


def check_blocksize(op: str, blocksize: int) -> None:
    if blocksize < 32 or blocksize > 4096 or blocksize & (blocksize - 1):
        raise RuntimeError(f"{op}: blocksize is {blocksize}; expected a power of two from 32 to 4096")


def check_tensor(
    op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, like: torch.Tensor
) -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(f"{op}: {name} is {_name(tensor.dtype)}; expected {_name(dtype)}")
    if tensor.numel() != numel:
        raise RuntimeError(f"{op}: {name} has {tensor.numel()} elements; expected {numel}")
    if not tensor.is_contiguous():
        raise RuntimeError(f"{op}: {name} is not contiguous; call .contiguous() on it")
    if tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name} is on another device; move all tensors of the weight and the input to one device"
        )


def check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, like) -> None:
    check_blocksize(op, blocksize)
    blocks = -(-numel // blocksize)
    check_tensor(op, "packed", packed, torch.uint8, -(-numel // 2), like)
    if (nested_absmax is None) != (nested_offset is None):
        raise RuntimeError(f"{op}: nested_absmax and nested_offset go together; got only one of them")
    nested = nested_absmax is not None
    check_tensor(op, "absmax", absmax, torch.uint8 if nested else torch.float32, blocks, like)
    if nested:
        groups = -(-blocks // NESTED_BLOCKSIZE)
        check_tensor(op, "nested_absmax", nested_absmax, torch.float32, groups, like)
        check_tensor(op, "nested_offset", nested_offset, torch.float32, 1, like)


def quantize_nf4(weight, blocksize) -> None:
    check_compute_dtype("quantize_nf4", "weight", weight.dtype)
    check_blocksize("quantize_nf4", blocksize)
    check_tensor("quantize_nf4", "weight", weight, weight.dtype, weight.numel(), weight)


def dequantize_nf4(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype) -> None:
    op = "dequantize_nf4"
    check_compute_dtype(op, "dtype", dtype)
    numel = math.prod(shape)
    check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, packed)


def quantize_absmax(absmax, offset, blocksize) -> None:
    op = "quantize_absmax"
    check_blocksize(op, blocksize)
    check_tensor(op, "absmax", absmax, torch.float32, absmax.numel(), absmax)
    check_tensor(op, "offset", offset, torch.float32, 1, absmax)


def dequantize_absmax(quantized, nested_absmax, nested_offset, blocksize) -> None:
    op = "dequantize_absmax"
    check_blocksize(op, blocksize)
    check_tensor(op, "quantized", quantized, torch.uint8, quantized.numel(), quantized)
    groups = -(-quantized.numel() // blocksize)
    check_tensor(op, "nested_absmax", nested_absmax, torch.float32, groups, quantized)
    check_tensor(op, "nested_offset", nested_offset, torch.float32, 1, quantized)


def linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias) -> None:
    op = "linear_nf4"
    check_compute_dtype(op, "x", x.dtype)
    if x.dim() == 0:
        raise RuntimeError(f"{op}: x has no dimensions; expected [..., in_features]")
    numel = out_features * x.shape[-1]
    check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, x)
    if bias is not None:
        check_tensor(op, "bias", bias, x.dtype, out_features, x)


def linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features) -> None:
    op = "linear_nf4_backward"
    check_compute_dtype(op, "grad", grad.dtype)
    if grad.dim() == 0:
        raise RuntimeError(f"{op}: grad has no dimensions; expected [..., out_features]")
    numel = grad.shape[-1] * in_features
    check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, grad)


CHECKS = {
    "quantize_nf4": quantize_nf4,
    "dequantize_nf4": dequantize_nf4,
    "quantize_absmax": quantize_absmax,
    "dequantize_absmax": dequantize_absmax,
    "linear_nf4": linear_nf4,
    "linear_nf4_backward": linear_nf4_backward,
}
