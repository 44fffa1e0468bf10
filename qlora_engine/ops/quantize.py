"""`quantize_nf4`: weights to 4 bits. `quantize_absmax`: their scales to 8 bits (double quantization)."""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE


@torch.library.register_fake("qlora_engine::quantize_nf4")
def _(weight, blocksize):
    checks.quantize_nf4(weight, blocksize)
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty((numel + blocksize - 1) // blocksize, dtype=torch.float32)


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
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    quantized, nested_absmax = torch.ops.qlora_engine.quantize_absmax(absmax, offset, blocksize)
    return quantized, nested_absmax, offset
