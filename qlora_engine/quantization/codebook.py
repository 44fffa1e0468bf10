"""The levels of 4-bit formats and of the 8-bit scales, derived rather than listed."""

import functools
import math

import torch
from scipy.stats import norm

# 1 - (1/30 + 1/32) / 2: the outermost quantile that keeps the tails finite (QLoRA, appendix E), at the precision
# at which the published levels were made.
NF4_OUTER_QUANTILE = 0.9677083

# Scales that share one second-level scale where scales are stored in 8 bits (QLoRA, section 3)
NESTED_BLOCKSIZE = 256


@functools.cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of NormalFloat4, rising, from -1 to 1.

    Each level stands for an equal share of a standard normal distribution: eight quantiles on the positive
    side, seven on the negative side and an exact zero, normalised by the largest (Dettmers et al. 2023, "QLoRA",
    section 3, equation 4).

    Returns:
        16 Python floats, each exactly a float32 value.

    >>> levels = nf4_levels()
    >>> len(levels), levels[0], levels[7], levels[15]
    (16, -1.0, 0.0, 1.0)
    """
    positive = norm.ppf(torch.linspace(NF4_OUTER_QUANTILE, 0.5, 9)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(NF4_OUTER_QUANTILE, 0.5, 8)[:-1].numpy())
    levels = torch.tensor(sorted([*positive.tolist(), *negative.tolist(), 0.0]), dtype=torch.float64)
    return tuple((levels / levels.max()).to(torch.float32).tolist())


def fp4_levels() -> tuple[float, ...]:
    """The levels of FP4 with two exponent bits and one mantissa bit, normalised to [-1, 1], rising.

    bitsandbytes' FP4: subnormal 1/192 instead of 1/24, so that small values are kept apart from zero.
    The two zeros of the format are one level here, so there are 15.
    """
    positive = [1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0]
    return tuple(torch.tensor([*(-v for v in reversed(positive)), 0.0, *positive]).tolist())


def int4_levels() -> tuple[float, ...]:
    """The 15 evenly spaced levels -7/7 ... 7/7 of symmetric 4-bit integers, rising."""
    return tuple(torch.tensor([i / 7 for i in range(-7, 8)]).tolist())


def levels_of(format_name: str) -> tuple[float, ...]:
    """The levels of "nf4", "fp4" or "int4".

    Raises:
        ValueError: for any other name.
    """
    formats = {"nf4": nf4_levels, "fp4": fp4_levels, "int4": int4_levels}
    if format_name not in formats:
        raise ValueError(f"4-bit format {format_name!r} is not known; expected one of {', '.join(formats)}")
    return formats[format_name]()


@functools.cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic map, rising: the code of double-quantized scales.

    A sign, a run of zeros that is the decimal exponent, a marker bit, and the remaining bits as a linear
    fraction (Dettmers 2016, "8-bit approximations for parallelism in deep learning"; Dettmers et al. 2022,
    "8-bit optimizers via block-wise quantization", section 2).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + (-means).tolist()
    return tuple(sorted(values))


@functools.cache
def unsigned_dynamic_map() -> tuple[float, ...]:
    """The 256 values of the unsigned 8-bit dynamic map, rising, from 0 to 1: for numbers that have no sign.

    The bit that `dynamic_map` spends on the sign doubles the fractions of every decimal exponent here.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        values += (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return tuple(sorted(values))


@functools.lru_cache(maxsize=64)
def level_tensor(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 tensor of `levels` on `device`, made once."""
    return torch.tensor(levels, dtype=torch.float32, device=device)


def midpoints(levels: torch.Tensor) -> torch.Tensor:
    """float32 thresholds between neighbouring levels: a value belongs to the number of midpoints below it."""
    return (levels[:-1] + levels[1:]) / 2


def bits_per_weight(blocksize: int, double_quant: bool) -> float:
    """Storage in bits per weight of 4-bit codes and their scales, for a weight of many blocks.

    >>> round(bits_per_weight(64, True), 3), bits_per_weight(64, False)
    (4.127, 4.5)
    """
    scale = 8 + 32 / NESTED_BLOCKSIZE if double_quant else 32
    return 4 + scale / blocksize


def blocks_of(numel: int, blocksize: int) -> int:
    """Number of blocks of `blocksize` that cover `numel` elements."""
    return math.ceil(numel / blocksize)
