"""Launches of the adapter's narrow products: kernel or cuBLAS, tiles, partitions, the second stage of split sums.

The formulas and what bounds them are in `lora_kernels.py`. A reduction is split where its output alone gives too few
programs to fill the card; the partition follows from shapes, so results repeat bit for bit.

Without dropout cuBLAS reads the wide operand once for one product as fast as memory gives it, and its call costs the
host less than a Triton launch. So the kernels serve dropout, and what one pass over a large matrix saves.
QLORA_ENGINE_LORA (`kernels/__init__.py`) forces the choice.
"""

from typing import NamedTuple

import torch
import triton

from qlora_engine import kernels
from qlora_engine.kernels.launch import MULTIPROCESSORS, on_device, precision, rank_block, sum_partials
from qlora_engine.kernels.lora_kernels import (
    lora_add_kernel,
    lora_down_kernel,
    lora_grad_A_kernel,
    lora_grad_B_kernel,
)
from qlora_engine.reference import lora as blas
from qlora_engine.reference.dropout import keep_scale, threshold

# One read of dY gives dS and dB up to this rank; beyond, the partials of dS weigh more than a second read
LARGEST_SHARED_RANK = 64


def _use_kernel(dropout_p: float, saves_a_pass: bool) -> bool:
    choice = kernels.adapter_choice
    return dropout_p > 0 or (saves_a_pass if choice == "auto" else choice == "triton")


class Tiles(NamedTuple):
    """A launch's tile of the wide operand and of the rank, and how many programs a split reduction aims at."""

    rows: int
    columns: int
    rank: int
    warps: int
    stages: int
    programs: int = MULTIPROCESSORS


# Chosen among seven to eleven tiles each on an H100, at 8192 rows of 14336 columns, ranks 16 and 64.


def down_tiles(M: int, K: int, rank: int, dtype: torch.dtype) -> Tiles:
    """Few rows a tile where there are few: every multiprocessor gets work before the reduction is split."""
    if dtype == torch.float32:
        return Tiles(16, 64, rank_block(rank, 64), warps=4, stages=2)
    rows = next((rows for rows in (64, 32) if triton.cdiv(M, rows) >= 120), 16)
    ranks = rank_block(rank, 128)
    return Tiles(rows, 64 if ranks > 64 else 128, ranks, warps=4, stages=4)


def add_tiles(M: int, N: int, rank: int, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:
        return Tiles(32, 64, rank_block(rank, 32), warps=4, stages=2)
    return Tiles(128, 64, rank_block(rank, 64), warps=4, stages=1)


def grad_B_tiles(M: int, N: int, rank: int, dtype: torch.dtype) -> Tiles:
    """Many columns a tile: a program leaves a partial of dS for every tile of columns."""
    if dtype == torch.float32:
        return Tiles(16, 64, rank_block(rank, LARGEST_SHARED_RANK), warps=4, stages=2)
    return Tiles(64, 256, rank_block(rank, LARGEST_SHARED_RANK), warps=8, stages=3)


def grad_A_tiles(M: int, K: int, rank: int, dtype: torch.dtype) -> Tiles:
    """A rank of 64 for every adapter: it is the least that Hopper's warpgroup products take, and twice as fast."""
    if dtype == torch.float32:
        return Tiles(32, 64, rank_block(rank, 32), warps=4, stages=2)
    return Tiles(64, 128, 64, warps=4, stages=4)


def _split(length: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Parts of a reduction beside `programs` others, and the length of each, a multiple of the block."""
    blocks = triton.cdiv(length, block)
    parts = max(1, min(wanted // max(programs, 1), blocks))
    length_of_part = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, length_of_part), length_of_part


def _stacked(lora_A: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """One matrix; rounded beforehand where every tile of rows would read many bytes of it."""
    stacked = lora_A[0] if len(lora_A) == 1 else torch.cat(lora_A)
    return stacked.to(dtype) if stacked.shape[0] > 32 else stacked


def lora_down(
    x: torch.Tensor, lora_A: list[torch.Tensor], scaling: float, dropout_p: float, seed: torch.Tensor | None
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_down`."""
    if not _use_kernel(dropout_p, False):
        return blas.lora_down(x, lora_A, scaling, dropout_p, seed)
    A = _stacked(lora_A, x.dtype)
    out = x.new_empty(x.shape[0], A.shape[0])
    return _down(x, A, out, scaling, dropout_p, seed)


def _down(x, A, out, scaling, dropout_p, seed):
    """out[M, rank] = scaling * drop(x) A^T; the rows of `out` may be strided."""
    (M, K), rank = x.shape, A.shape[0]
    if not out.numel() or not K:
        return out.zero_()
    tiles = down_tiles(M, K, rank, x.dtype)
    grid = triton.cdiv(M, tiles.rows), triton.cdiv(rank, tiles.rank)
    parts, columns_per_program = _split(K, tiles.columns, grid[0] * grid[1], tiles.programs)
    into = out if parts == 1 else torch.empty(parts, M, rank, dtype=torch.float32, device=x.device)
    with on_device(x):
        lora_down_kernel[(grid[0], parts, grid[1])](
            x,
            A,
            into,
            seed,
            M,
            K,
            rank,
            A.stride(0),
            A.stride(1),
            0 if parts == 1 else M * rank,
            out.stride(0) if parts == 1 else rank,
            columns_per_program,
            scaling * keep_scale(dropout_p),
            threshold(dropout_p),
            BLOCK_M=tiles.rows,
            BLOCK_K=tiles.columns,
            BLOCK_R=tiles.rank,
            DROPOUT=dropout_p > 0,
            WHOLE_K=K % tiles.columns == 0,
            PRECISION=precision(x.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if parts > 1:
            sum_partials(into, out)
    return out


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
    (M, N), rank = y.shape, S.shape[1]
    if not _use_kernel(dropout_p, M * N >= kernels.LARGE or len(addends) > 1):
        return blas.lora_add(y, S, lora_B, scaling, addends, dropout_p, seed)
    if not y.numel():
        return
    tiles = add_tiles(M, N, rank, y.dtype)
    first, second = (*addends, y, y)[:2]
    with on_device(y):
        lora_add_kernel[(triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.columns),)](
            y,
            first,
            second,
            S,
            lora_B,
            seed,
            M,
            N,
            rank,
            S.stride(0),
            lora_B.stride(0),
            lora_B.stride(1),
            scaling * keep_scale(dropout_p),
            threshold(dropout_p),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_R=tiles.rank,
            ADDENDS=len(addends),
            DROPOUT=dropout_p > 0,
            PRECISION=precision(y.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def lora_grad_B(
    grad: torch.Tensor, S: torch.Tensor, lora_B: torch.Tensor, scaling: float, grad_S: torch.Tensor
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_grad_B`."""
    (M, N), rank = grad.shape, S.shape[1]
    if not _use_kernel(0.0, kernels.one_read_pays(M, N, rank)):
        return blas.lora_grad_B(grad, S, lora_B, scaling, grad_S)
    out = torch.empty(N, rank, dtype=lora_B.dtype, device=grad.device)
    if not M or not N:
        grad_S.zero_()
        return out.zero_()
    if rank > LARGEST_SHARED_RANK:
        _down(grad, lora_B.T, grad_S, scaling, 0.0, None)
        return _sum_over_rows(S, grad, out.T, scaling, 0.0, None)
    tiles = grad_B_tiles(M, N, rank, grad.dtype)
    column_blocks = triton.cdiv(N, tiles.columns)
    parts, rows_per_program = _split(M, tiles.rows, column_blocks, tiles.programs)
    S_parts = grad.new_empty(column_blocks, M, rank, dtype=torch.float32) if column_blocks > 1 else grad_S
    B_parts = grad.new_empty(parts, N, rank, dtype=torch.float32) if parts > 1 else out
    with on_device(grad):
        lora_grad_B_kernel[(column_blocks, parts)](
            grad,
            S,
            lora_B,
            S_parts,
            B_parts,
            M,
            N,
            rank,
            S.stride(0),
            lora_B.stride(0),
            lora_B.stride(1),
            M * rank,
            rank if column_blocks > 1 else grad_S.stride(0),
            rows_per_program,
            scaling,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_R=tiles.rank,
            WHOLE_N=N % tiles.columns == 0,
            PRECISION=precision(grad.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if column_blocks > 1:
            sum_partials(S_parts, grad_S)
        if parts > 1:
            sum_partials(B_parts, out)
    return out


def lora_grad_A(
    grad_S: torch.Tensor, x: torch.Tensor, dropout_p: float, seed: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See `qlora_engine.ops.lora_grad_A`."""
    if not _use_kernel(dropout_p, False):
        return blas.lora_grad_A(grad_S, x, dropout_p, seed, dtype)
    out = torch.empty(grad_S.shape[1], x.shape[1], dtype=dtype, device=x.device)
    return _sum_over_rows(grad_S, x, out, 1.0, dropout_p, seed)


def _sum_over_rows(S, x, out, scaling, dropout_p, seed):
    """out[rank, K] = scaling * S^T drop(x); `out` is contiguous, or the transposed view of what is."""
    (M, K), rank = x.shape, S.shape[1]
    if not M or not out.numel():
        return out.zero_()
    tiles = grad_A_tiles(M, K, rank, x.dtype)
    column_blocks, rank_blocks = triton.cdiv(K, tiles.columns), triton.cdiv(rank, tiles.rank)
    parts, rows_per_program = _split(M, tiles.rows, column_blocks * rank_blocks, tiles.programs)
    transposed = not out.is_contiguous()
    whole = out.T if transposed else out
    into = x.new_empty(parts, *whole.shape, dtype=torch.float32) if parts > 1 else whole
    strides = (into.stride(-1), into.stride(-2)) if transposed else (into.stride(-2), into.stride(-1))
    with on_device(x):
        lora_grad_A_kernel[(column_blocks, parts, rank_blocks)](
            S,
            x,
            into,
            seed,
            M,
            K,
            rank,
            S.stride(0),
            rank * K,
            *strides,
            rows_per_program,
            scaling * keep_scale(dropout_p),
            threshold(dropout_p),
            BLOCK_M=tiles.rows,
            BLOCK_K=tiles.columns,
            BLOCK_R=tiles.rank,
            DROPOUT=dropout_p > 0,
            WHOLE_K=K % tiles.columns == 0,
            PRECISION=precision(x.dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if parts > 1:
            sum_partials(into, whole)
    return whole if transposed else out
