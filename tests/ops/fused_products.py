"""What the tests of fused products on a GPU share."""

import torch

from qlora_engine import ops, quantize


def random_weight(N, K, blocksize=64, double_quant=True):
    return quantize(torch.randn(N, K, device="cuda"), blocksize, double_quant)


def fused(x, w4, bias=None):
    return ops.linear_nf4(x, *w4.arguments, w4.shape[0], bias)


def float64(x, w4, bias=None):
    y = x.double() @ w4.dequantize(x.dtype).double().T
    return y if bias is None else y + bias.double()


def extra_memory(x, w4):
    """Bytes that a product takes beside its result while it runs."""
    fused(x, w4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = fused(x, w4)
    return torch.cuda.max_memory_allocated() - before - y.nbytes
