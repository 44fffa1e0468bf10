"""Rivals that the benchmarks stand beside, where they are installed."""

import functools
import os
import subprocess
import sys

import torch

MISSING = "not installed"


@functools.cache
def bitsandbytes_functional():
    """`bitsandbytes.functional`, or None; its own messages at import are kept out of the tables."""
    probe = subprocess.run([sys.executable, "-c", "import bitsandbytes"], capture_output=True, env=os.environ)
    if probe.returncode:
        return None
    import logging

    logging.disable(logging.WARNING)
    import bitsandbytes.functional as functional

    logging.disable(logging.NOTSET)
    return functional


class BitsandbytesWeight:
    """The same weight in bitsandbytes."""

    def __init__(self, weight: torch.Tensor, blocksize: int = 64, double_quant: bool = True):
        self.functional = bitsandbytes_functional()
        self.packed, self.state = self.functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
        )

    def dequantize(self) -> torch.Tensor:
        return self.functional.dequantize_4bit(self.packed, self.state)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=bias)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """dX as its autograd function computes it."""
        return torch.matmul(grad, self.dequantize().to(grad.dtype))


def compiled_dequantize(levels: torch.Tensor, blocksize: int):
    """NF4 with double-quantized scales decoded by PyTorch, compiled."""

    def decode(packed, codes, nested_absmax, offset, dynamic_map, shape, dtype):
        scales = dynamic_map[codes.long()] * nested_absmax.repeat_interleave(256)[: codes.numel()] + offset
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
        values = levels[nibbles].reshape(-1, blocksize) * scales.unsqueeze(1)
        return values.to(dtype).reshape(shape)

    return torch.compile(decode)
