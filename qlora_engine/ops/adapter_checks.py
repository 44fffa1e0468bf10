"""Argument checks of the `adapter_*` operators; `csrc/adapter_checks.h` has the same words."""

from qlora_engine.ops.checks import COMPUTE_DTYPES, check_compute_dtype, check_nf4, check_tensor

MAX_PROJECTIONS = 3


def _check_projections(op, *lists) -> None:
    lengths = {len(entries) for entries in lists}
    if len(lengths) != 1 or not 1 <= lengths.pop() <= MAX_PROJECTIONS:
        raise RuntimeError(
            f"{op}: the lists have different lengths; expected one to 3 entries, one a projection, in each"
        )


def _check_factor(op, name, tensor, rows, columns, like) -> None:
    fits = tensor.dim() == 2 and all(
        want in (None, got) for want, got in zip((rows, columns), tensor.shape, strict=True)
    )
    if not fits:
        raise RuntimeError(
            f"{op}: {name} has another shape; expected lora_A [r, in_features] and lora_B [out_features, r]"
        )
    if tensor.dtype not in (COMPUTE_DTYPES[-1], like.dtype):
        name_of = {dtype: str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, like.dtype)}
        raise RuntimeError(f"{op}: {name} is {name_of[tensor.dtype]}; expected float32 or {name_of[like.dtype]}")
    check_tensor(op, name, tensor, tensor.dtype, tensor.numel(), like)


def _check_rows(op, name, tensor, rows, columns, like) -> None:
    if tensor.shape != (rows, columns):
        raise RuntimeError(f"{op}: {name} has another shape; expected [{rows}, {columns}]")
    check_tensor(op, name, tensor, like.dtype, rows * columns, like)


def _check_matrix(op, name, tensor, columns) -> None:
    check_compute_dtype(op, name, tensor.dtype)
    if tensor.dim() != 2:
        raise RuntimeError(f"{op}: {name} has {tensor.dim()} dimensions; expected [rows, {columns}]")


def adapter_forward(
    x, packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings
) -> None:
    op = "adapter_forward"
    lists = packed, absmax, nested_absmax, nested_offset, blocksizes, out_features, biases, lora_A, lora_B, scalings
    _check_projections(op, *lists)
    _check_matrix(op, "x", x, "in_features")
    check_tensor(op, "x", x, x.dtype, x.numel(), x)
    for A, B, out in zip(lora_A, lora_B, out_features, strict=True):
        _check_factor(op, "lora_A", A, None, x.shape[1], x)
        _check_factor(op, "lora_B", B, out, A.shape[0], x)
    op = "linear_nf4_lora"  # which makes these checks
    for *weight, out, bias in zip(*lists[:7], strict=True):
        check_nf4(op, *weight, out * x.shape[1], x)
        if bias is not None:
            check_tensor(op, "bias", bias, x.dtype, out, x)


def adapter_backward_S(grads, S, lora_B, scalings) -> None:
    op = "adapter_backward_S"
    _check_projections(op, grads, lora_B, scalings)
    _check_matrix(op, "S", S, "sum of ranks")
    for grad, B in zip(grads, lora_B, strict=True):
        _check_factor(op, "lora_B", B, None, None, S)
        _check_rows(op, "a gradient", grad, S.shape[0], B.shape[0], S)
    _check_rows(op, "S", S, S.shape[0], sum(B.shape[1] for B in lora_B), S)


def adapter_backward_x(grads, grad_S, packed, absmax, nested_absmax, nested_offset, blocksizes, lora_A) -> None:
    op = "adapter_backward_x"
    lists = packed, absmax, nested_absmax, nested_offset, blocksizes
    _check_projections(op, grads, *lists, lora_A)
    _check_matrix(op, "grad_S", grad_S, "sum of ranks")
    for grad, A in zip(grads, lora_A, strict=True):
        _check_factor(op, "lora_A", A, None, None if A is lora_A[0] else lora_A[0].shape[1], grad_S)
        _check_rows(op, "a gradient", grad, grad_S.shape[0], grad.shape[1] if grad.dim() == 2 else 0, grad_S)
    _check_rows(op, "grad_S", grad_S, grad_S.shape[0], sum(A.shape[0] for A in lora_A), grad_S)
    op = "linear_nf4_backward_lora"  # which makes these checks
    for grad, *weight in zip(grads, *lists, strict=True):
        check_nf4(op, *weight, grad.shape[1] * lora_A[0].shape[1], grad_S)


ADAPTER_CHECKS = {
    "adapter_forward": adapter_forward,
    "adapter_backward_S": adapter_backward_S,
    "adapter_backward_x": adapter_backward_x,
}
