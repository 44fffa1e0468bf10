"""`quantize_nf4`, `quantize_absmax`, `quantize_nf4_double` and `quantize_nf4_search`."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops import backend
from qlora_engine.quantization.codebook import nf4_levels
from qlora_engine.reference import scale_search

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
    expected = backend.reference_operator("quantize_nf4_double")(weight, blocksize)
    for actual, wanted in zip(ops.quantize_nf4_double(weight, blocksize), expected, strict=True):
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


# Scales that are searched for


def exact_errors(weight, blocksize, packed, scales):
    """Squared error of every block, in float64."""
    levels = torch.tensor(nf4_levels(), dtype=torch.float64, device=weight.device)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: weight.numel()].long()
    values = levels[codes] * scales.double().repeat_interleave(blocksize)[: weight.numel()]
    errors = torch.nn.functional.pad((values - weight.double()).square(), (0, -weight.numel() % blocksize))
    return errors.reshape(-1, blocksize).sum(dim=1)


LOWER_BY = {
    # block -> part of the error that is gone: normal and Student-t(5) weights, then with signed scales
    32: (0.17, 0.125, 0.235, 0.195),
    64: (0.14, 0.105, 0.187, 0.155),
    128: (0.11, 0.10, 0.145, 0.13),
    256: (0.10, 0.11, 0.12, 0.13),
    1024: (0.11, 0.22, 0.12, 0.23),
    4096: (0.15, 0.30, 0.15, 0.30),
}


@pytest.mark.parametrize("blocksize", LOWER_BY)
def test_searched_scales_lower_the_error(device, blocksize):
    normal, heavy = torch.randn(1 << 20), torch.distributions.StudentT(5.0).sample((1 << 20,))
    lower = []
    for signed in (False, True):
        for weight in (normal.to(device), heavy.to(device)):
            plain = exact_errors(weight, blocksize, *ops.quantize_nf4(weight, blocksize))
            searched = exact_errors(weight, blocksize, *ops.quantize_nf4_search(weight, blocksize, signed))
            lower.append(1 - (searched.sum() / plain.sum()).item())
            assert (searched < 1.08 * plain).all()  # the search rounds: few blocks lose, and little
    assert all(part > least for part, least in zip(lower, LOWER_BY[blocksize], strict=True)), lower


def test_searched_scales_are_the_best_of_a_fine_grid(device):
    """Nearly: against every scale of a fine grid around the maximum, with exact arithmetic."""
    blocks = torch.randn(2000, 64, device=device)
    best = torch.full((2000,), float("inf"), dtype=torch.float64, device=device)
    levels = torch.tensor(nf4_levels(), device=device)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    for factor in torch.linspace(0.7, 1.2, 201).tolist():
        values = levels[torch.bucketize(blocks / (absmax * factor), (levels[1:] + levels[:-1]) / 2)] * absmax * factor
        best = torch.minimum(best, (values - blocks).double().square().sum(dim=1))
    found = exact_errors(blocks.reshape(-1), 64, *ops.quantize_nf4_search(blocks, 64))
    assert (found.sum() / best.sum()).item() < 1.005


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_codes_are_the_nearest(device, dtype, blocksize, signed, poisoned_memory):
    weight = sample_weight(10_001, dtype).to(device)
    packed, scales = ops.quantize_nf4_search(weight, blocksize, signed)
    assert signed or not scales.lt(0).any()
    levels = torch.tensor(nf4_levels(), dtype=torch.float64, device=device)
    scaled = weight.double() / scales.double().repeat_interleave(blocksize)[: weight.numel()]
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: weight.numel()].long()
    distance = (scaled.unsqueeze(1) - levels).abs()
    chosen = distance.gather(1, codes.unsqueeze(1)).squeeze(1)
    excess = chosen - distance.min(dim=1).values
    assert excess[scaled.isfinite()].max() < 1e-6  # a tie within float32's rounding may go either way


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_scales_equal_the_reference(dtype, size, signed, poisoned_memory):
    for blocksize in BLOCKSIZES:
        weight = sample_weight(size, dtype)
        if size > 200:
            weight[size // 5] = float("nan")
            weight[size // 6] = float("inf")
        expected = scale_search.quantize_nf4_search(weight, blocksize, signed)
        packed, scales = ops.quantize_nf4_search(weight, blocksize, signed)
        assert torch.equal(packed, expected[0]), blocksize
        assert torch.equal(scales.nan_to_num(7.0), expected[1].nan_to_num(7.0)), blocksize


def test_searched_scales_do_not_depend_on_the_size_of_numbers(device):
    weight = torch.randn(4096, device=device)
    packed, scales = ops.quantize_nf4_search(weight, 64)
    for power in (-90, -20, 30, 90):
        scaled = ops.quantize_nf4_search(weight * 2.0**power, 64)
        assert torch.equal(scaled[0], packed)
        assert torch.equal(scaled[1], scales * 2.0**power)


def test_bitsandbytes_reads_searched_scales():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(100, 64)
    for double_quant in (True, False):
        w4 = quantize(weight, 64, double_quant, scales="search")
        _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
        state.absmax = w4.absmax
        if double_quant:
            state.offset, state.state2.absmax = w4.nested_offset, w4.nested_absmax
        assert torch.equal(functional.dequantize_4bit(w4.packed.unsqueeze(1), state), w4.dequantize())
