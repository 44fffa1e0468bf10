"""The narrow products of a low-rank adapter in Triton: device code. `lora.py` chooses tiles and launches.

    S  = scaling * drop(x) A^T          lora_down_kernel     x read once
    y += addends + drop'(scaling S B^T) lora_add_kernel      y read and written once
    dS = scaling * dY B                 lora_grad_B_kernel   both in one read of dY
    dB = scaling * dY^T S
    dA = dS^T drop(x)                   lora_grad_A_kernel   x read once

All are bound by the bytes of their one wide operand: a rank of 16 makes 32 operations of every two bytes. So a tile
of the wide operand is as wide as shared memory lets several be in flight, the narrow operands come from the L2, and
what a program cannot sum by itself it leaves as a float32 partial for `sum_partials`, in a partition that shapes
decide. Masks are drawn again from the seed wherever x is read (`dropout.py`). Row offsets are 64-bit.

On an H100, 8192x14336 in bfloat16, where a copy reaches 3.0 TB/s: S 84 us at rank 16 (2.8 TB/s; cuBLAS 83), 150 at
rank 64; y += S B^T 161 and 193 us (2.9 and 2.4 TB/s; cuBLAS 236); dA 81 us at rank 64 (2.9 TB/s; cuBLAS 82); dS and
dB together at most 164 us at rank 16, the host's part included (cuBLAS 168 in two products).
"""

import triton
import triton.language as tl

from qlora_engine.kernels.dropout import dropout_keep


@triton.jit
def lora_down_kernel(
    x,
    lora_A,
    out,
    seed,
    M,
    K,
    rank,
    A_rank_stride,
    A_column_stride,
    out_part_stride,
    out_row_stride,
    columns_per_program,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[part, m, r] = scaling * sum over the part's k of keep(m, k) x[m, k] A[r, k]."""
    first_row = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    first_column = part * columns_per_program
    last_column = tl.minimum(first_column + columns_per_program, K)
    rows = first_row + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_rows = x + rows.to(tl.int64)[:, None] * K
    A_rows = lora_A + ranks.to(tl.int64)[None, :] * A_rank_stride
    total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for column in range(first_column, last_column, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        if WHOLE_K:
            x_tile = tl.load(x_rows + columns[None, :], mask=rows[:, None] < M, other=0.0)
            A_tile = tl.load(
                A_rows + columns.to(tl.int64)[:, None] * A_column_stride, mask=ranks[None, :] < rank, other=0.0
            )
        else:
            inside = columns < last_column
            x_tile = tl.load(x_rows + columns[None, :], mask=(rows[:, None] < M) & inside[None, :], other=0.0)
            A_tile = tl.load(
                A_rows + columns.to(tl.int64)[:, None] * A_column_stride,
                mask=(ranks[None, :] < rank) & inside[:, None],
                other=0.0,
            )
        if DROPOUT:
            keep = dropout_keep(seed, first_row, column, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        total = tl.dot(x_tile, A_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    place = part.to(tl.int64) * out_part_stride + rows.to(tl.int64)[:, None] * out_row_stride + ranks[None, :]
    inside = (rows[:, None] < M) & (ranks[None, :] < rank)
    tl.store(out + place, (total * scaling).to(out.dtype.element_ty), mask=inside)


@triton.jit
def lora_add_kernel(
    y,
    first_addend,
    second_addend,
    S,
    lora_B,
    seed,
    M,
    N,
    rank,
    S_row_stride,
    B_row_stride,
    B_rank_stride,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ADDENDS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[m, n] += addends[m, n] + keep(m, n) * scaling * sum over r of S[m, r] B[n, r], in float32."""
    column_blocks = tl.cdiv(N, BLOCK_N)
    first_row = tl.program_id(0) // column_blocks * BLOCK_M
    first_column = tl.program_id(0) % column_blocks * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    place = rows.to(tl.int64)[:, None] * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        S_tile = tl.load(
            S + rows.to(tl.int64)[:, None] * S_row_stride + ranks[None, :],
            mask=(rows[:, None] < M) & (ranks[None, :] < rank),
            other=0.0,
        )
        B_tile = tl.load(
            lora_B + columns.to(tl.int64)[None, :] * B_row_stride + ranks.to(tl.int64)[:, None] * B_rank_stride,
            mask=(columns[None, :] < N) & (ranks[:, None] < rank),
            other=0.0,
        )
        total = tl.dot(S_tile, B_tile.to(S_tile.dtype), total, input_precision=PRECISION)
    total *= scaling
    if DROPOUT:
        keep = dropout_keep(seed, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total, 0.0)
    total += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        total += tl.load(first_addend + place, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS > 1:
        total += tl.load(second_addend + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def lora_grad_B_kernel(
    grad,
    S,
    lora_B,
    grad_S,
    grad_B,
    M,
    N,
    rank,
    S_row_stride,
    B_row_stride,
    B_rank_stride,
    grad_S_part_stride,
    grad_S_row_stride,
    rows_per_program,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program's columns of dY: their part of dS for its rows, and its rows' part of dB for them."""
    column_block = tl.program_id(0)
    part = tl.program_id(1)
    first_row = part * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    has_rank = ranks[None, :] < rank
    has_column = columns < N
    B_tile = tl.load(
        lora_B + columns.to(tl.int64)[:, None] * B_row_stride + ranks[None, :] * B_rank_stride,
        mask=has_column[:, None] & has_rank,
        other=0.0,
    ).to(grad.dtype.element_ty)
    total_B = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for row in range(first_row, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        has_row = (rows < last_row)[:, None]
        grad_place = grad + rows.to(tl.int64)[:, None] * N + columns[None, :]
        if WHOLE_N:
            grad_tile = tl.load(grad_place, mask=has_row, other=0.0)
        else:
            grad_tile = tl.load(grad_place, mask=has_row & has_column[None, :], other=0.0)
        S_place = S + rows.to(tl.int64)[:, None] * S_row_stride + ranks[None, :]
        S_tile = tl.load(S_place, mask=has_row & has_rank, other=0.0)
        part_S = tl.dot(grad_tile, B_tile, input_precision=PRECISION) * scaling
        S_out = column_block.to(tl.int64) * grad_S_part_stride + rows.to(tl.int64)[:, None] * grad_S_row_stride
        tl.store(grad_S + S_out + ranks[None, :], part_S.to(grad_S.dtype.element_ty), mask=has_row & has_rank)
        total_B = tl.dot(tl.trans(grad_tile), S_tile, total_B, input_precision=PRECISION)
    B_out = grad_B + part.to(tl.int64) * N * rank + columns.to(tl.int64)[:, None] * rank + ranks[None, :]
    tl.store(B_out, (total_B * scaling).to(grad_B.dtype.element_ty), mask=has_column[:, None] & has_rank)


@triton.jit
def lora_grad_A_kernel(
    grad_S,
    x,
    out,
    seed,
    M,
    K,
    rank,
    S_row_stride,
    out_part_stride,
    out_rank_stride,
    out_column_stride,
    rows_per_program,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[part, r, k] = scaling * sum over the part's m of dS[m, r] keep(m, k) x[m, k]."""
    first_column = tl.program_id(0) * BLOCK_K
    part = tl.program_id(1)
    first_row = part * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, M)
    columns = first_column + tl.arange(0, BLOCK_K)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for row in range(first_row, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        has_row = rows < last_row
        x_place = x + rows.to(tl.int64)[:, None] * K + columns[None, :]
        if WHOLE_K:
            x_tile = tl.load(x_place, mask=has_row[:, None], other=0.0)
        else:
            x_tile = tl.load(x_place, mask=has_row[:, None] & (columns < K)[None, :], other=0.0)
        S_tile = tl.load(
            grad_S + rows.to(tl.int64)[None, :] * S_row_stride + ranks[:, None],
            mask=has_row[None, :] & (ranks < rank)[:, None],
            other=0.0,
        )
        if DROPOUT:
            keep = dropout_keep(seed, row, first_column, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, 0.0)
        total = tl.dot(S_tile, x_tile, total, input_precision=PRECISION)
    place = part.to(tl.int64) * out_part_stride + ranks.to(tl.int64)[:, None] * out_rank_stride
    place += columns.to(tl.int64)[None, :] * out_column_stride
    inside = (ranks[:, None] < rank) & (columns[None, :] < K)
    tl.store(out + place, (total * scaling).to(out.dtype.element_ty), mask=inside)
