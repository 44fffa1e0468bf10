"""`quantize_nf4` and `quantize_absmax`."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops import backend
from qlora_engine.quantization.codebook import nf4_levels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIZES = [1, 2, 31, 63, 64, 65, 127, 4096, 4097, 10_001, 70_000]


def sample_weight(size, dtype):
    weight = torch.randn(size)
    weight[: size // 8] = 0  # whole blocks of zeros where the size allows
    if size > 200:
        weight[size // 2] = 40.0
        weight[size // 2 + 1] = -40.0
        weight[size // 3] = 1e-42  # subnormal
    return weight.to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_bitsandbytes_on_the_cpu(dtype, blocksize, size, poisoned_memory):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = sample_weight(size, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
    ours = quantize(weight, blocksize, double_quant=False)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)

    _, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    ours = quantize(weight, blocksize, double_quant=True)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_equals_the_reference_on_the_cpu(dtype, blocksize, size, poisoned_memory):
    weight = sample_weight(size, dtype)
    expected = backend.reference_operator("quantize_nf4")(weight, blocksize)
    for actual, wanted in zip(ops.quantize_nf4(weight, blocksize), expected, strict=True):
        assert torch.equal(actual, wanted)
    scales = expected[1]
    expected = backend.reference_operator("quantize_absmax")(scales, scales.mean(), 256)
    for actual, wanted in zip(ops.quantize_absmax(scales)[:2], expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [[0], [5], [255], [256], [299], [3, 4], list(range(1, 300)), list(range(300))])
def test_scales_that_are_not_finite(where, special):
    """Wherever they stand in their block, as bitsandbytes' CPU backend has them."""
    functional = pytest.importorskip("bitsandbytes").functional
    scales = torch.randn(300)
    scales[where] = special
    expected, state = functional.quantize_blockwise(scales, blocksize=256)
    offset = torch.tensor(0.0)
    for implementation in (torch.ops.qlora_engine.quantize_absmax, backend.reference_operator("quantize_absmax")):
        codes, nested = implementation(scales, offset, 256)
        assert torch.equal(codes, expected)
        assert torch.equal(nested, state.absmax)


def test_every_element_gets_its_nearest_level(device):
    weight = torch.randn(50, 67, device=device)
    w4 = quantize(weight, 64, double_quant=False)
    levels = torch.tensor(nf4_levels(), dtype=torch.float64, device=device)
    flat = weight.double().reshape(-1)
    scales = w4.absmax.double().repeat_interleave(64)[: flat.numel()]
    codes = torch.stack([w4.packed >> 4, w4.packed & 15], 1).reshape(-1)[: flat.numel()].long()
    distance = (flat / scales).unsqueeze(1).sub(levels).abs()
    chosen = distance.gather(1, codes.unsqueeze(1)).squeeze(1)
    assert (chosen - distance.min(dim=1).values).max() < 1e-6  # a tie within float32's rounding may go either way


def test_scales_are_the_blocks_absolute_maxima(device):
    weight = torch.randn(1000, device=device)
    absmax = quantize(weight, 64, double_quant=False).absmax
    blocks = torch.nn.functional.pad(weight.abs(), (0, 24)).reshape(-1, 64)
    assert torch.equal(absmax, blocks.amax(dim=1))


@pytest.mark.parametrize("double_quant", [True, False])
def test_empty_weight(device, double_quant):
    w4 = quantize(torch.empty(0, 64, device=device), 64, double_quant)
    assert w4.nbytes == (4 if double_quant else 0)  # the mean of no scales
    assert w4.dequantize().shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(device, dtype):
    weight = torch.randn(300, 100, device=device, dtype=dtype)
    first, second = quantize(weight), quantize(weight)
    for a, b in zip(first.arguments[:4], second.arguments[:4], strict=True):
        assert torch.equal(a, b)
