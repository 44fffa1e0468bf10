"""The CUDA kernels' own text, run on a CPU: what a machine without a GPU can say about them (see cuda_on_cpu.h)."""

import ctypes

import pytest
import torch

from qlora_engine import quantize
from qlora_engine.ops import backend
from qlora_engine.quantization.codebook import dynamic_map, midpoints, nf4_levels
from qlora_engine.reference import scale_search
from tests.emulation.build import ALIGNED, build, needs_compiler
from tests.emulation.translate import translate
from tests.numerics import RELATIVE_RMS, assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of csrc/cuda/kernels.h
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIZES = [1, 2, 31, 64, 65, 255, 1024, 1025, 4097, 33_333]
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
GUARD = 64


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return build(tmp_path_factory, "entry.cpp", ALIGNED)


@pytest.fixture(params=[False, True], ids=["rising", "falling"])
def kernels(request, compiled):
    """The kernels, their threads running in rising or in falling order: a missing barrier shows in one of them."""
    compiled.run_threads_in_falling_order(ctypes.c_bool(request.param))
    return compiled


class Weight(ctypes.Structure):
    """Nf4Weight of csrc/cuda/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "codes", "nested_absmax", "nested_offset")),
        ("numel", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("log2_blocksize", ctypes.c_int),
    )

    def __init__(self, numel, packed, absmax, nested_absmax, nested_offset, blocksize):
        nested = nested_absmax is not None
        single, codes = (None, absmax) if nested else (absmax, None)
        pointers = (pointer(t) for t in (packed, single, codes, nested_absmax, nested_offset))
        super().__init__(*pointers, numel, absmax.numel(), blocksize.bit_length() - 1)


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def integer(value):
    return ctypes.c_int64(value)


class Output:
    """A poisoned buffer between two guards."""

    def __init__(self, numel, dtype):
        bytes_ = numel * dtype.itemsize
        self._all = torch.full((GUARD + bytes_ + GUARD,), 0xFF, dtype=torch.uint8)
        self.tensor = self._all[GUARD : GUARD + bytes_].view(dtype)

    def checked(self):
        assert (self._all[:GUARD] == 0xFF).all(), "wrote before the buffer"
        assert (self._all[-GUARD:] == 0xFF).all(), "wrote past the buffer"
        return self.tensor


def sample_weight(size, dtype):
    weight = torch.randn(size) * torch.logspace(-4, 0, size)
    weight[: size // 8] = 0
    if size > 2000:
        weight[size // 4 : size // 4 + 200] = 1e-41
        weight[size // 2], weight[size // 2 + 1] = 40.0, -40.0
        weight[size - 3], weight[size - 2000] = float("nan"), float("inf")
    return weight.to(dtype)


def shifted(tensor):
    """The same numbers one element beyond an aligned address."""
    longer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    longer[1:] = tensor.reshape(-1)
    return longer[1:]


def unpack(packed, size):
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:size].long()


def run_quantize(kernels, weight, blocksize):
    size = weight.numel()
    packed, absmax = Output(-(-size // 2), torch.uint8), Output(-(-size // blocksize), torch.float32)
    arguments = (pointer(packed.tensor), pointer(absmax.tensor))
    dtype = DTYPES.index(weight.dtype)
    assert kernels.run_quantize_nf4(pointer(weight), dtype, integer(size), integer(blocksize), *arguments) == 0
    return packed.checked(), absmax.checked()


def run_quantize_absmax(kernels, absmax, offset, blocksize):
    count = absmax.numel()
    codes, nested = Output(count, torch.uint8), Output(-(-count // blocksize), torch.float32)
    arguments = (integer(count), integer(blocksize), pointer(codes.tensor), pointer(nested.tensor))
    assert kernels.run_quantize_absmax(pointer(absmax), pointer(offset), *arguments) == 0
    return codes.checked(), nested.checked()


def same(a, b):
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


def run_dequantize(kernels, numel, arguments, dtype):
    out = Output(numel, dtype)
    weight = Weight(numel, *arguments)
    assert kernels.run_dequantize_nf4(ctypes.byref(weight), DTYPES.index(dtype), pointer(out.tensor)) == 0
    return out.checked()


def random_weight(numel, blocksize, double_quant):
    """Any bytes are a valid weight."""
    blocks = -(-numel // blocksize)
    packed = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8)
    if not double_quant:
        return packed, torch.rand(blocks), None, None, blocksize
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    return packed, codes, torch.rand(-(-blocks // 256)), torch.tensor(0.5), blocksize


@needs_compiler
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize(kernels, dtype, blocksize):
    thresholds = midpoints(torch.tensor(nf4_levels()))
    for size in SIZES:
        weight = sample_weight(size, dtype)
        packed, absmax = run_quantize(kernels, weight, blocksize)
        blocks = torch.nn.functional.pad(weight.float(), (0, -size % blocksize)).reshape(-1, blocksize)
        blocks = torch.where(blocks.abs() < SMALLEST_NORMAL, 0.0, blocks)
        expected = blocks.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=1)
        assert torch.equal(absmax, expected), size
        scaled = (blocks * (1 / expected).unsqueeze(1)).reshape(-1)[: size + size % 2]
        codes = torch.where(scaled.isnan(), 0, torch.bucketize(scaled, thresholds))
        if codes.numel() < size + size % 2:  # what pads the last byte lies beyond the last block
            codes = torch.cat([codes, codes.new_tensor([7 if expected[-1] else 0])])
        assert torch.equal(unpack(packed, size + size % 2), codes), size
        again = run_quantize(kernels, shifted(weight), blocksize)
        assert torch.equal(packed, again[0]), size
        assert torch.equal(absmax, again[1]), size


@needs_compiler
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantization(kernels, dtype, blocksize):
    """The same codes and scales as alone; the mean of the scales in float64; their codes as given that mean."""
    for size in SIZES if blocksize == 64 else (1, 33_333 if blocksize == 32 else 4097):
        weight = sample_weight(size, dtype)
        blocks = -(-size // blocksize)
        shapes = [(-(-size // 2), torch.uint8), (blocks, torch.uint8), (-(-blocks // 256), torch.float32)]
        outputs = [Output(*shape) for shape in (*shapes, (1, torch.float32), (blocks, dtype))]
        arguments = (pointer(weight), DTYPES.index(dtype), integer(size), integer(blocksize))
        assert kernels.run_quantize_nf4_double(*arguments, *(pointer(o.tensor) for o in outputs)) == 0
        packed, codes, nested, offset, absmax = (o.checked() for o in outputs)
        expected_packed, expected_absmax = run_quantize(kernels, weight, blocksize)
        assert torch.equal(packed, expected_packed), size
        assert torch.equal(absmax.float(), expected_absmax), size
        assert torch.equal(offset, expected_absmax.double().mean().float().reshape(1)), size
        expected = run_quantize_absmax(kernels, expected_absmax, offset, 256)
        assert torch.equal(codes, expected[0]), size
        assert same(nested, expected[1]), size


@needs_compiler
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "blocksize"), [*((d, 64) for d in DTYPES), *((DTYPES[i % 3], b) for i, b in enumerate(BLOCKSIZES))]
)
def test_searched_scales(kernels, dtype, blocksize, signed):
    """Equal to the reference, but blocks that keep their absmax are quantized as quantize_nf4 does here."""
    for size in (1, 65, 4500) if blocksize == 64 else (2501,):
        weight = sample_weight(size, dtype)
        arguments = (DTYPES.index(dtype), integer(size), integer(blocksize), ctypes.c_bool(signed))
        results = []
        for source in (weight, shifted(weight)):
            packed, absmax = Output(-(-size // 2), torch.uint8), Output(-(-size // blocksize), torch.float32)
            outputs = (pointer(packed.tensor), pointer(absmax.tensor))
            assert kernels.run_quantize_nf4_search(pointer(source), *arguments, *outputs) == 0
            results.append((packed.checked(), absmax.checked()))
        assert torch.equal(results[0][0], results[1][0]), size
        assert torch.equal(results[0][1], results[1][1]), size

        packed, absmax = results[0]
        blocks = torch.nn.functional.pad(weight.float(), (0, -size % blocksize)).reshape(-1, blocksize)
        _, found = scale_search.search_scales(blocks, blocksize, signed)
        expected_packed, expected_absmax = scale_search.quantize_nf4_search(weight, blocksize, signed)
        plain_packed, plain_absmax = run_quantize(kernels, weight, blocksize)
        of_byte = found.repeat_interleave(blocksize // 2)[: packed.numel()]
        has_nan = blocks.isnan().any(dim=1)  # the search takes it for a zero
        kept = ~found & ~has_nan
        assert torch.equal(absmax[found], expected_absmax[found]), size
        assert torch.equal(packed[of_byte], expected_packed[of_byte]), size
        assert torch.equal(absmax[kept], plain_absmax[kept]), size
        of_byte = kept.repeat_interleave(blocksize // 2)[: packed.numel()]
        assert torch.equal(packed[of_byte], plain_packed[of_byte]), size
        assert not absmax[has_nan].isnan().any(), size


def binary_search(levels, x):
    """Codes as bitsandbytes' CUDA kernels find them (csrc/kernels.cu, dQuantize)."""
    low, high, at = torch.zeros_like(x).long(), torch.full_like(x, 255).long(), torch.full_like(x, 127).long()
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = x > levels[at]
        low, high = torch.where(above, at, low), torch.where(above, high, at)
        at = torch.where(above, at + step, at - step)
    here = levels[at]
    up = torch.where(x > (levels[high] + here) * 0.5, high, at)
    return torch.where(x > here, up, torch.where(x < (levels[low] + here) * 0.5, low, at))


@needs_compiler
def test_scale_codes_are_those_of_the_binary_search(kernels):
    levels = torch.tensor(dynamic_map())
    between = midpoints(levels)
    around = [between.nextafter(torch.tensor(to)) for to in (-2.0, 2.0)]
    numbers = torch.cat([levels, between, *around, torch.rand(20_000) * 2 - 1, torch.logspace(-12, 0, 2000)])
    groups = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 255)).reshape(-1, 255)
    scales = torch.cat([groups, torch.ones(len(groups), 1)], dim=1).reshape(-1)  # every group's largest is 1
    codes, nested = run_quantize_absmax(kernels, scales, torch.zeros(1), 256)
    assert (nested == 1).all()
    assert torch.equal(codes.long(), binary_search(levels, scales))


@needs_compiler
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_scales(kernels, count, blocksize):
    absmax, offset = torch.rand(count), torch.tensor(0.5)
    absmax[-2:] = 0.5  # at 257 and 1, a group without spread
    codes, nested = run_quantize_absmax(kernels, absmax, offset, blocksize)

    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -count % blocksize)).reshape(-1, blocksize)
    assert torch.equal(nested, blocks.abs().amax(dim=1))
    levels = torch.tensor(dynamic_map())
    scaled = centred / nested.repeat_interleave(blocksize)[:count]
    chosen = (levels[codes.long()] - scaled).abs()
    best = (levels - scaled.unsqueeze(1)).abs().amin(dim=1)
    assert ((chosen - best)[scaled.isfinite()] < 1e-6).all()  # halfway between two levels, either is right
    assert not codes[scaled.isnan()].any()

    decoded = Output(count, torch.float32)
    sizes = (integer(count), integer(blocksize))
    arguments = (pointer(codes), pointer(nested), pointer(offset), *sizes, pointer(decoded.tensor))
    assert kernels.run_dequantize_absmax(*arguments) == 0
    expected = backend.reference_operator("dequantize_absmax")(codes, nested, offset, blocksize)
    assert torch.equal(decoded.checked(), expected)


@needs_compiler
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(kernels, dtype, blocksize, double_quant):
    for size in SIZES:
        packed, *scales = random_weight(size, blocksize, double_quant)
        expected = backend.reference_operator("dequantize_nf4")(packed, *scales, [size], dtype)
        assert torch.equal(run_dequantize(kernels, size, (packed, *scales), dtype), expected), size
        assert torch.equal(run_dequantize(kernels, size, (shifted(packed), *scales), dtype), expected), size


@needs_compiler
@pytest.mark.slow
def test_dequantize_where_every_block_takes_one_tile(compiled):
    size = 2**25 + 13  # from 2**25 on
    arguments = random_weight(size, 64, True)
    expected = backend.reference_operator("dequantize_nf4")(*arguments, [size], torch.bfloat16)
    assert torch.equal(run_dequantize(compiled, size, arguments, torch.bfloat16), expected)


@needs_compiler
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize"),
    [
        (1, 50, 64, 64),
        (2, 15, 128, 64),
        (3, 33, 192, 64),
        (5, 16, 1088, 64),
        (8, 100, 2048, 64),
        (7, 21, 4096, 128),
        (8, 20, 4096, 1024),
        (4, 17, 8192, 4096),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows(kernels, dtype, M, N, K, blocksize, double_quant):
    arguments = quantize(torch.randn(N, K), blocksize, double_quant).arguments
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    weight = backend.reference_operator("dequantize_nf4")(*arguments, [N, K], torch.float32).double()
    for b in (None, bias):
        y = Output(M * N, dtype)
        sizes = (integer(M), integer(N), integer(K))
        operands = (pointer(x), ctypes.byref(Weight(N * K, *arguments)), pointer(b))
        assert kernels.run_linear_nf4(*operands, DTYPES.index(dtype), pointer(y.tensor), *sizes) == 0
        expected = x.double() @ weight.T + (0 if b is None else b.double())
        assert_close("y", y.checked().view(M, N), expected, RELATIVE_RMS[dtype])


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "M", "K", "blocksize"),
    [
        (torch.float32, 1, 128, 64),
        (torch.float16, 9, 128, 64),
        (torch.float16, 1, 96, 64),
        (torch.float16, 1, 64, 32),
    ],
)
def test_products_that_few_rows_leaves_to_others(compiled, dtype, M, K, blocksize):
    arguments = random_weight(16 * K, blocksize, False)
    x, y = torch.randn(M, K).to(dtype), Output(M * 16, dtype)
    operands = (pointer(x), ctypes.byref(Weight(16 * K, *arguments)), None)
    sizes = (integer(M), integer(16), integer(K))
    assert compiled.run_linear_nf4(*operands, DTYPES.index(dtype), pointer(y.tensor), *sizes) == -1


@needs_compiler
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize", "tokens", "splits"),
    [
        (9, 50, 64, 64, 16, 1),
        (16, 130, 704, 64, 16, 3),
        (33, 136, 320, 64, 32, 1),
        (20, 21, 4096, 128, 32, 16),
        (70, 264, 448, 64, 64, 2),
        (50, 77, 192, 64, 64, 4),
        (130, 264, 256, 256, 128, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sm80(kernels, dtype, M, N, K, blocksize, tokens, splits, double_quant):
    """Ragged tiles of every size, parts of K (also none for some), scales over two orders of magnitude."""
    scale = torch.logspace(-2, 0, N).unsqueeze(1)
    arguments = quantize(torch.randn(N, K) * scale, blocksize, double_quant).arguments
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    weight = backend.reference_operator("dequantize_nf4")(*arguments, [N, K], dtype).double()
    y = Output(M * N, dtype)
    operands = (pointer(x), ctypes.byref(Weight(N * K, *arguments)), pointer(bias))
    sizes = (integer(M), integer(N), integer(K), tokens, splits)
    assert kernels.run_linear_nf4_sm80(*operands, DTYPES.index(dtype), pointer(y.tensor), *sizes) == 0
    expected = x.double() @ weight.T + bias.double()
    # one rounding, that of y: every element of W is the dequantized one
    bound = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}[dtype]
    assert_close("y", y.checked().view(M, N), expected, bound)


@needs_compiler
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("M", "N", "K", "blocksize"),
    [
        (1, 4, 64, 64),
        (3, 100, 320, 64),
        (8, 1100, 256, 64),
        (9, 20, 192, 64),
        (12, 900, 64, 64),
        (16, 200, 704, 128),
        (17, 132, 448, 64),
        (20, 700, 64, 64),
        (32, 36, 512, 512),
        (33, 72, 128, 64),
        (40, 404, 64, 64),
        (64, 148, 640, 4096),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_few_rows_backward(kernels, dtype, M, N, K, blocksize, double_quant):
    scale = torch.logspace(-2, 0, N).unsqueeze(1)
    arguments = quantize(torch.randn(N, K) * scale, blocksize, double_quant).arguments
    grad = torch.randn(M, N).to(dtype)
    weight = backend.reference_operator("dequantize_nf4")(*arguments, [N, K], dtype).double()
    dx = Output(M * K, dtype)
    operands = (pointer(grad), ctypes.byref(Weight(N * K, *arguments)), DTYPES.index(dtype), pointer(dx.tensor))
    assert kernels.run_linear_nf4_backward(*operands, integer(M), integer(N), integer(K)) == 0
    # one rounding, that of dX: every element of W is the dequantized one
    assert_close(
        "dx", dx.checked().view(M, K), grad.double() @ weight, {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}[dtype]
    )


def test_unknown_instructions_stop_the_translation():
    with pytest.raises(NotImplementedError, match=r"does not know the PTX instruction cp\.async\.wait_all"):
        translate('asm volatile("cp.async.wait_all ;");\n')


@needs_compiler
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_matrices(kernels, dtype, out_dtype):
    first, second = torch.randn(3001).to(dtype), torch.randn(17).to(dtype)
    outputs = [torch.full((t.numel() + GUARD,), float("nan"), dtype=out_dtype) for t in (first, second)]
    operands = [pointer(t) for t in (first, second, *outputs)]
    counts = [ctypes.c_int64(t.numel()) for t in (first, second)]
    kernels.run_round_matrices(*operands, *counts, ctypes.c_float(0.75), DTYPES.index(dtype), DTYPES.index(out_dtype))
    for out, expected in zip(outputs, ((first.float() * 0.75), second.float()), strict=True):
        assert torch.equal(out[:-GUARD], expected.to(out_dtype))
        assert out[-GUARD:].isnan().all()
