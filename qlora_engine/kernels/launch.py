"""What every Triton launch shares: the device, numbers of programs, and the sum over a fixed partition."""

import contextlib

import torch
import triton
import triton.language as tl

# An H100's. A constant, so that a split reduction's partition, and with it the order of summation, depends on shapes
# alone.
MULTIPROCESSORS = 132
SUM_BLOCK = 1024


def on_device(tensor: torch.Tensor):
    """Context in which launches go to the tensor's GPU."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """Float32 products are not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def rank_block(rank: int, largest: int) -> int:
    """Columns of a tile that covers the rank, or a part of it: a power of two from 16, the least of a tensor core."""
    return min(max(16, triton.next_power_of_2(rank)), largest)


@triton.jit
def sum_partials_kernel(
    partials,
    out,
    parts,
    count,
    columns,
    out_row_stride,
    BLOCK: tl.constexpr,
):
    """out[i] = sum over p of partials[p, i], in the order of p; rows of `columns` elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    total = tl.zeros([BLOCK], dtype=tl.float32)
    source = partials + index
    for _ in range(parts):
        total += tl.load(source, mask=inside, other=0.0)
        source += count
    place = index // columns * out_row_stride + index % columns
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """Sums float32 `[parts, rows, columns]` over the parts into `out` `[rows, columns]`; its rows may be strided."""
    parts, rows, columns = partials.shape
    count = rows * columns
    grid = (triton.cdiv(count, SUM_BLOCK),)
    sum_partials_kernel[grid](partials, out, parts, count, columns, out.stride(0), BLOCK=SUM_BLOCK, num_warps=4)
