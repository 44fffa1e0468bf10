"""Reference of `quantize_nf4`, `quantize_absmax` and `quantize_nf4_double`, and of any other 4-bit format."""

import torch
import torch.nn.functional as F

from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, dynamic_map, level_tensor, midpoints, nf4_levels

# A block of zeros is divided by this instead of by zero.
SMALLEST_ABSMAX = 1e-38
# Elements quantized at a time: bounds the float32 and index temporaries of a large weight.
CHUNK = 1 << 24


def quantize_codes(weight: torch.Tensor, blocksize: int, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level of every element, in blocks that are scaled by their absolute maximum.

    Args:
        weight: floating point, any shape; flattened row-major.
        blocksize: elements that share a scale; the last block may be shorter.
        levels: float32 `[L]`, rising, within [-1, 1].

    Returns:
        codes: int64 `[n]`, indices of levels.
        absmax: float32 `[ceil(n / blocksize)]`.
    """
    flat = weight.reshape(-1).float()
    tail = flat.numel() % blocksize
    full = flat[: flat.numel() - tail].reshape(-1, blocksize)
    absmax = full.abs().amax(dim=1) if full.numel() else full.new_empty(0)
    # multiplying by the reciprocal, but dividing in the short last block: what bitsandbytes does on a CPU
    scaled = (full * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).reshape(-1)
    if tail:
        last = flat[flat.numel() - tail :]
        last_absmax = last.abs().max().clamp(min=SMALLEST_ABSMAX)
        absmax = torch.cat([absmax, last_absmax.reshape(1)])
        scaled = torch.cat([scaled, last / last_absmax])
    return torch.bucketize(scaled.clamp(-1, 1), midpoints(levels)), absmax


def pack(codes: torch.Tensor, padding: int) -> torch.Tensor:
    """Two 4-bit codes a byte, the first in the high nibble; an odd last one is followed by `padding`."""
    codes = codes.to(torch.uint8)
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=padding)
    return (codes[::2] << 4) | codes[1::2]


def quantize_nf4(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `qlora_engine.ops.quantize_nf4`."""
    levels = level_tensor(nf4_levels(), weight.device)
    flat = weight.reshape(-1)
    packed, absmax = [], []
    for start in range(0, max(flat.numel(), 1), CHUNK):
        codes, scales = quantize_codes(flat[start : start + CHUNK], blocksize, levels)
        packed.append(pack(codes, padding=7))  # 7 is the level 0
        absmax.append(scales)
    return torch.cat(packed), torch.cat(absmax)


def quantize_absmax(absmax: torch.Tensor, offset: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `qlora_engine.ops.quantize_absmax`; `offset` is given."""
    levels = level_tensor(dynamic_map(), absmax.device)
    codes, nested_absmax = quantize_scales(absmax - offset, blocksize, levels)
    return codes.to(torch.uint8), nested_absmax


def quantize_nf4_double(weight: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, ...]:
    """See `qlora_engine.ops.quantize_nf4_double`."""
    packed, absmax = quantize_nf4(weight, blocksize)
    offset = mean_absmax(absmax)
    return packed, *quantize_absmax(absmax, offset, NESTED_BLOCKSIZE), offset


def mean_absmax(absmax: torch.Tensor) -> torch.Tensor:
    """The mean of all scales, float32 `[]`; 0 of none."""
    return absmax.mean() if absmax.numel() else absmax.new_zeros(())


def quantize_scales(centred: torch.Tensor, blocksize: int, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest value of an 8-bit map, blockwise, on the grid that bitsandbytes' CPU backend searches.

    Normalised scales are first rounded to 65,536 steps of [-1, 1]; a block of zeros gets code 0. NaN gets code 0 too,
    and has no part in its block's scale.

    Args:
        centred: float32 `[b]`, scales less their mean.
        blocksize: scales that share one scale.
        levels: float32 `[256]`, rising.

    Returns:
        codes: int64 `[b]`.
        absmax: float32 `[ceil(b / blocksize)]`.
    """
    blocks = F.pad(centred, (0, -centred.numel() % blocksize)).reshape(-1, blocksize)
    magnitude = torch.where(blocks.isnan(), 0, blocks.abs())
    absmax = magnitude.amax(dim=1) if blocks.numel() else blocks.new_empty(0)
    scaled = (blocks * (1.0 / absmax).unsqueeze(1)).clamp(-1, 1)
    steps = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).trunc()
    codes = torch.bucketize(-1.0 + (2.0 * steps) / 65535.0, midpoints(levels))
    codes = torch.where((absmax.unsqueeze(1) == 0) | steps.isnan(), 0, codes)  # NaN also from infinity / infinity
    return codes.reshape(-1)[: centred.numel()], absmax
