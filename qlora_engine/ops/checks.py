"""Argument checks of the operators for the fake kernels and the reference; `csrc/checks.h` has the same words."""

import math

import torch

from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE
from qlora_engine.reference.gated import ACTIVATIONS

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def check_weight(op, weight, blocksize) -> None:
    check_compute_dtype(op, "weight", weight.dtype)
    check_blocksize(op, blocksize)
    check_tensor(op, "weight", weight, weight.dtype, weight.numel(), weight)


def quantize_nf4(weight, blocksize) -> None:
    check_weight("quantize_nf4", weight, blocksize)


def quantize_nf4_double(weight, blocksize) -> None:
    check_weight("quantize_nf4_double", weight, blocksize)


def quantize_nf4_search(weight, blocksize, signed) -> None:
    check_weight("quantize_nf4_search", weight, blocksize)


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


def linear_nf4(
    x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias, op="linear_nf4"
) -> None:
    check_compute_dtype(op, "x", x.dtype)
    if x.dim() == 0:
        raise RuntimeError(f"{op}: x has no dimensions; expected [..., in_features]")
    numel = out_features * x.shape[-1]
    check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, x)
    if bias is not None:
        check_tensor(op, "bias", bias, x.dtype, out_features, x)


def _check_low_rank(op, S_name, S, B_name, B, rows, columns, rank_axis) -> None:
    """A low-rank addition to a product of `rows` [..., K] with `columns` columns; rows of S may be strided."""
    for name, matrix in ((B_name, B), (S_name, S)):
        if matrix.dim() != 2:
            raise RuntimeError(f"{op}: {name} has {matrix.dim()} dimensions; expected 2")
    rank, M = B.shape[rank_axis], math.prod(rows.shape[:-1])
    check_tensor(op, B_name, B, rows.dtype, columns * rank, rows)
    if tuple(S.shape) != (M, rank):
        raise RuntimeError(f"{op}: {S_name} is [{S.shape[0]}, {S.shape[1]}]; expected [{M}, {rank}]")
    _check_narrow(op, S_name, S)
    if S.dtype != rows.dtype:
        raise RuntimeError(f"{op}: {S_name} is {_name(S.dtype)}; expected {_name(rows.dtype)}")
    if S.device != rows.device:
        raise RuntimeError(f"{op}: {S_name} is on another device; move the input and the adapter to one device")


def linear_nf4_lora(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, S, B, bias) -> None:
    op = "linear_nf4_lora"
    linear_nf4(x, packed, absmax, nested_absmax, nested_offset, blocksize, out_features, bias, op)
    _check_low_rank(op, "S", S, "B", B, x, out_features, 1)


def linear_nf4_backward(
    grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, op="linear_nf4_backward"
) -> None:
    check_compute_dtype(op, "grad", grad.dtype)
    if grad.dim() == 0:
        raise RuntimeError(f"{op}: grad has no dimensions; expected [..., out_features]")
    numel = grad.shape[-1] * in_features
    check_nf4(op, packed, absmax, nested_absmax, nested_offset, blocksize, numel, grad)


def linear_nf4_backward_lora(
    grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, dS, A, addend
) -> None:
    op = "linear_nf4_backward_lora"
    linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, op)
    _check_low_rank(op, "dS", dS, "A", A, grad, in_features, 0)
    if addend is not None:
        check_tensor(op, "addend", addend, grad.dtype, math.prod(grad.shape[:-1]) * in_features, grad)


def linear_nf4_backward_add(dx, grad, packed, absmax, nested_absmax, nested_offset, blocksize) -> None:
    op = "linear_nf4_backward_add"
    if dx.dim() == 0:
        raise RuntimeError(f"{op}: dx has no dimensions; expected [..., in_features]")
    in_features = dx.shape[-1]
    linear_nf4_backward(grad, packed, absmax, nested_absmax, nested_offset, blocksize, in_features, op)
    check_tensor(op, "dx", dx, grad.dtype, math.prod(grad.shape[:-1]) * in_features, grad)


def check_gradients(op, grads, params=None) -> None:
    """Gradients that are there are dense and of one device; with `params`, each matches its parameter."""
    present = [g for g in grads if g is not None]
    for grad in present:
        check_compute_dtype(op, "a gradient", grad.dtype)
        if grad.device != present[0].device:
            raise RuntimeError(f"{op}: gradients are on several devices; step each device's parameters by themselves")
    if params is None:
        return
    if len(grads) != len(params):
        raise RuntimeError(f"{op}: got {len(grads)} gradients; expected {len(params)}, one or None a parameter")
    for param, grad in zip(params, grads, strict=True):
        check_compute_dtype(op, "a parameter", param.dtype)
        if grad is None:
            continue
        check_tensor_like(op, "a gradient", grad, param)


def check_tensor_like(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise RuntimeError(f"{op}: {name} is {_name(tensor.dtype)}; expected its parameter's {_name(like.dtype)}")
    if tensor.numel() != like.numel():
        raise RuntimeError(f"{op}: {name} has {tensor.numel()} elements; expected its parameter's {like.numel()}")
    if not tensor.is_contiguous() or not like.is_contiguous():
        raise RuntimeError(f"{op}: {name} or its parameter is not contiguous; pass views that are")
    if tensor.device != like.device:
        raise RuntimeError(f"{op}: {name} is on another device than its parameter")


def adamw_step(
    params, grads, steps, memory, pages, cold_pages, table, multiplier, skip, hyper, groups, layouts, seed
) -> None:
    op = "adamw_step"
    check_gradients(op, grads, params)
    count = len(params)
    if not params:
        raise RuntimeError(f"{op}: there are no parameters")
    check_tensor(op, "steps", steps, torch.float32, count, params[0])
    if pages.dim() != 2 or pages.shape[1] != 5:
        raise RuntimeError(f"{op}: pages has another shape; expected [pages, 5]")
    check_tensor(op, "pages", pages, torch.int64, pages.numel(), params[0])
    if not 0 <= cold_pages <= pages.shape[0]:
        raise RuntimeError(f"{op}: cold_pages is {cold_pages}; expected 0 to {pages.shape[0]}")
    for slab in memory:
        check_tensor(op, "memory", slab, torch.uint8, slab.numel(), params[0])
    for name, tensor in (("multiplier", multiplier), ("skip", skip)):
        if tensor is not None:
            check_tensor(op, name, tensor, torch.float32, 1, params[0])
    if len(groups) != count or len(layouts) != count:
        raise RuntimeError(f"{op}: groups and layouts need one number a parameter, {count}")
    if len(hyper) % 6 or any(not 0 <= group < len(hyper) // 6 for group in groups):
        raise RuntimeError(f"{op}: hyper has {len(hyper)} numbers; expected 6 for every group that groups names")
    for param, layout in zip(params, layouts, strict=True):
        if not 0 <= layout < 8 or (layout & 4 and param.dtype != torch.bfloat16):
            raise RuntimeError(
                f"{op}: a layout is {layout} for {_name(param.dtype)}; expected 0 to 3, or to 7 for bfloat16"
            )


def gradient_norm(grads, pages, table) -> None:
    check_gradients("gradient_norm", grads)


def concurrent_managed_access(like) -> None:
    """Any tensor will do."""


def host_slab(like, size, managed) -> None:
    if size <= 0:
        raise RuntimeError(f"host_slab: bytes is {size}; expected a positive number")


def copy_bytes(source, target) -> None:
    for name, tensor in (("source", source), ("target", target)):
        if tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            raise RuntimeError(f"copy_bytes: {name} is {_name(tensor.dtype)}; expected contiguous uint8")
    if source.numel() != target.numel():
        raise RuntimeError(
            f"copy_bytes: source has {source.numel()} bytes, target {target.numel()}; expected as many"
        )


def _check_matrix(op: str, name: str, tensor: torch.Tensor, shape: tuple, like: torch.Tensor, dtype=None) -> None:
    """`shape` has None where any size will do; `dtype` None allows every compute dtype."""
    check_compute_dtype(op, name, tensor.dtype)
    if dtype is not None and tensor.dtype != dtype:
        raise RuntimeError(f"{op}: {name} is {_name(tensor.dtype)}; expected {_name(dtype)}")
    if tensor.dim() != 2 or any(want not in (None, got) for got, want in zip(tensor.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise RuntimeError(f"{op}: {name} is {list(tensor.shape)}; expected [{wanted}]")
    if tensor.device != like.device:
        raise RuntimeError(f"{op}: {name} is on another device; move the input and the adapter to one device")


def _check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise RuntimeError(f"{op}: {name} is not contiguous; call .contiguous() on it")


def _check_narrow(op: str, name: str, tensor: torch.Tensor) -> None:
    """Some columns of a wider matrix will do, as long as a row's elements follow each other."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise RuntimeError(f"{op}: the rows of {name} are not contiguous; call .contiguous() on it")


def _check_dropout(op: str, dropout_p: float, seed: torch.Tensor | None, like: torch.Tensor) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise RuntimeError(f"{op}: dropout_p is {dropout_p}; expected at least 0 and below 1")
    if dropout_p and seed is None:
        raise RuntimeError(f"{op}: there is no seed; dropout needs one, int64 of one element")
    if seed is not None:
        check_tensor(op, "seed", seed, torch.int64, 1, like)


def lora_down(x, lora_A, scaling, dropout_p, seed) -> None:
    op = "lora_down"
    _check_matrix(op, "x", x, (None, None), x)
    _check_dense(op, "x", x)
    if not lora_A:
        raise RuntimeError(f"{op}: lora_A is empty; expected at least one matrix")
    for A in lora_A:
        _check_matrix(op, "lora_A", A, (None, x.shape[1]), x)
    _check_dropout(op, dropout_p, seed, x)


def lora_add(y, S, lora_B, scaling, addends, dropout_p, seed) -> None:
    op = "lora_add"
    _check_matrix(op, "y", y, (None, None), y)
    _check_dense(op, "y", y)
    _check_matrix(op, "S", S, (y.shape[0], None), y, y.dtype)
    _check_narrow(op, "S", S)
    _check_matrix(op, "lora_B", lora_B, (y.shape[1], S.shape[1]), y)
    if len(addends) > 2:
        raise RuntimeError(f"{op}: there are {len(addends)} addends; expected at most 2")
    for addend in addends:
        _check_matrix(op, "an addend", addend, tuple(y.shape), y, y.dtype)
        _check_dense(op, "an addend", addend)
    _check_dropout(op, dropout_p, seed, y)


def lora_grad_B(grad, S, lora_B, scaling, grad_S) -> None:
    op = "lora_grad_B"
    _check_matrix(op, "grad", grad, (None, None), grad)
    _check_dense(op, "grad", grad)
    for name, tensor in (("S", S), ("grad_S", grad_S)):
        _check_matrix(op, name, tensor, (grad.shape[0], None), grad, grad.dtype)
        _check_narrow(op, name, tensor)
    _check_matrix(op, "lora_B", lora_B, (grad.shape[1], S.shape[1]), grad)
    _check_matrix(op, "grad_S", grad_S, tuple(S.shape), grad)


def lora_grad_A(grad_S, x, dropout_p, seed, dtype) -> None:
    op = "lora_grad_A"
    _check_matrix(op, "x", x, (None, None), x)
    _check_dense(op, "x", x)
    _check_matrix(op, "grad_S", grad_S, (x.shape[0], None), x, x.dtype)
    _check_narrow(op, "grad_S", grad_S)
    check_compute_dtype(op, "dtype", dtype)
    _check_dropout(op, dropout_p, seed, x)


def gated_activation(gate, up, activation, op="gated_activation") -> None:
    check_compute_dtype(op, "gate", gate.dtype)
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"{op}: the activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if gate.dim() != 2:
        _check_dense(op, "gate", gate)
    else:
        _check_narrow(op, "gate", gate)
    if up.dtype != gate.dtype or up.shape != gate.shape or up.device != gate.device:
        wanted = f"{_name(gate.dtype)} {list(gate.shape)}, as gate"
        raise RuntimeError(f"{op}: up is {_name(up.dtype)} {list(up.shape)}; expected {wanted}")
    if up.stride() != gate.stride() and up.numel():
        raise RuntimeError(f"{op}: up has other strides than gate; call .contiguous() on both")


def gated_activation_backward(grad, gate, up, activation) -> None:
    op = "gated_activation_backward"
    gated_activation(gate, up, activation, op)
    check_tensor(op, "grad", grad, gate.dtype, gate.numel(), gate)


CHECKS = {
    "lora_down": lora_down,
    "lora_add": lora_add,
    "lora_grad_B": lora_grad_B,
    "lora_grad_A": lora_grad_A,
    "gated_activation": gated_activation,
    "gated_activation_backward": gated_activation_backward,
    "gated_activation_backward_inplace": gated_activation_backward,
    "adamw_step": adamw_step,
    "gradient_norm": gradient_norm,
    "concurrent_managed_access": concurrent_managed_access,
    "host_slab": host_slab,
    "copy_bytes": copy_bytes,
    "quantize_nf4": quantize_nf4,
    "quantize_nf4_double": quantize_nf4_double,
    "quantize_nf4_search": quantize_nf4_search,
    "dequantize_nf4": dequantize_nf4,
    "quantize_absmax": quantize_absmax,
    "dequantize_absmax": dequantize_absmax,
    "linear_nf4": linear_nf4,
    "linear_nf4_lora": linear_nf4_lora,
    "linear_nf4_backward": linear_nf4_backward,
    "linear_nf4_backward_lora": linear_nf4_backward_lora,
    "linear_nf4_backward_add": linear_nf4_backward_add,
}
