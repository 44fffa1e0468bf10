"""`quantize_nf4_double` and `quantize_nf4_search` on a GPU: equal to the operators and the reference behind them."""

import pytest
import torch

from qlora_engine import ops
from qlora_engine.reference import scale_search
from tests.ops.test_cuda_kernels import BLOCKSIZES, DTYPES, SIZES, misaligned, sample_weight

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [*SIZES, 20_000_001])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantization_is_both_operators(dtype, blocksize, size, poisoned_memory):
    weight = sample_weight(size, dtype)
    packed, absmax = ops.quantize_nf4(weight, blocksize)
    ours = ops.quantize_nf4_double(weight, blocksize)
    assert torch.equal(ours[0], packed)
    assert torch.equal(ours[3], absmax.double().mean().float())
    codes, nested = torch.ops.qlora_engine.quantize_absmax(absmax, ours[3], 256)
    assert torch.equal(ours[1], codes)
    assert torch.equal(ours[2], nested)


def test_double_quantization_of_one_weight_after_another(poisoned_memory):
    """Kernels that start early neither read scales before they are there nor write over what is still read."""
    weights = [torch.randn(1 << 20, device="cuda", dtype=torch.bfloat16) * 2.0**i for i in range(40)]
    expected = []
    for weight in weights:
        expected.append(ops.quantize_nf4_double(weight, 64))
        torch.cuda.synchronize()
    for _ in range(3):
        actual = [ops.quantize_nf4_double(weight, 64) for weight in weights]
        for a, b in zip(actual, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_scales_equal_the_reference_on_a_cpu(dtype, blocksize, signed, poisoned_memory):
    for size in (1, 31, 4097, 100_001):
        weight = torch.randn(size) * torch.logspace(-4, 0, size)
        weight = weight.to(dtype)
        expected = scale_search.quantize_nf4_search(weight, blocksize, signed)
        for source in (weight.cuda(), misaligned(weight.cuda())):
            packed, absmax = ops.quantize_nf4_search(source, blocksize, signed)
            assert torch.equal(packed.cpu(), expected[0]), size
            assert torch.equal(absmax.cpu(), expected[1]), size


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_that_keep_their_absmax(dtype, poisoned_memory):
    """Zeros, infinities and subnormal numbers are quantized as `quantize_nf4` does."""
    weight = torch.zeros(64 * 6, device="cuda")
    weight[64:128] = torch.randn(64, device="cuda")
    weight[70] = float("inf")
    weight[128:192] = -float("inf")
    weight[192:256] = torch.randn(64, device="cuda") * 1e-41
    weight = weight.to(dtype)
    for a, b in zip(ops.quantize_nf4_search(weight, 64), ops.quantize_nf4(weight, 64), strict=True):
        assert torch.equal(a, b)
    weight[5] = float("nan")
    assert ops.quantize_nf4_search(weight, 64)[1].isnan().sum() == 0
