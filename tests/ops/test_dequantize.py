"""`dequantize_nf4` and `dequantize_absmax`."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops import backend
from qlora_engine.quantization.codebook import dynamic_map, nf4_levels
from tests.ops.test_quantize import BLOCKSIZES, DTYPES, SIZES, sample_weight


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_equals_the_reference(device, dtype, blocksize, size, double_quant, poisoned_memory):
    w4 = quantize(sample_weight(size, torch.float32), blocksize, double_quant).to(device)
    arguments = (*w4.arguments, [size], dtype)
    expected = backend.reference_operator("dequantize_nf4")(*arguments)
    assert torch.equal(ops.dequantize_nf4(*arguments), expected)


@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_bitsandbytes_on_the_cpu(dtype, blocksize):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(96, 130).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(quantize(weight, blocksize).dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_exact_product(device, dtype):
    """Against float64: level times scale is exact there, and is rounded once to float32 and once to the dtype."""
    w4 = quantize(torch.randn(40, 64, device=device), 64, double_quant=False)
    levels = torch.tensor(nf4_levels(), dtype=torch.float64, device=device)
    codes = torch.stack([w4.packed >> 4, w4.packed & 15], 1).reshape(-1).long()
    exact = levels[codes] * w4.absmax.double().repeat_interleave(64)
    assert torch.equal(w4.dequantize(dtype), exact.float().to(dtype).reshape(40, 64))


def test_scales_decode_with_separate_roundings(device):
    scales = torch.rand(5000, device=device)
    codes, nested, offset = ops.quantize_absmax(scales)
    values = torch.tensor(dynamic_map(), device=device)[codes.long()]
    expected = values * nested.repeat_interleave(256)[:5000] + offset
    decoded = ops.dequantize_absmax(codes, nested, offset)
    assert torch.equal(decoded, expected)
    assert (decoded - scales).abs().max() < 0.01


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1001])
def test_scales_of_any_count(device, count, poisoned_memory):
    scales = torch.rand(count, device=device)
    codes, nested, offset = ops.quantize_absmax(scales)
    expected = backend.reference_operator("dequantize_absmax")(codes, nested, offset, 256)
    assert torch.equal(ops.dequantize_absmax(codes, nested, offset), expected)
