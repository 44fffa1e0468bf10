"""The formats of bench_quality.py: what each makes of a weight."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from qlora_engine import quantize
from qlora_engine.peft.initialise import loftq
from qlora_engine.quantization.codebook import bits_per_weight, level_tensor, levels_of
from qlora_engine.reference.quantize import quantize_codes

BRANCH_BITS = 16  # of each element of A and B
BYTE_LEVELS = 255


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight as a format has it.

    Attributes:
        decoded: float32, of the weight's shape.
        bits: that it takes, scales and branches included.
    """

    decoded: torch.Tensor
    bits: float


@dataclasses.dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        family: rows that a line of the picture connects.
        format: what the table calls it.
        levels: "nf4", "fp4" or "int4".
        block: elements that share a scale.
        scales: how scales are found: "absmax", "search" or "signed".
        nested: how they are stored: "float32", "double" (blocks of 256, 8 bits, as QLoRA) or "affine" (8 bits on one
            grid for the whole weight).
        rank: of the branch beside the 4-bit weight; 0: none.
        branch: "loftq", or "pissa".
        iterations: of LoftQ.
    """

    family: str
    format: str
    levels: str = "nf4"
    block: int = 64
    scales: str = "absmax"
    nested: str = "double"
    rank: int = 0
    branch: str = ""
    iterations: int = 1

    def stored(self, path: str, weight: torch.Tensor) -> Stored:
        """The weight without a branch."""
        if self.levels == "nf4" and self.nested != "affine":
            w4 = quantize(weight, self.block, self.nested == "double", scales=self.scales)
            return Stored(w4.dequantize(torch.float32), 8 * w4.nbytes)
        levels = level_tensor(levels_of(self.levels), weight.device)
        codes, absmax = quantize_codes(weight, self.block, levels)
        if self.nested == "affine":
            absmax = _affine(absmax)
        scale = absmax.repeat_interleave(self.block)[: weight.numel()]
        decoded = (levels[codes] * scale).reshape(weight.shape)
        per_weight = bits_per_weight(self.block, False)
        if self.nested == "affine":
            per_weight = 4 + 8 / self.block
        return Stored(decoded, per_weight * weight.numel() + (64 if self.nested == "affine" else 0))


def _affine(absmax: torch.Tensor) -> torch.Tensor:
    """Scales rounded to 256 even steps between the smallest and the largest of a weight."""
    low, high = absmax.min(), absmax.max()
    step = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / BYTE_LEVELS
    return ((absmax - low) / step).round() * step + low


class Branches:
    """Weights with a branch of low rank beside them; singular vectors are computed once and kept."""

    def __init__(self):
        self._kept: dict[tuple[str, str], tuple[torch.Tensor, ...]] = {}

    def __call__(self, entry: Format) -> Callable[[str, torch.Tensor], Stored]:
        return functools.partial(self._stored, entry)

    def _stored(self, entry: Format, path: str, weight: torch.Tensor) -> Stored:
        bits = BRANCH_BITS * entry.rank * sum(weight.shape)
        w4 = quantize(weight, entry.block)
        if entry.branch == "pissa":  # the rest of the weight is what is quantized
            product = self._product("weight", path, weight, entry.rank)
            w4 = quantize(weight - product, entry.block)
        elif entry.iterations == 1:
            product = self._product("rest", path, weight - w4.dequantize(torch.float32), entry.rank)
        else:
            A, B = weight.new_empty(entry.rank, weight.shape[1]), weight.new_empty(weight.shape[0], entry.rank)
            w4 = loftq(A, B, weight, 1.0, w4, entry.iterations)
            product = B @ A
        return Stored(w4.dequantize(torch.float32) + product, bits + 8 * w4.nbytes)

    def _product(self, kind: str, path: str, matrix: torch.Tensor, rank: int) -> torch.Tensor:
        """The matrix' best approximation by a rank."""
        if (kind, path) not in self._kept:
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            self._kept[kind, path] = U[:, :LARGEST_RANK].clone(), S[:LARGEST_RANK].clone(), Vh[:LARGEST_RANK].clone()
        U, S, Vh = self._kept[kind, path]
        return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def _formats() -> list[Format]:
    blocks = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    found = [Format("nf4", f"nf4, {block}", block=block) for block in blocks]
    found += [Format("nf4, search", f"nf4, search, {b}", block=b, scales="search") for b in (32, 64, 128, 256)]
    found += [
        Format("nf4, float32 scales", f"nf4, float32 scales, {b}", block=b, nested="float32") for b in (32, 64, 128)
    ]
    searched = {"scales": "search", "nested": "float32"}
    found.append(Format("nf4, search, float32 scales", "nf4, search, float32 scales, 64", **searched))
    found += [
        Format("nf4, signed", f"nf4, signed, {b}", block=b, scales="signed", nested="float32") for b in (32, 64, 128)
    ]
    found += [
        Format("nf4, affine scales", f"nf4, affine scales, {b}", block=b, nested="affine") for b in (32, 64, 128)
    ]
    for levels in ("fp4", "int4"):
        found += [
            Format(levels, f"{levels}, {b}", levels=levels, block=b, nested="float32") for b in (32, 64, 128, 256)
        ]
    found += [Format("nf4, LoftQ", f"nf4, LoftQ r={r}", rank=r, branch="loftq") for r in RANKS]
    found += [Format("nf4, PiSSA", f"nf4, PiSSA r={r}", rank=r, branch="pissa") for r in RANKS]
    often = {"rank": 16, "branch": "loftq", "iterations": 5}
    found.append(Format("nf4, LoftQ, 5 iterations", "nf4, LoftQ r=16, 5 iterations", **often))
    return found


RANKS = (4, 8, 16, 32, 64)
LARGEST_RANK = max(RANKS)
FORMATS = _formats()
