"""`quantize_nf4`: weights to 4 bits. `quantize_absmax`: their scales to 8 bits. `quantize_nf4_double`: both.

`quantize_nf4_search`: weights to 4 bits with scales that make the error smaller.
"""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE
from qlora_engine.reference.quantize import mean_absmax


def _empty_blocks(weight, blocksize):
    """Packed codes and the scales' number."""
    numel = weight.numel()
    return weight.new_empty((numel + 1) // 2, dtype=torch.uint8), (numel + blocksize - 1) // blocksize


@torch.library.register_fake("qlora_engine::quantize_nf4")
def _(weight, blocksize):
    checks.quantize_nf4(weight, blocksize)
    packed, blocks = _empty_blocks(weight, blocksize)
    return packed, weight.new_empty(blocks, dtype=torch.float32)


@torch.library.register_fake("qlora_engine::quantize_nf4_search")
def _(weight, blocksize, signed):
    checks.quantize_nf4_search(weight, blocksize, signed)
    packed, blocks = _empty_blocks(weight, blocksize)
    return packed, weight.new_empty(blocks, dtype=torch.float32)


@torch.library.register_fake("qlora_engine::quantize_nf4_double")
def _(weight, blocksize):
    checks.quantize_nf4_double(weight, blocksize)
    packed, blocks = _empty_blocks(weight, blocksize)
    groups = (blocks + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    nested_absmax, offset = (weight.new_empty(shape, dtype=torch.float32) for shape in ((groups,), ()))
    return packed, weight.new_empty(blocks, dtype=torch.uint8), nested_absmax, offset


@torch.library.register_fake("qlora_engine::quantize_absmax")
def _(absmax, offset, blocksize):
    checks.quantize_absmax(absmax, offset, blocksize)
    groups = (absmax.numel() + blocksize - 1) // blocksize
    quantized = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    return quantized, absmax.new_empty(groups, dtype=torch.float32)


def quantize_nf4(weight: torch.Tensor, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a weight to NF4 in blocks that are scaled by their absolute maximum.

    Dettmers et al. 2023, "QLoRA", equations 1 and 4. Equal to bitsandbytes bit for bit on the same device.

    Args:
        weight: float16, bfloat16 or float32, any shape and strides; read row-major. `n` elements.
        blocksize: a power of two from 32 to 4096. Blocks run over the flat weight, across rows.

    Returns:
        packed: uint8 `[ceil(n / 2)]`; the first element of a pair in the high nibble.
        absmax: float32 `[ceil(n / blocksize)]`.

    Raises:
        RuntimeError: for another dtype or block size.

    >>> packed, absmax = quantize_nf4(torch.tensor([1.0, -2.0, 0.0, 0.5]), blocksize=32)
    >>> packed.tolist(), absmax.tolist()
    ([192, 122], [2.0])
    """
    return torch.ops.qlora_engine.quantize_nf4(weight.contiguous(), blocksize)


def quantize_nf4_double(
    weight: torch.Tensor, blocksize: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes a weight to NF4 and its scales to 8 bits: `quantize_nf4` and `quantize_absmax` in one call.

    Packed codes and scales are those of the two operators, bit for bit, given the offset. On a CPU the offset is
    torch's mean of the scales, as in bitsandbytes. On a GPU it is the mean in float64, rounded once, the same on
    every card; bitsandbytes' is summed in float32 and may differ from it in the last digits, as may then the codes of
    scales that lie halfway between two levels.

    Args:
        weight: float16, bfloat16 or float32, any shape and strides; read row-major. `n` elements.
        blocksize: a power of two from 32 to 4096.

    Returns:
        packed: uint8 `[ceil(n / 2)]`.
        quantized: uint8 `[b]`, `b = ceil(n / blocksize)`: indices of the dynamic map.
        nested_absmax: float32 `[ceil(b / 256)]`.
        nested_offset: float32 `[]`, the mean of the scales.

    Raises:
        RuntimeError: for another dtype or block size.
    """
    return torch.ops.qlora_engine.quantize_nf4_double(weight.contiguous(), blocksize)


def quantize_nf4_search(
    weight: torch.Tensor, blocksize: int = 64, signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a weight to NF4 with the scales, among some, that make the squared error of each block smallest.

    Candidates between 0.80 and 1.10 times the absolute maximum (0.73 in blocks of 512 and more) make codes; those
    codes' scale by least squares, and the error it leaves, decide. At the same size as `quantize_nf4`, and in the
    same format, the error of normal weights is 14% lower at block 64, that of Student-t(5) ones 11%; with `signed`
    19% and 16%. The result is the same, bit for bit, on every device. `qlora_engine.reference.scale_search` defines
    it.

    Blocks of zeros, those with an infinity, and those whose absolute maximum is not within 2**-100 ... 2**100 keep it
    as their scale. NaN is treated as in `quantize_nf4`.

    Args:
        weight: float16, bfloat16 or float32, any shape and strides; read row-major. `n` elements.
        blocksize: a power of two from 32 to 4096.
        signed: try negative scales too: NF4 has one level more above zero than below, so that turning a block round
            can help. Such scales suffer from double quantization, which removes their mean.

    Returns:
        packed: uint8 `[ceil(n / 2)]`.
        absmax: float32 `[ceil(n / blocksize)]`, the scales; negative ones with `signed` only.

    Raises:
        RuntimeError: for another dtype or block size.

    >>> packed, absmax = quantize_nf4_search(torch.tensor([1.0, -2.0, 0.0, 0.5]), blocksize=32)
    >>> packed.tolist(), round(absmax.item(), 3)
    ([192, 122], 2.043)
    """
    return torch.ops.qlora_engine.quantize_nf4_search(weight.contiguous(), blocksize, signed)


def quantize_absmax(
    absmax: torch.Tensor, blocksize: int = NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes the scales of a 4-bit weight to 8 bits: double quantization.

    The mean of the scales is removed and the rest is quantized blockwise to the signed 8-bit dynamic map
    (Dettmers et al. 2023, "QLoRA", section 3, "Double Quantization").

    Args:
        absmax: float32 `[b]`.
        blocksize: scales that share one second-level scale; the 4-bit format uses 256.

    Returns:
        quantized: uint8 `[b]`, indices of the dynamic map.
        nested_absmax: float32 `[ceil(b / blocksize)]`.
        nested_offset: float32 `[]`, the mean.
    """
    offset = mean_absmax(absmax)
    quantized, nested_absmax = torch.ops.qlora_engine.quantize_absmax(absmax, offset, blocksize)
    return quantized, nested_absmax, offset
