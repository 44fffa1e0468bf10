"""Reference of `dequantize_nf4` and `dequantize_absmax`."""

import math

import torch

from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, dynamic_map, level_tensor, nf4_levels


def dequantize_absmax(
    quantized: torch.Tensor, nested_absmax: torch.Tensor, nested_offset: torch.Tensor, blocksize: int
) -> torch.Tensor:
    """See `qlora_engine.ops.dequantize_absmax`."""
    values = level_tensor(dynamic_map(), quantized.device)[quantized.long()]
    scales = nested_absmax.repeat_interleave(blocksize)[: quantized.numel()]
    return values * scales + nested_offset


def dequantize_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `qlora_engine.ops.dequantize_nf4`."""
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset, NESTED_BLOCKSIZE)
    numel = math.prod(shape)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel].long()
    values = level_tensor(nf4_levels(), packed.device)[codes]
    return (values * absmax.repeat_interleave(blocksize)[:numel]).to(dtype).reshape(list(shape))
