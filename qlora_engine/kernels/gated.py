"""`gated_activation` and its backward in Triton: h = act(gate) * up, elementwise, in float32.

Bound by bytes: forward reads two values and writes one; backward reads three and writes three, and writes h over the
gradient and the gradients over gate and up where it may, so that it takes no memory. On an H100, 8192x14336 in
bfloat16: 228 us forward and 470 us backward, 3.1 and 3.0 TB/s, where a copy reaches 3.0.
"""

import torch
import triton
import triton.language as tl

from qlora_engine.kernels.launch import on_device

BLOCK = 2048
WARPS = 4


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """act(gate) and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * below
        slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        # tanh(z) = 2 sigmoid(2 z) - 1
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        below = tl.sigmoid(2.0 * inner)
        value = gate * below
        inner_slope = 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
        slope = below + 2.0 * gate * below * (1.0 - below) * inner_slope
    return value, slope


@triton.jit
def gated_activation_kernel(gate, up, out, columns, row_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out[row, column] = act(gate) * up; the rows of gate and up are `row_stride` apart, those of out follow."""
    row, column, inside = _tile_of_row(columns, BLOCK)
    place = row * row_stride + column
    value, _ = _activate(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    product = value * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_activation_backward_kernel(
    grad,
    gate,
    up,
    out,
    grad_gate,
    grad_up,
    columns,
    row_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Outputs may be the inputs themselves: every element is read before it is written, by the same thread.

    The rows of gate, up and their gradients are `row_stride` apart; those of grad and out follow each other.
    """
    row, column, inside = _tile_of_row(columns, BLOCK)
    place, dense = row * row_stride + column, row * columns + column
    grad_here = tl.load(grad + dense, mask=inside, other=0.0).to(tl.float32)
    up_here = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    dtype = out.dtype.element_ty
    tl.store(out + dense, (value * up_here).to(dtype), mask=inside)
    tl.store(grad_gate + place, (grad_here * up_here * slope).to(dtype), mask=inside)
    tl.store(grad_up + place, (grad_here * value).to(dtype), mask=inside)


@triton.jit
def _tile_of_row(columns, BLOCK: tl.constexpr):
    """Row, columns and mask of a program, in 64 bits."""
    blocks = tl.cdiv(columns, BLOCK)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), column, column < columns


def _rows(gate: torch.Tensor) -> tuple[int, int, int]:
    """Rows, columns and row stride: a tensor without gaps is one long row, another has two dimensions."""
    if not gate.is_contiguous():
        return *gate.shape, gate.stride(0)
    return 1, gate.numel(), gate.numel()


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `qlora_engine.ops.gated_activation`."""
    out = gate.new_empty(gate.shape)
    if gate.numel():
        rows, columns, row_stride = _rows(gate)
        with on_device(gate):
            gated_activation_kernel[(rows * triton.cdiv(columns, BLOCK),)](
                gate, up, out, columns, row_stride, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS
            )
    return out


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qlora_engine.ops.gated_activation_backward`."""
    if not gate.is_contiguous():
        gate, up = gate.contiguous(), up.contiguous()
    results = tuple(gate.new_empty(gate.shape) for _ in range(3))
    _backward(grad, gate, up, results, activation)
    return results


def gated_activation_backward_inplace(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    """See `qlora_engine.ops.gated_activation_backward`."""
    _backward(grad, gate, up, (grad, gate, up), activation)


def _backward(grad, gate, up, results, activation):
    if gate.numel():
        rows, columns, row_stride = _rows(gate)
        with on_device(gate):
            gated_activation_backward_kernel[(rows * triton.cdiv(columns, BLOCK),)](
                grad, gate, up, *results, columns, row_stride, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS
            )
