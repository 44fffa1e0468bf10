"""Dropout masks from a counter: `reference/dropout.py` defines the bits, this computes the same in a tile."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def dropout_keep(seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile are kept: bool [ROWS, COLUMNS]. `first_column` is a multiple of 8."""
    key = tl.load(seed)
    key_low = (key & 0xFFFFFFFF).to(tl.uint32)
    key_high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    group = first_column // 8 + tl.arange(0, COLUMNS // 8)
    row = first_row + tl.arange(0, ROWS)
    zero = tl.zeros([ROWS, COLUMNS // 8], dtype=tl.uint32)
    word0 = zero + group.to(tl.uint32)[None, :]
    word1 = zero + row.to(tl.uint32)[:, None]
    word2 = zero
    word3 = zero
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(word0, 0xD2511F53)
        low0 = tl.mul(word0, 0xD2511F53, sanitize_overflow=False)
        high2 = tl.umulhi(word2, 0xCD9E8D57)
        low2 = tl.mul(word2, 0xCD9E8D57, sanitize_overflow=False)
        word0 = high2 ^ word1 ^ key_low
        word1 = low2
        word2 = high0 ^ word3 ^ key_high
        word3 = low0
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    # element 8 g + i of a row: the low halves of words 0 to 3, then the high ones
    even = tl.join(word0, word2)
    odd = tl.join(word1, word3)
    words = tl.reshape(tl.join(even, odd), [ROWS, COLUMNS // 8, 4])
    halves = tl.join(words & 0xFFFF, words >> 16)
    halves = tl.permute(halves, [0, 1, 3, 2])
    numbers = tl.reshape(halves, [ROWS, COLUMNS])
    return numbers >= threshold
