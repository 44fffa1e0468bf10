"""Reference of `quantize_nf4_search`: the definition of the scales that it finds.

With codes given, the error `sum (w - s q)**2` of a block is least at `s = sum(w q) / sum(q q)`, where it is
`sum(w w) - sum(w q)**2 / sum(q q)`; q are the codes' levels. So candidates for the scale make codes, and the codes
for which `sum(w q)**2 / sum(q q)` is largest make the scale. The sums are of integers, so that every order of
additions gives the same scale on every device.
"""

import torch
import torch.nn.functional as F

from qlora_engine.quantization.codebook import level_tensor, midpoints, nf4_levels
from qlora_engine.reference.quantize import CHUNK, pack
from qlora_engine.reference.quantize import quantize_nf4 as quantize_by_absmax

UNIT = 512  # the largest element of a block, in the units of the search
STEP = 128  # candidates' codes are those of w / scale rounded to so many parts of 1
# Candidate g is 32 / g times the largest magnitude: 1.10 to 0.80 times, and 0.73 times in blocks of MANY_BLOCKSIZE
# on, of which an outlier is a smaller part.
FIRST, CANDIDATES, MANY, MANY_BLOCKSIZE = 29, 12, 16, 512
# Blocks whose largest magnitude lies outside keep it as their scale.
LEAST, MOST = 2.0**-100, 2.0**100


def candidates(blocksize: int) -> range:
    """The values of g that are tried."""
    return range(FIRST, FIRST + (CANDIDATES if blocksize < MANY_BLOCKSIZE else MANY))


def search_scales(blocks: torch.Tensor, blocksize: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of every block, and whether one was found.

    Args:
        blocks: float32 `[b, blocksize]`; a shorter last block is filled up with zeros.
        blocksize: decides which candidates are tried.
        signed: try each candidate with a negative sign too.

    Returns:
        scale: float32 `[b]`.
        found: bool `[b]`; False for a block of zeros, one with a NaN or an infinity, and one outside LEAST ... MOST.
    """
    levels = level_tensor(nf4_levels(), blocks.device)
    thresholds = midpoints(levels)
    integer_levels = (levels * 256).round()
    absmax = blocks.abs().amax(dim=1)
    found = (absmax >= LEAST) & (absmax <= MOST)
    to_units = UNIT * (1.0 / torch.where(found, absmax, 1.0))
    u = torch.where(found.unsqueeze(1), blocks, 0.0).mul(to_units.unsqueeze(1)).round()
    best_product, best_square, best_sign = torch.zeros_like(absmax), torch.ones_like(absmax), torch.ones_like(absmax)
    for sign in (1.0, -1.0) if signed else (1.0,):
        for g in candidates(blocksize):
            x = torch.floor((sign * u * g + STEP / 2) / STEP) / STEP
            q = integer_levels[torch.bucketize(x, thresholds)]
            # float64 holds the sums exactly; rounding them to float32 is part of the definition
            product, square = ((sign * u * q).double().sum(1).float(), (q * q).double().sum(1).float())
            better = product * product * best_square > best_product * best_product * square
            best_product = torch.where(better, product, best_product)
            best_square = torch.where(better, square, best_square)
            best_sign = torch.where(better, sign, best_sign)
    # the sums count 131,072ths and 65,536ths
    return absmax * best_sign * (best_product / best_square * 0.5), found & (best_product > 0)


def quantize_nf4_search(weight: torch.Tensor, blocksize: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `qlora_engine.ops.quantize_nf4_search`."""
    thresholds = midpoints(level_tensor(nf4_levels(), weight.device))
    flat = weight.reshape(-1)
    packed, absmax = [], []
    for start in range(0, max(flat.numel(), 1), CHUNK):
        part = flat[start : start + CHUNK].float()
        blocks = F.pad(part, (0, -part.numel() % blocksize)).reshape(-1, blocksize)
        scale, found = search_scales(blocks, blocksize, signed)
        codes = torch.bucketize((blocks * (1.0 / scale).unsqueeze(1)), thresholds)
        searched = pack(codes.reshape(-1)[: part.numel()], padding=7)
        plain, plain_absmax = quantize_by_absmax(part, blocksize)
        of_byte = found.repeat_interleave(blocksize // 2)[: searched.numel()]
        packed.append(torch.where(of_byte, searched, plain))
        absmax.append(torch.where(found, scale, plain_absmax))
    return torch.cat(packed), torch.cat(absmax)
