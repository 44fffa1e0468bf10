"""The fused products for Hopper, their own text run on a CPU (see hopper_on_cpu.h)."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from qlora_engine import quantize
from tests.emulation.build import build, needs_compiler
from tests.emulation.test_cuda_kernels_on_cpu import DTYPES, Weight, pointer
from tests.numerics import RELATIVE_RMS, assert_close

pytestmark = needs_compiler
BF16 = DTYPES.index(torch.bfloat16)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return build(tmp_path_factory, "entry_sm90.cpp", ["-O2", "-Wno-psabi"], hopper=True)


@pytest.fixture(params=["at once", "late copies", "late products"])
def kernels(request, compiled):
    """What is asynchronous happens at once or late, threads run in rising or in falling order."""
    late_copies, late_products = request.param == "late copies", request.param == "late products"
    compiled.run_at_once(ctypes.c_bool(not late_copies), ctypes.c_bool(not late_products))
    compiled.run_threads_in_falling_order(ctypes.c_bool(late_copies))
    return compiled


def aligned(shape, dtype):
    """Memory at a multiple of 16, poisoned, with room behind it."""
    numel = torch.Size(shape).numel()
    raw = torch.full((numel + 64,), float("nan"), dtype=dtype)
    start = -raw.data_ptr() % 16 // raw.element_size()
    return raw[start : start + numel].view(shape)


def copy_aligned(tensor):
    return aligned(tensor.shape, tensor.dtype).copy_(tensor)


def fused(kernels, x, w4, config, bias=None, S=None, B=None, run=None):
    """y of the kernel for many rows in a configuration, or of `run`; None: of the kernel for few."""
    M, (N, K) = x.shape[0], w4.shape
    packed = torch.zeros(w4.packed.numel() + 64, dtype=torch.uint8)
    start = -packed.data_ptr() % 16
    packed = packed[start : start + w4.packed.numel()].copy_(w4.packed)
    x, y = copy_aligned(x), aligned((M, N), x.dtype)
    weight = Weight(N * K, packed, *w4.arguments[1:])
    numbers = [ctypes.c_int64(n) for n in (M, N, K)]
    run = run or (kernels.run_few_rows_sm90 if config is None else kernels.run_linear_sm90)
    if config is not None:
        pitch, rank = (0, 0) if S is None else (S.stride(0), S.shape[1])
        numbers += [pointer(S), ctypes.c_int64(pitch), pointer(B), ctypes.c_int64(rank)]
        numbers += [ctypes.c_int(n) for n in config]
    error = run(
        pointer(x), ctypes.byref(weight), pointer(bias), ctypes.c_int(DTYPES.index(x.dtype)), pointer(y), *numbers
    )
    assert error == 0
    return y


def case(M, N, K, dtype=torch.bfloat16, blocksize=64, double_quant=True):
    return torch.randn(M, K).to(dtype), quantize(torch.randn(N, K), blocksize, double_quant)


@pytest.mark.parametrize("config", [(16, 1, 1), (64, 1, 1), (128, 1, 1), (256, 1, 1)])
@pytest.mark.parametrize(("M", "N", "K"), [(9, 200, 320), (70, 136, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(kernels, dtype, M, N, K, config):
    x, w4 = case(M, N, K, dtype)
    bias = torch.randn(N).to(dtype)
    expected = x.double() @ w4.dequantize(dtype).double().T + bias.double()
    assert_close("y", fused(kernels, x, w4, config, bias), expected, RELATIVE_RMS[dtype])


@pytest.mark.parametrize("config", [(16, 1, 2), (32, 1, 8), (128, 1, 2), (256, 2, 1)])
@pytest.mark.parametrize(("M", "N", "K"), [(33, 77, 704)])
def test_clusters(kernels, M, N, K, config):
    x, w4 = case(M, N, K)
    expected = x.double() @ w4.dequantize(x.dtype).double().T
    assert_close("y", fused(kernels, x, w4, config), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize(
    ("config", "M", "N", "K", "rank"),
    [
        ((16, 1, 1), 40, 140, 128, 8),
        ((64, 1, 4), 70, 77, 320, 72),
        ((128, 1, 1), 130, 264, 320, 136),
        ((256, 1, 1), 300, 264, 128, 16),
        ((256, 2, 1), 270, 200, 64, 40),
        ((256, 1, 2), 33, 131, 704, 64),
    ],
)
def test_adapter(kernels, config, M, N, K, rank):
    """Several tiles a block, odd N, ranks below, at and beyond a tile's columns; S as columns of a wider matrix."""
    x, w4 = case(M, N, K)
    wide = aligned((M, rank + 24), x.dtype).copy_(torch.randn(M, rank + 24))
    S, B = wide[:, 8 : 8 + rank], copy_aligned(torch.randn(N, rank).to(x.dtype))
    bias = torch.randn(N).to(x.dtype)
    expected = x.double() @ w4.dequantize(x.dtype).double().T + S.double() @ B.double().T + bias.double()
    assert_close("y", fused(kernels, x, w4, config, bias, S, B), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize("config", [(32, 1, 1), (256, 1, 1)])
def test_more_tiles_than_blocks(kernels, config):
    x, w4 = case(300 if config[0] == 256 else 70, 400, 128)
    expected = x.double() @ w4.dequantize(x.dtype).double().T
    assert_close("y", fused(kernels, x, w4, config), expected, RELATIVE_RMS[x.dtype])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [128, 512])
def test_larger_blocks(kernels, blocksize, double_quant):
    x, w4 = case(20, 130, 1024, blocksize=blocksize, double_quant=double_quant)
    y = fused(kernels, x, w4, (32, 1, 1))
    assert_close("y", y, F.linear(x.double(), w4.dequantize(x.dtype).double()), RELATIVE_RMS[x.dtype])


def test_weights_are_decoded_as_dequantize_does(kernels):
    _, w4 = case(1, 130, 128)
    w4 = quantize(torch.randn(130, 128) * torch.logspace(-6, 1, 130).unsqueeze(1), 64)
    eye = torch.eye(128, dtype=torch.bfloat16)
    assert torch.equal(fused(kernels, eye, w4, (128, 1, 1)), w4.dequantize(torch.bfloat16).T)


# On two multiprocessors: one panel of 8 rows to twenty, odd numbers of them, a last one that is not whole; up to 8
# rows of x take chunks of 4096 columns and more take 2048: less than one, one, and several
@pytest.mark.parametrize("N", [3, 17, 40, 64, 120, 305])
@pytest.mark.parametrize(
    ("M", "K", "blocksize"),
    [(1, 64, 64), (3, 1088, 64), (8, 4672, 64), (2, 8448, 256), (16, 4352, 64), (9, 2048, 128)],
)
def test_few_rows(kernels, M, K, N, blocksize):
    dtype, double_quant = (torch.bfloat16, torch.float16)[N % 2], N % 3 > 0
    x, w4 = case(M, N, K, dtype, blocksize, double_quant)
    bias = torch.randn(N).to(dtype)
    weight = w4.dequantize(dtype).double()
    size = (x.double().square() @ weight.square().T).sqrt()
    y = fused(kernels, x, w4, None, bias)
    assert_close("y", y, x.double() @ weight.T + bias.double(), 1.5 * RELATIVE_RMS[dtype], size)
