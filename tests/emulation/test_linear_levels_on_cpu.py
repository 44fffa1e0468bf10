"""The product by levels for Hopper, its own text run on a CPU (see hopper_on_cpu.h)."""

import pytest
import torch

from tests.emulation.build import needs_compiler
from tests.emulation.test_linear_sm90_on_cpu import aligned, case, compiled, copy_aligned, fused, kernels  # noqa: F401
from tests.numerics import RELATIVE_RMS, assert_close, relative_rms

pytestmark = needs_compiler


def levels(kernels, *arguments):  # noqa: F811
    return fused(kernels, *arguments, run=kernels.run_linear_levels_sm90)


@pytest.mark.parametrize("config", [(8, 1, 1), (16, 1, 1), (32, 1, 1), (64, 1, 1), (128, 1, 1)])
@pytest.mark.parametrize(("M", "N", "K"), [(9, 200, 832), (70, 136, 64), (1, 131, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(kernels, dtype, M, N, K, config):  # noqa: F811
    """K-tiles beyond the last stage's, several tiles a block, odd N."""
    x, w4 = case(M, N, K, dtype)
    bias = torch.randn(N).to(dtype)
    expected = x.double() @ w4.dequantize(torch.float32).double().T + bias.double()
    assert_close("y", levels(kernels, x, w4, config, bias), expected, RELATIVE_RMS[dtype])


@pytest.mark.parametrize("config", [(8, 1, 3), (16, 1, 2), (32, 1, 8), (64, 1, 4), (128, 1, 2), (128, 1, 3)])
@pytest.mark.parametrize(("M", "N", "K"), [(33, 77, 704), (140, 264, 1024)])
def test_clusters(kernels, M, N, K, config):  # noqa: F811
    x, w4 = case(M, N, K)
    bias = torch.randn(N).to(x.dtype)
    expected = x.double() @ w4.dequantize(torch.float32).double().T + bias.double()
    assert_close("y", levels(kernels, x, w4, config, bias), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize(
    ("config", "M", "N", "K", "rank"),
    [
        ((8, 1, 1), 20, 140, 128, 8),
        ((16, 1, 2), 40, 140, 768, 24),
        ((32, 1, 1), 40, 264, 512, 200),
        ((64, 1, 4), 70, 77, 320, 72),
        ((128, 1, 1), 130, 264, 320, 136),
        ((128, 1, 1), 270, 200, 64, 40),
    ],
)
def test_adapter(kernels, config, M, N, K, rank):  # noqa: F811
    """Several tiles a block, odd N, ranks below, at and beyond a tile's columns; S as columns of a wider matrix."""
    x, w4 = case(M, N, K)
    wide = aligned((M, rank + 24), x.dtype).copy_(torch.randn(M, rank + 24))
    S, B = wide[:, 8 : 8 + rank], copy_aligned(torch.randn(N, rank).to(x.dtype))
    expected = x.double() @ w4.dequantize(torch.float32).double().T + S.double() @ B.double().T
    assert_close("y", levels(kernels, x, w4, config, None, S, B), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 512])
def test_scales(kernels, blocksize, double_quant):  # noqa: F811
    """Whole words of scales and single ones, of both kinds."""
    x, w4 = case(20, 130, 1024, blocksize=blocksize, double_quant=double_quant)
    expected = x.double() @ w4.dequantize(torch.float32).double().T
    assert_close("y", levels(kernels, x, w4, (32, 1, 1)), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_levels_lose_less_than_rounded_weights(kernels, dtype):  # noqa: F811
    """Against the weight as it is, y rounded alike: 1.8 thousandths in bfloat16, 2.3 with a decoded weight."""
    x, w4 = case(16, 256, 1024, dtype)
    expected = x.double() @ w4.dequantize(torch.float32).double().T
    decoded = (x.double() @ w4.dequantize(dtype).double().T).to(dtype)
    ours = levels(kernels, x, w4, (16, 1, 1))
    assert relative_rms(ours, expected) < 0.85 * relative_rms(decoded, expected)
