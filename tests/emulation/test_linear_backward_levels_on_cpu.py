"""The gradient by levels for Hopper, its own text run on a CPU (see hopper_on_cpu.h)."""

import ctypes

import pytest
import torch

from qlora_engine import quantize
from tests.emulation.build import needs_compiler
from tests.emulation.test_cuda_kernels_on_cpu import DTYPES, Weight, pointer
from tests.emulation.test_linear_sm90_on_cpu import aligned, compiled, copy_aligned, kernels  # noqa: F401
from tests.numerics import RELATIVE_RMS, assert_close, relative_rms

pytestmark = needs_compiler
TOKENS = (8, 16, 32, 64, 128, 256)


def case(M, N, K, dtype=torch.bfloat16, blocksize=64, double_quant=True):
    """dY, and W with scales over three orders of magnitude."""
    torch.manual_seed(M * N + K)
    w4 = quantize(torch.randn(N, K) * torch.logspace(-3, 0, N).unsqueeze(1), blocksize, double_quant)
    return torch.randn(M, N).to(dtype), w4


def gradient(kernels, grad, w4, config, S=None, A=None, dx=None):  # noqa: F811
    """dX in a configuration (tokens, splits), added to `dx` where that is given."""
    M, (N, K) = grad.shape[0], w4.shape
    packed = torch.zeros(w4.packed.numel() + 64, dtype=torch.uint8)
    start = -packed.data_ptr() % 16
    packed = packed[start : start + w4.packed.numel()].copy_(w4.packed)
    grad, to = copy_aligned(grad), aligned((M, K), grad.dtype) if dx is None else copy_aligned(dx)
    weight = Weight(N * K, packed, *w4.arguments[1:])
    pitch, rank = (0, 0) if S is None else (S.stride(0), S.shape[1])
    numbers = [ctypes.c_int64(n) for n in (M, N, K)]
    numbers += [pointer(S), ctypes.c_int64(pitch), pointer(A), ctypes.c_int64(rank)]
    numbers += [ctypes.c_int(n) for n in (*config, dx is not None)]
    error = kernels.run_linear_backward_levels_sm90(
        pointer(grad), ctypes.byref(weight), ctypes.c_int(DTYPES.index(grad.dtype)), pointer(to), *numbers
    )
    assert error == 0
    return to


def float64(grad, w4):
    return grad.double() @ w4.dequantize(torch.float32).double()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("M", "N", "K"), [(9, 520, 192), (140, 72, 64), (1, 264, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(kernels, dtype, M, N, K, tokens):  # noqa: F811
    """Rows beyond the last stage's, columns beyond the last tile's, several tiles of tokens."""
    grad, w4 = case(M, N, K, dtype)
    assert_close("dx", gradient(kernels, grad, w4, (tokens, 1)), float64(grad, w4), 1.1 * RELATIVE_RMS[dtype])


@pytest.mark.parametrize("config", [(8, 3), (16, 2), (32, 8), (64, 4), (128, 3), (256, 2), (256, 8)])
@pytest.mark.parametrize(("M", "N", "K"), [(33, 704, 128), (140, 1032, 320)])
def test_clusters(kernels, M, N, K, config):  # noqa: F811
    """Also blocks that have no rows of W."""
    grad, w4 = case(M, N, K)
    assert_close("dx", gradient(kernels, grad, w4, config), float64(grad, w4), 1.1 * RELATIVE_RMS[grad.dtype])


@pytest.mark.parametrize(
    ("config", "M", "N", "K", "rank"),
    [
        ((8, 1), 20, 136, 128, 8),
        ((16, 2), 40, 768, 192, 24),
        ((32, 1), 40, 264, 256, 280),
        ((64, 4), 70, 520, 320, 72),
        ((128, 1), 130, 320, 64, 136),
        ((256, 2), 270, 136, 192, 72),
    ],
)
def test_adapter(kernels, config, M, N, K, rank):  # noqa: F811
    """Ranks below, at and beyond a stage's rows; dS as columns of a wider matrix; added to what is there."""
    grad, w4 = case(M, N, K)
    wide = aligned((M, rank + 24), grad.dtype).copy_(torch.randn(M, rank + 24))
    S, A = wide[:, 8 : 8 + rank], copy_aligned(torch.randn(rank, K).to(grad.dtype))
    expected = float64(grad, w4) + S.double() @ A.double()
    assert_close("dx", gradient(kernels, grad, w4, config, S, A), expected, 1.1 * RELATIVE_RMS[grad.dtype])
    before = torch.randn(M, K).to(grad.dtype)
    added = gradient(kernels, grad, w4, config, S, A, before)
    assert_close("dx + before", added, expected + before.double(), 2 * RELATIVE_RMS[grad.dtype])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("K", [192, 256])
def test_scales(kernels, K, blocksize, double_quant):  # noqa: F811
    """Whole words of scales and single ones, of both kinds, and blocks that go over the end of a row."""
    grad, w4 = case(20, 264, K, blocksize=blocksize, double_quant=double_quant)
    assert_close("dx", gradient(kernels, grad, w4, (32, 1)), float64(grad, w4), 1.1 * RELATIVE_RMS[grad.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_accurate_as_a_decoded_weight(kernels, dtype):  # noqa: F811
    """Against the weight as it is, dX rounded alike: 2.5 thousandths in bfloat16, 2.3 with a decoded weight."""
    w4 = quantize(torch.randn(1024, 256), 64)
    grad = torch.randn(16, 1024).to(dtype)
    expected = float64(grad, w4)
    decoded = (grad.double() @ w4.dequantize(dtype).double()).to(dtype)
    assert relative_rms(gradient(kernels, grad, w4, (16, 1)), expected) < 1.1 * relative_rms(decoded, expected)
