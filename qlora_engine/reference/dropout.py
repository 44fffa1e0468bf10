"""Which elements dropout keeps: counter-based random bits that forward and backward compute again from a seed.

Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3; seven rounds pass
BigCrush, table 2). The counter of an element is its row and its column / 8; the four 32-bit words give eight 16-bit
numbers, the low halves of the words first. An element is kept where its number is at least `threshold(p)`.
"""

import torch

ROUNDS = 7
COLUMNS = 8  # elements of a row that share a counter
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
RESOLUTION = 65536
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters at a time: what the cache of a CPU holds


def threshold(probability: float) -> int:
    """Dropout probability in steps of 1/65536, below 1."""
    return min(round(probability * RESOLUTION), RESOLUTION - 1)


def keep_scale(probability: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p) for the p that `threshold` rounds to.

    >>> keep_scale(0.5)
    2.0
    """
    return RESOLUTION / (RESOLUTION - threshold(probability))


def dropout_keep(seed: torch.Tensor, rows: int, columns: int, probability: float) -> torch.Tensor:
    """Mask of the elements of a matrix that dropout keeps.

    Args:
        seed: int64, one element.
        rows, columns: shape of the matrix.
        probability: with which an element is dropped, in [0, 1).

    Returns:
        bool `[rows, columns]` on the seed's device, the same for the same seed.
    """
    groups = -(-columns // COLUMNS)
    keep = torch.empty(rows, groups, COLUMNS, dtype=torch.bool, device=seed.device)
    column = torch.arange(groups, device=seed.device)
    at_once = max(_CHUNK // max(groups, 1), 1) if seed.device.type == "cpu" else max(rows, 1)
    for begin in range(0, rows, at_once):
        row = torch.arange(begin, min(begin + at_once, rows), device=seed.device).unsqueeze(1)
        words = philox(seed.reshape(()), column.expand(len(row), groups), row.expand(len(row), groups))
        halves = [word & 0xFFFF for word in words] + [word >> 16 for word in words]
        keep[begin : begin + at_once] = torch.stack(halves, dim=-1) >= threshold(probability)
    return keep.reshape(rows, groups * COLUMNS)[:, :columns]


def philox(seed: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Four 32-bit words, in int64, for the counter (first, second, 0, 0) under a 64-bit key."""
    key = [seed & _WORD, seed >> 32 & _WORD]
    counter = [first, second, torch.zeros_like(first), torch.zeros_like(first)]
    for _ in range(ROUNDS):
        # int64 wraps at 2^64, which leaves the bits of the unsigned product
        products = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
        counter = [
            (products[1] >> 32 & _WORD) ^ counter[1] ^ key[0],
            products[1] & _WORD,
            (products[0] >> 32 & _WORD) ^ counter[3] ^ key[1],
            products[0] & _WORD,
        ]
        key = [(k + step) & _WORD for k, step in zip(key, KEY_STEPS, strict=True)]
    return counter


def dropped(x: torch.Tensor, probability: float, seed: torch.Tensor | None) -> torch.Tensor:
    """Dropout of a matrix: elements kept are scaled by `keep_scale`, the others zero."""
    if not probability:
        return x
    keep = dropout_keep(seed, *x.shape, probability)
    return torch.where(keep, x * keep_scale(probability), 0)
