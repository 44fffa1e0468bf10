"""What only the CUDA kernels promise: equality with bitsandbytes there, streams, graphs, memory, any address."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.quantization.codebook import dynamic_map, midpoints, nf4_levels
from tests.numerics import RELATIVE_RMS, assert_close

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SIZES = [1, 2, 31, 64, 65, 1023, 4096, 4097, 33_333, 300_001]
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def sample_weight(size, dtype):
    """Blocks of zeros, subnormal numbers, large ones of both signs, and scales over four orders of magnitude."""
    weight = torch.randn(size, device="cuda") * torch.logspace(-4, 0, size, device="cuda")
    weight[: size // 8] = 0
    if size > 2000:
        weight[size // 4 : size // 4 + 200] = 1e-41
        weight[size // 2], weight[size // 2 + 1] = 40.0, -40.0
    return weight.to(dtype)


def unpack(packed, size):
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:size].long()


def misaligned(tensor):
    """The same numbers one element beyond an aligned address."""
    longer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    longer[1:] = tensor.reshape(-1)
    return longer[1:].view(tensor.shape)


def random_weight(N, K, blocksize=64, double_quant=True):
    return quantize(torch.randn(N, K, device="cuda"), blocksize, double_quant)


# Quantize


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_bitsandbytes(dtype, blocksize, size, poisoned_memory):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = sample_weight(size, dtype)
    expected, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type="nf4", compress_statistics=False
    )
    torch.cuda.synchronize()  # bitsandbytes quantizes on the default stream
    packed, absmax = ops.quantize_nf4(weight, blocksize)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(packed, expected.view(-1))


@pytest.mark.parametrize("size", [64, 4097, 300_001, 2_000_003])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_double_quantization_equals_bitsandbytes(blocksize, size, poisoned_memory):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = sample_weight(size, torch.bfloat16)
    _, state = functional.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    torch.cuda.synchronize()
    _, absmax = ops.quantize_nf4(weight, blocksize)
    codes, nested = torch.ops.qlora_engine.quantize_absmax(absmax, state.offset, 256)
    assert torch.equal(codes, state.absmax)
    assert torch.equal(nested, state.state2.absmax)
    ours = quantize(weight, blocksize)  # its own mean, which bitsandbytes sums in float32
    assert (ours.nested_offset / state.offset - 1).abs() < 1e-6
    assert (ours.absmax == state.absmax).float().mean() > 0.99


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_in_float32_arithmetic(dtype, blocksize, size, poisoned_memory):
    """Against tensor arithmetic: equal, but where the approximate reciprocal moves a number over a threshold."""
    weight = sample_weight(size, dtype)
    packed, absmax = ops.quantize_nf4(weight, blocksize)

    blocks = torch.nn.functional.pad(weight.float(), (0, -size % blocksize)).reshape(-1, blocksize)
    expected_absmax = blocks.abs().amax(dim=1)
    expected_absmax[expected_absmax < SMALLEST_NORMAL] = 0
    assert torch.equal(absmax, expected_absmax)

    scaled = (blocks / expected_absmax.unsqueeze(1)).reshape(-1)[:size]
    thresholds = midpoints(torch.tensor(nf4_levels(), device="cuda"))
    expected = torch.bucketize(scaled, thresholds)
    zero = expected_absmax.repeat_interleave(blocksize)[:size] == 0
    expected[zero] = 0
    codes = unpack(packed, size)
    differ = codes != expected
    nearest = (scaled[differ].unsqueeze(1) - thresholds).abs().amin(dim=1)
    assert (nearest < 1e-6).all()
    assert ((codes - expected)[differ].abs() == 1).all()
    if size % 2:  # the code of a number 0 pads the last byte
        assert packed[-1] & 15 == (0 if zero[-1] else 7)


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 10_001])
def test_scales_get_their_nearest_level(count, blocksize, poisoned_memory):
    scales = torch.rand(count, device="cuda")
    offset = scales.mean()
    codes, nested = torch.ops.qlora_engine.quantize_absmax(scales, offset, blocksize)
    centred = scales - offset
    blocks = torch.nn.functional.pad(centred, (0, -count % blocksize)).reshape(-1, blocksize)
    assert torch.equal(nested, blocks.abs().amax(dim=1))
    levels = torch.tensor(dynamic_map(), device="cuda")
    scaled = centred / nested.repeat_interleave(blocksize)[:count]
    chosen = (levels[codes.long()] - scaled).abs()
    best = (levels - scaled.unsqueeze(1)).abs().amin(dim=1)
    assert ((chosen - best)[scaled.isfinite()] < 1e-6).all()  # halfway between two levels, either is right


def test_scales_without_spread_get_code_zero():
    codes, nested = torch.ops.qlora_engine.quantize_absmax(
        torch.ones(300, device="cuda"), torch.ones((), device="cuda"), 256
    )
    assert not codes.any()
    assert not nested.any()


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_reads_from_any_address(dtype, blocksize):
    weight = sample_weight(10_001, dtype)
    for aligned, shifted in zip(
        ops.quantize_nf4(weight, blocksize), ops.quantize_nf4(misaligned(weight), blocksize), strict=True
    ):
        assert torch.equal(aligned, shifted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite(dtype):
    """A NaN keeps out of the maximum and gets code 0; an infinity is its block's scale."""
    weight = torch.full((128,), 0.5, device="cuda", dtype=dtype)
    weight[3], weight[70] = float("nan"), float("inf")
    packed, absmax = ops.quantize_nf4(weight, 64)
    codes = unpack(packed, 128)
    assert absmax.tolist() == [0.5, float("inf")]
    assert codes[3] == 0
    assert (codes[[0, 1, 2, 4, 63]] == 15).all()
    assert codes[70] == 0
    assert (codes[[64, 71, 127]] == 7).all()


# Dequantize


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_bitsandbytes(dtype, blocksize, size, double_quant, poisoned_memory):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = sample_weight(size, dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
    )
    expected = functional.dequantize_4bit(packed, state)
    torch.cuda.synchronize()
    nested = (state.state2.absmax, state.offset) if double_quant else (None, None)
    actual = ops.dequantize_nf4(packed.view(-1), state.absmax, *nested, blocksize, [size], dtype)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_products_are_zero_as_in_bitsandbytes(dtype, double_quant):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(4096, device="cuda") * 1e-38
    packed, state = functional.quantize_4bit(
        weight.to(torch.float32), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    state.dtype = dtype
    expected = functional.dequantize_4bit(packed, state)
    torch.cuda.synchronize()
    nested = (state.state2.absmax, state.offset) if double_quant else (None, None)
    actual = ops.dequantize_nf4(packed.view(-1), state.absmax, *nested, 64, [4096], dtype)
    assert torch.equal(actual, expected)


# one more than the size from which blocks no longer loop over tiles, and an odd rest
@pytest.mark.parametrize("size", [2**25 - 1, 2**25 + 13])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_in_float32_arithmetic(dtype, double_quant, size, poisoned_memory):
    blocks = -(-size // 64)
    packed = torch.randint(0, 256, ((size + 1) // 2,), dtype=torch.uint8, device="cuda")
    levels = torch.tensor(nf4_levels(), device="cuda")
    if double_quant:
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        nested = (torch.rand(-(-blocks // 256), device="cuda"), torch.tensor(0.5, device="cuda"))
        scale = torch.tensor(dynamic_map(), device="cuda")[codes.long()]
        absmax = scale * nested[0].repeat_interleave(256)[:blocks] + nested[1]
        arguments = (packed, codes, *nested)
    else:
        absmax = torch.rand(blocks, device="cuda")
        arguments = (packed, absmax, None, None)
    expected = (levels[unpack(packed, size)] * absmax.repeat_interleave(64)[:size]).to(dtype)
    assert torch.equal(ops.dequantize_nf4(*arguments, 64, [size], dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_reads_from_any_address(dtype):
    w4 = random_weight(33, 129)
    packed, *scales = w4.arguments
    expected = ops.dequantize_nf4(packed, *scales, [33, 129], dtype)
    assert torch.equal(ops.dequantize_nf4(misaligned(packed), *scales, [33, 129], dtype), expected)


def test_more_elements_than_32_bits_count(poisoned_memory):
    """2**31 + 65 elements: the blocks around 2**31 and the odd rest are what they are on their own."""
    size, start = 2**31 + 65, 2**31 - 4096
    weight = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    weight[:4096] = torch.randn(4096, device="cuda")
    weight[start:] = torch.randn(size - start, device="cuda")
    packed, absmax = ops.quantize_nf4(weight, 64)
    head, tail = (ops.quantize_nf4(weight[part].clone(), 64) for part in (slice(4096), slice(start, None)))
    assert torch.equal(packed[:2048], head[0])
    assert torch.equal(absmax[:64], head[1])
    assert torch.equal(packed[start // 2 :], tail[0])
    assert torch.equal(absmax[start // 64 :], tail[1])
    assert not absmax[64 : start // 64].any()
    del weight
    decoded = ops.dequantize_nf4(packed, absmax, None, None, 64, [size], torch.bfloat16)
    assert torch.equal(decoded[:4096], ops.dequantize_nf4(*head, None, None, 64, [4096], torch.bfloat16))
    expected = ops.dequantize_nf4(*tail, None, None, 64, [size - start], torch.bfloat16)
    assert torch.equal(decoded[start:], expected)
    assert not decoded[4096:start].any()


# Products


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("N", "K"), [(33, 64), (100, 192), (257, 1088), (64, 4096), (4100, 2048), (45, 77), (129, 1000)]
)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_against_float64(dtype, M, N, K, with_bias, poisoned_memory):
    w4 = random_weight(N, K)
    weight = w4.dequantize(dtype).double()
    x, grad = (torch.randn(M, n, device="cuda", dtype=dtype) for n in (K, N))
    bias = torch.randn(N, device="cuda", dtype=dtype) if with_bias else None
    y = ops.linear_nf4(x, *w4.arguments, N, bias)
    expected = x.double() @ weight.T + (bias.double() if with_bias else 0)
    assert_close("y", y, expected, RELATIVE_RMS[dtype])
    dx = ops.linear_nf4_backward(grad, *w4.arguments, K)
    assert_close("dx", dx, grad.double() @ weight, RELATIVE_RMS[dtype])


@pytest.mark.parametrize("K", [64, 128, 1088])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_output(dtype, K):
    w4 = random_weight(1, K)
    weight = w4.dequantize(dtype)
    x = torch.rand(1, K, device="cuda").to(dtype) * weight.sign()  # all terms positive: nothing cancels
    y = ops.linear_nf4(x, *w4.arguments, 1, None)
    assert_close("y", y, x.double() @ weight.double().T, RELATIVE_RMS[dtype])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_with_every_block_size(dtype, blocksize, double_quant):
    w4 = random_weight(50, 8192, blocksize, double_quant)
    x = torch.randn(5, 8192, device="cuda", dtype=dtype)
    y = ops.linear_nf4(x, *w4.arguments, 50, None)
    assert_close("y", y, x.double() @ w4.dequantize(dtype).double().T, RELATIVE_RMS[dtype])


@pytest.mark.parametrize("M", [3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_read_from_any_address(dtype, M):
    w4 = random_weight(48, 192)
    packed, *scales = w4.arguments
    x = torch.randn(M, 192, device="cuda", dtype=dtype)
    expected = ops.linear_nf4(x, packed, *scales, 48, None)
    bound = RELATIVE_RMS[dtype]
    assert_close("x", ops.linear_nf4(misaligned(x), packed, *scales, 48, None), expected, bound)
    assert_close("packed", ops.linear_nf4(x, misaligned(packed), *scales, 48, None), expected, bound)
    strided = torch.randn(M, 400, device="cuda", dtype=dtype)
    strided[:, 7:199] = x
    assert_close("columns", ops.linear_nf4(strided[:, 7:199], packed, *scales, 48, None), expected, bound)


@pytest.mark.parametrize(("x_shape", "N"), [((4, 0), 16), ((3, 64), 0), ((0, 0), 0)])
def test_empty_dimensions(x_shape, N):
    w4 = quantize(torch.randn(N, x_shape[-1], device="cuda"), 64, double_quant=False)
    bias = torch.randn(N, device="cuda")
    y = ops.linear_nf4(torch.randn(x_shape, device="cuda"), *w4.arguments, N, bias)
    assert torch.equal(y, bias.expand(x_shape[0], N))
    dx = ops.linear_nf4_backward(torch.randn(x_shape[0], N, device="cuda"), *w4.arguments, x_shape[-1])
    assert torch.equal(dx, torch.zeros(x_shape, device="cuda"))


@pytest.mark.parametrize("M", [4, 40])
def test_autocast_does_not_change_the_dtype(M):
    w4 = random_weight(48, 64)
    x = torch.randn(M, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        y = torch.ops.qlora_engine.linear_nf4(x, *w4.arguments, 48, torch.zeros(48, device="cuda"))
    assert y.dtype == torch.float32
    assert_close("y", y, x.double() @ w4.dequantize(torch.float32).double().T, RELATIVE_RMS[torch.float32])


# Streams, graphs, repetition


def every_operator(w4, x, grad, weight):
    """One call of each operator; tensors that depend on x, grad or weight."""
    N, K = w4.shape
    packed, absmax = ops.quantize_nf4(weight, 64)
    codes, nested, offset = ops.quantize_absmax(absmax)
    return [
        ops.linear_nf4(x, *w4.arguments, N, None),
        ops.linear_nf4_backward(grad, *w4.arguments, K),
        packed,
        absmax,
        codes,
        nested,
        *ops.quantize_nf4_double(weight, 64),
        *ops.quantize_nf4_search(weight, 64),
        ops.dequantize_absmax(codes, nested, offset),
        ops.dequantize_nf4(packed, codes, nested, offset, 64, weight.shape, weight.dtype),
    ]


def assert_same(actual, expected, dtype):
    """Integers equal, floats within the rounding of products: cuBLAS may choose otherwise on another stream."""
    for a, b in zip(actual, expected, strict=True):
        if a.is_floating_point():
            assert_close("result", a, b, RELATIVE_RMS[dtype])
        else:
            assert torch.equal(a, b)


def inputs(M, dtype):
    return [torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, 256), (M, 96), (96, 256))]


@pytest.mark.parametrize("M", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(dtype, M):
    w4, arguments = random_weight(96, 256), inputs(M, dtype)
    first, second = every_operator(w4, *arguments), every_operator(w4, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("M", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_current_stream(dtype, M):
    """Inputs become right only after a while on another stream: a kernel on any other stream would miss them."""
    w4, right = random_weight(96, 256), inputs(M, dtype)
    expected = every_operator(w4, *right)
    late = [torch.zeros_like(t) for t in right]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for a, b in zip(late, right, strict=True):
            a.copy_(b)
        actual = every_operator(w4, *late)
    stream.synchronize()
    assert_same(actual, expected, dtype)


@pytest.mark.parametrize("M", [4, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_with_new_inputs(dtype, M):
    w4, arguments = random_weight(96, 256), inputs(M, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        every_operator(w4, *arguments)  # loads the kernels and makes cuBLAS's workspace
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails where anything synchronises, or leaves the capturing stream
        captured = every_operator(w4, *arguments)
    for _ in range(2):
        for a, b in zip(arguments, inputs(M, dtype), strict=True):
            a.copy_(b)
        graph.replay()
        assert_same(captured, every_operator(w4, *arguments), dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_of_the_tensors_not_the_current_one():
    w4, arguments = random_weight(96, 256), inputs(4, torch.bfloat16)
    expected = every_operator(w4, *arguments)
    actual = every_operator(w4.to("cuda:1"), *(t.to("cuda:1") for t in arguments))
    assert all(a.device.index == 1 for a in actual)
    assert_same([a.to("cuda:0") for a in actual], expected, torch.bfloat16)
