"""Every instruction set's CPU kernels: bit equality with bitsandbytes, products against float64.

Kernels are chosen once in a process, so each set runs in a worker process of its own.
"""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine import ops
from qlora_engine.ops import backend
from qlora_engine.quantization.codebook import dynamic_map, level_tensor, midpoints, nf4_levels
from qlora_engine.reference import scale_search
from tests.numerics import RELATIVE_RMS, assert_close, size_of_sums

pytestmark = pytest.mark.skipif(
    backend.implementation("linear_nf4", "cpu") != "compiled", reason="the CPU operators are not compiled"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["avx512bf16", "avx512", "avx2", "baseline"]  # fastest first
CPU = torch.device("cpu")


def call_operator(name, *arguments, threads=None):
    """Runs in the worker. Fresh memory holds NaN there, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if threads:
        torch.set_num_threads(threads)
    return getattr(torch.ops.qlora_engine, name)(*arguments)


class Worker:
    """A process that runs operators with one set of kernels."""

    def __init__(self, kernels: str):
        before = os.environ.get("QLORA_ENGINE_CPU")
        os.environ["QLORA_ENGINE_CPU"] = kernels
        try:
            self.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self.name = self.pool.submit(backend.cpu_kernels).result()
        finally:
            os.environ.pop("QLORA_ENGINE_CPU")
            if before is not None:
                os.environ["QLORA_ENGINE_CPU"] = before

    def __call__(self, name, *arguments, threads=None):
        return self.pool.submit(call_operator, name, *arguments, threads=threads).result()


@pytest.fixture(scope="module", params=KERNELS)
def run(request):
    """run(operator, *arguments) with one set of kernels."""
    worker = Worker(request.param)
    if worker.name is None:
        worker.pool.shutdown()
        pytest.skip(f"this processor does not run {request.param}")
    assert worker.name == request.param
    yield worker
    worker.pool.shutdown()


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes").functional


def sizes_of(blocksize):
    """One element to several blocks; odd counts, and every way the last block can be short of a vector."""
    return [1, 2, 15, 31, 33, blocksize - 1, blocksize, 3 * blocksize + 17, 5 * blocksize + blocksize // 2]


def around_midpoints(size):
    """Values on and next to every threshold of a block whose largest is 1."""
    at = midpoints(level_tensor(nf4_levels(), CPU))
    values = torch.cat([at, at.nextafter(torch.tensor(2.0)), at.nextafter(torch.tensor(-2.0)), torch.tensor([1.0])])
    return values.repeat(size // len(values) + 1)[:size]


WEIGHTS = {
    "normal": lambda n: torch.randn(n),
    "ties": around_midpoints,
    "subnormal": lambda n: torch.randn(n) * 1e-40,
    "small": lambda n: torch.rand(n) * -1e-38,
    "large": lambda n: (torch.rand(n) - 0.5) * 6e38,
    "zeros": lambda n: torch.zeros(n).index_fill(0, torch.arange(0, n, 2), -0.0),
    "infinite": lambda n: torch.randn(n).index_fill(0, torch.arange(0, n, 131), float("inf")),
    "nan": lambda n: torch.randn(n).index_fill(0, torch.arange(0, n, 97), float("nan")),
}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_bitsandbytes(run, bitsandbytes, dtype, kind):
    for blocksize in (32, 64, 512, 4096):
        for size in sizes_of(blocksize):
            weight = WEIGHTS[kind](size).to(dtype)
            expected, state = bitsandbytes.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
            packed, absmax = run("quantize_nf4", weight, blocksize)
            assert torch.equal(packed, expected.view(-1)), (blocksize, size)
            assert same(absmax, state.absmax), (blocksize, size)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_searched_scales_equal_the_reference(run, dtype, kind):
    for blocksize in (32, 512):
        for size in sizes_of(blocksize):
            weight = WEIGHTS[kind](size).to(dtype)
            for signed in (False, True):
                expected = scale_search.quantize_nf4_search(weight, blocksize, signed)
                packed, absmax = run("quantize_nf4_search", weight, blocksize, signed)
                assert torch.equal(packed, expected[0]), (blocksize, size, signed)
                assert same(absmax, expected[1]), (blocksize, size, signed)


SCALES = {
    "uniform": lambda n: torch.rand(n),
    "values and midpoints of the map": lambda n: torch.cat(
        [level_tensor(dynamic_map(), CPU), midpoints(level_tensor(dynamic_map(), CPU))]
    ).repeat(n // 511 + 1)[:n],
    "zeros": torch.zeros,
    "subnormal": lambda n: torch.rand(n) * 1e-40,
    "large": lambda n: torch.rand(n) * 1e30,
}


@pytest.mark.parametrize("kind", SCALES)
def test_scales_equal_bitsandbytes(run, bitsandbytes, kind):
    code = bitsandbytes.create_dynamic_map()
    for count in (1, 255, 256, 257, 5000, 40_000):
        scales = SCALES[kind](count)
        for offset in (scales.mean(), torch.tensor(0.0)):
            expected, state = bitsandbytes.quantize_blockwise(scales - offset, code=code, blocksize=256)
            codes, nested = run("quantize_absmax", scales, offset, 256)
            assert torch.equal(codes, expected), count
            assert torch.equal(nested, state.absmax), count
            decoded = bitsandbytes.dequantize_blockwise(expected, state) + offset
            assert torch.equal(run("dequantize_absmax", codes, nested, offset, 256), decoded), count


def random_weight(numel, blocksize, double_quant=False, scale=1.0):
    """Tensors of a weight with random codes."""
    packed = torch.randint(0, 256, ((numel + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand(-(-numel // blocksize)) * scale
    if not double_quant:
        return packed, absmax, None, None, blocksize
    codes, nested, offset = ops.quantize_absmax(absmax)
    return packed, codes, nested, offset, blocksize


def decoded(weight, shape, dtype):
    """round(level * scale) by torch itself."""
    packed, absmax, nested, offset, blocksize = weight
    if nested is not None:
        absmax = (
            level_tensor(dynamic_map(), CPU)[absmax.long()] * nested.repeat_interleave(256)[: len(absmax)] + offset
        )
    numel = torch.Size(shape).numel()
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[:numel].long()
    return (
        (level_tensor(nf4_levels(), CPU)[codes] * absmax.repeat_interleave(blocksize)[:numel])
        .to(dtype)
        .reshape(shape)
    )


# 1e-39: results are subnormal, which bitsandbytes' AVX-512 bfloat16 flushes to zero. 1e5: too large for float16.
@pytest.mark.parametrize("scale", [1.0, 1e-39, 1e-6, 1e5])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(run, dtype, double_quant, scale):
    for blocksize in (32, 64, 1024, 4096):
        for size in sizes_of(blocksize):
            weight = random_weight(size, blocksize, double_quant, scale)
            actual = run("dequantize_nf4", *weight, [size], dtype)
            assert torch.equal(actual, decoded(weight, [size], dtype)), (blocksize, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_bitsandbytes(run, bitsandbytes, dtype):
    for blocksize in (32, 64, 256, 1024):
        for size in sizes_of(blocksize):
            for double_quant in (False, True):
                packed, state = bitsandbytes.quantize_4bit(
                    torch.randn(size).to(dtype),
                    blocksize=blocksize,
                    quant_type="nf4",
                    compress_statistics=double_quant,
                )
                nested = (state.state2.absmax, state.offset) if double_quant else (None, None)
                actual = run("dequantize_nf4", packed.view(-1), state.absmax, *nested, blocksize, [size], dtype)
                expected = bitsandbytes.dequantize_4bit(packed, state).view(-1)  # [n, 1] where one byte is packed
                assert torch.equal(actual, expected), (blocksize, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_larger_than_the_caches(run, dtype):
    """Written around them, by every thread, up to an odd last element."""
    shape = [(9 << 20) + 77]
    weight = random_weight(shape[0], 64, double_quant=True)
    assert torch.equal(run("dequantize_nf4", *weight, shape, dtype), decoded(weight, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_float32_rounds_as_torch_rounds(run, dtype):
    """Level 1.0 times a scale is the scale: 2**17 bit patterns spread over all of float32."""
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // (1 << 17), dtype=torch.int64)
    absmax = (bits + torch.randint(0, 1 << 13, bits.shape)).clamp(max=0x7F7FFFFF).to(torch.int32).view(torch.float32)
    packed = torch.full((len(absmax) * 16,), 0xF0, dtype=torch.uint8)  # 1, -1, 1, ...
    actual = run("dequantize_nf4", packed, absmax, None, None, 32, [len(absmax), 32], dtype)
    assert torch.equal(actual[:, 0], absmax.to(dtype))
    assert torch.equal(actual[:, 1], -absmax.to(dtype))


def check_products(run, M, N, K, dtype, blocksize, double_quant, bias, threads=None):
    weight = random_weight(N * K, blocksize, double_quant)
    dense = decoded(weight, [N, K], dtype).double()
    x, grad = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    b = torch.randn(N).to(dtype) if bias else None
    y = run("linear_nf4", x, *weight, N, b, threads=threads)
    assert y.dtype == dtype
    expected = F.linear(x.double(), dense, b.double() if bias else None)
    assert_close("y", y, expected, RELATIVE_RMS[dtype], size_of_sums(x, dense.T) + (b.double().abs() if bias else 0))
    dx = run("linear_nf4_backward", grad, *weight, K, threads=threads)
    assert dx.dtype == dtype
    assert_close("dx", dx, grad.double() @ dense, RELATIVE_RMS[dtype], size_of_sums(grad, dense))


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 60),
    N=st.integers(1, 140),
    K=st.integers(1, 600),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 1024]),
    double_quant=st.booleans(),
    bias=st.booleans(),
)
def test_products_of_any_shape(run, M, N, K, dtype, blocksize, double_quant, bias):
    check_products(run, M, N, K, dtype, blocksize, double_quant, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 64, 4096),
        (1, 150, 9000),  # more columns than a cache holds sums of
        (2, 70, 1030),
        (4, 70, 1030),
        (5, 70, 1030),
        (13, 33, 513),  # one step beyond two chunks of K
        (400, 192, 576),
        (1600, 40, 70),  # more rows than are packed at a time
    ],
)
def test_products(run, dtype, M, N, K):
    check_products(run, M, N, K, dtype, 64, True, True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 300, 50), (2, 50, 700), (3, 50, 300), (50, 20, 30), (90, 31, 300), (25, 300, 31)]
)
def test_any_number_of_threads(run, threads, M, N, K):
    """Fewer panels than threads, and threads without work."""
    check_products(run, M, N, K, torch.float32, 64, False, True, threads)


def at_offset(tensor, offset):
    """The same numbers at an address that is `offset` elements off any alignment."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    storage[offset:] = tensor.reshape(-1)
    return storage[offset:].view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address(dtype):
    """In this process, with its own kernels: a worker would receive aligned copies."""
    packed, absmax, _, _, blocksize = random_weight(96 * 70, 64)
    x, bias = torch.randn(9, 70).to(dtype), torch.randn(96).to(dtype)
    expected = ops.linear_nf4(x, packed, absmax, None, None, blocksize, 96, bias)
    moved = at_offset(packed, 1), at_offset(absmax, 1), None, None, blocksize
    assert torch.equal(ops.linear_nf4(at_offset(x, 1), *moved, 96, at_offset(bias, 3)), expected)
    shape = [96, 70]
    assert torch.equal(
        ops.dequantize_nf4(*moved, shape, dtype), decoded((packed, absmax, None, None, 64), shape, dtype)
    )
    wide = torch.randn(64 * 9 + 5).to(dtype)
    for ours, wanted in zip(ops.quantize_nf4(at_offset(wide, 1), 64), ops.quantize_nf4(wide, 64), strict=True):
        assert torch.equal(ours, wanted)


def test_kernels_that_do_not_exist():
    code = "import torch, qlora_engine as qe; qe.quantize(torch.ones(64))"
    environment = os.environ | {"QLORA_ENGINE_CPU": "sse9", "QLORA_ENGINE_BACKEND": "compiled"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0
    assert "QLORA_ENGINE_CPU=sse9; expected avx512bf16, avx512, avx2" in done.stderr


def test_the_kernels_in_use_have_a_name():
    assert backend.cpu_kernels() in KERNELS
