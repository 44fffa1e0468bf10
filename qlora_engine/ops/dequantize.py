"""`dequantize_nf4`: 4-bit weights back to floating point. `dequantize_absmax`: 8-bit scales to float32."""

from collections.abc import Sequence

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE


@torch.library.register_fake("qlora_engine::dequantize_nf4")
def _(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype):
    checks.dequantize_nf4(packed, absmax, nested_absmax, nested_offset, blocksize, shape, dtype)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora_engine::dequantize_absmax")
def _(quantized, nested_absmax, nested_offset, blocksize):
    checks.dequantize_absmax(quantized, nested_absmax, nested_offset, blocksize)
    return quantized.new_empty(quantized.numel(), dtype=torch.float32)


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decodes a 4-bit weight: `round(level[code] * absmax)` in float32, rounded once to `dtype`.

    Args:
        packed: uint8 `[ceil(n / 2)]`.
        absmax: float32 `[ceil(n / blocksize)]`; uint8 codes where double-quantized.
        nested_absmax: float32 `[ceil(len(absmax) / 256)]`, or None where single-quantized.
        nested_offset: float32 `[]`, or None likewise.
        blocksize: a power of two from 32 to 4096.
        shape: the weight's shape, of `n` elements.
        dtype: float16, bfloat16 or float32.

    Returns:
        Tensor of `shape` and `dtype`, contiguous.

    Raises:
        RuntimeError: where a tensor's dtype, size, layout or device does not fit the others.
    """
    return torch.ops.qlora_engine.dequantize_nf4(
        packed, absmax, nested_absmax, nested_offset, blocksize, list(shape), dtype
    )


def dequantize_absmax(
    quantized: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_offset: torch.Tensor,
    blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """Decodes double-quantized scales: `map[quantized] * nested_absmax[i // blocksize] + nested_offset`.

    Args:
        quantized: uint8 `[b]`.
        nested_absmax: float32 `[ceil(b / blocksize)]`.
        nested_offset: float32 `[]`.
        blocksize: scales that share one second-level scale.

    Returns:
        float32 `[b]`.
    """
    return torch.ops.qlora_engine.dequantize_absmax(quantized, nested_absmax, nested_offset, blocksize)
