"""dX = dY W fused with decoding, on the GPU: every path and plan against float64 and against dequantize + cuBLAS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from tests.numerics import RELATIVE_RMS, assert_close, relative_rms

pytestmark = pytest.mark.gpu

HALF_TYPES = [torch.bfloat16, torch.float16]
SINGLE, PAIRS = "many:1,1,8", "many:2,1,8"  # cluster, parts of the sum, token tiles together


def sm_90() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_sm_90 = pytest.mark.skipif(not sm_90(), reason="the kernel needs compute capability 9.0")


def random_weight(N, K, blocksize=64, double_quant=True):
    """Scales over three orders of magnitude, so that a wrong one shows."""
    scale = torch.logspace(-3, 0, N, device="cuda").unsqueeze(1)
    return quantize(torch.randn(N, K, device="cuda") * scale, blocksize, double_quant)


def poison(M, K, dtype):
    """Leaves NaN where the next tensor of this size will be allocated."""
    torch.full((M, K), float("nan"), device="cuda", dtype=dtype)


def backward(grad, w4):
    poison(grad.shape[0], w4.shape[1], grad.dtype)
    return ops.linear_nf4_backward(grad, *w4.arguments, w4.shape[1])


def check(M, w4, dtype):
    """dX of M rows is within the rounding of the dtype; returns it with dY and the decoded weight."""
    N, _ = w4.shape
    grad = torch.randn(M, N, device="cuda", dtype=dtype)
    weight = w4.dequantize(dtype)
    dx = backward(grad, w4)
    expected = grad.double() @ weight.double()
    assert_close("dx", dx, expected, max(1.02 * relative_rms(grad @ weight, expected), 1e-7))
    assert torch.equal(dx, backward(grad, w4))
    return dx, grad, weight


def by_cublas(grad, weight):
    """dY W in one sum: of few rows cuBLAS cuts long sums into parts, of 2048 and more of these shapes it does not."""
    M = grad.shape[0]
    return (grad.repeat(-(-2048 // M), 1) @ weight)[:M]


# Many rows


@needs_sm_90
@pytest.mark.parametrize("chosen", [SINGLE, PAIRS])
@pytest.mark.parametrize(("N", "K"), [(64, 64), (72, 128), (1000, 384), (1032, 320)])
@pytest.mark.parametrize("M", [65, 256, 257, 513, 1000])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_equals_cublas_bit_for_bit(force_gradient, dtype, M, N, K, chosen, poisoned_memory):
    force_gradient(chosen)
    dx, grad, weight = check(M, random_weight(N, K), dtype)
    assert torch.equal(dx, by_cublas(grad, weight))


@needs_sm_90
@pytest.mark.parametrize("rank", [8, 64, 72])
@pytest.mark.parametrize("chosen", [SINGLE, PAIRS, "many:1,3,8", "many:2,2,8"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_adapter(force_gradient, dtype, chosen, rank, poisoned_memory):
    """dX = dY W + dS A, then added to what is there; dS as columns of a wider matrix."""
    force_gradient(chosen)
    M, N, K = 600, 1032, 320
    w4, grad = random_weight(N, K), torch.randn(M, N, device="cuda", dtype=dtype)
    wide, A = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, rank + 16), (rank, K)))
    dS = wide[:, 8 : 8 + rank]
    product = grad.double() @ w4.dequantize(dtype).double()
    poison(M, K, dtype)
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A)
    assert_close("dx", dx, product + dS.double() @ A.double(), RELATIVE_RMS[dtype])
    assert torch.equal(dx, ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A))
    expected = dx.double() + product
    ops.linear_nf4_backward_add(dx, grad, *w4.arguments)
    assert_close("dx in place", dx, expected, 2 * RELATIVE_RMS[dtype])


@pytest.mark.parametrize("path", ["auto", "dequantize"])
@pytest.mark.parametrize("rank", [12, 16])
@pytest.mark.parametrize("M", [7, 100, 3000])
def test_adapter_on_every_path(monkeypatch, M, rank, path, poisoned_memory):
    monkeypatch.setenv("QLORA_ENGINE_LINEAR", path)
    N, K, dtype = 136, 128, torch.bfloat16
    w4, grad = random_weight(N, K), torch.randn(M, N, device="cuda", dtype=dtype)
    dS, A, addend = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, rank), (rank, K), (M, K)))
    product = grad.double() @ w4.dequantize(dtype).double()
    expected = product + dS.double() @ A.double()
    poison(M, K, dtype)
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A)
    assert_close("dx", dx, expected, 2 * RELATIVE_RMS[dtype])
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A, addend)
    assert_close("dx with addend", dx, expected + addend.double(), 3 * RELATIVE_RMS[dtype])
    expected = addend.double() + product
    ops.linear_nf4_backward_add(addend, grad, *w4.arguments)
    assert_close("dx in place", addend, expected, 2 * RELATIVE_RMS[dtype])


@needs_sm_90
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 256, 4096])
@pytest.mark.parametrize("chosen", [SINGLE, PAIRS])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_every_block_size(force_gradient, dtype, chosen, blocksize, double_quant, poisoned_memory):
    """Also where a block goes over the end of a row: 640 columns are not whole blocks."""
    force_gradient(chosen)
    dx, grad, weight = check(300, random_weight(136, 640, blocksize, double_quant), dtype)
    assert torch.equal(dx, by_cublas(grad, weight))


@needs_sm_90
@pytest.mark.parametrize(
    "chosen", [f"many:{plan}" for plan in ("1,2,8", "2,2,4", "1,3,8", "2,5,2", "1,8,1", "2,8,8")]
)
@pytest.mark.parametrize(("M", "N", "K"), [(65, 520, 192), (700, 1024, 512), (1025, 2048, 256), (100, 4096, 1024)])
def test_parts_of_the_sum(force_gradient, M, N, K, chosen, poisoned_memory):
    force_gradient(chosen)
    check(M, random_weight(N, K), torch.bfloat16)


@needs_sm_90
@pytest.mark.parametrize("chosen", [SINGLE, PAIRS, "many:1,3,8", "many:2,3,8"])
def test_repeats_bit_for_bit(force_gradient, chosen):
    force_gradient(chosen)
    w4 = random_weight(4096, 2048)
    grad = torch.randn(2100, 4096, device="cuda", dtype=torch.bfloat16)
    first = backward(grad, w4)
    assert all(torch.equal(first, backward(grad, w4)) for _ in range(10))


# Few rows


@pytest.mark.parametrize(("N", "K"), [(4, 64), (20, 192), (64, 256), (100, 448), (1028, 1088), (4096, 4096)])
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 50, 64])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_few_rows(force_gradient, dtype, M, N, K, poisoned_memory):
    force_gradient("few")
    check(M, random_weight(N, K), dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 512, 4096])
@pytest.mark.parametrize("M", [3, 12, 24, 40])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_few_rows_with_every_block_size(force_gradient, dtype, M, blocksize, double_quant, poisoned_memory):
    force_gradient("few")
    check(M, random_weight(140, 704, blocksize, double_quant), dtype)


@pytest.mark.parametrize("M", [1, 16, 64])
def test_few_rows_hold_no_decoded_weight(M):
    w4 = random_weight(4096, 4096)
    grad = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    backward(grad, w4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_nf4_backward(grad, *w4.arguments, 4096)
    assert torch.cuda.max_memory_allocated() - before <= 2 * M * 4096 * 2  # a decoded weight would be 32 MiB


# Both


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 700),
    N=st.integers(1, 80).map(lambda n: 8 * n),
    K=st.integers(1, 12).map(lambda k: 64 * k),
    blocksize=st.sampled_from([64, 128, 1024]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(HALF_TYPES),
    way=st.one_of(st.just("few"), st.builds("many:{},{},4".format, st.integers(1, 2), st.integers(1, 4))),
)
def test_random_shapes(M, N, K, blocksize, double_quant, dtype, way):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_ENGINE_BACKWARD", SINGLE if way == "few" and M > 64 else way)
        check(M, random_weight(N, K, blocksize, double_quant), dtype)


@pytest.mark.parametrize("M", [5, 100, 300])
@pytest.mark.parametrize("dtype", [*HALF_TYPES, torch.float32])
@pytest.mark.parametrize(
    ("N", "K", "blocksize"), [(63, 128, 64), (70, 128, 64), (64, 100, 64), (64, 96, 32), (64, 77, 64)]
)
def test_what_does_not_fit_is_dequantized(monkeypatch, N, K, blocksize, dtype, M, poisoned_memory):
    w4 = random_weight(N, K, blocksize)
    monkeypatch.setenv("QLORA_ENGINE_LINEAR", "auto")
    check(M, w4, dtype)
    monkeypatch.setenv("QLORA_ENGINE_LINEAR", "fused")
    grad = torch.randn(M, N, device="cuda", dtype=dtype)
    if N % 4 == 0 and N % 8 != 0 and K % 64 == 0 and dtype != torch.float32 and M <= 64:
        check(M, w4, dtype)  # the kernel for few rows takes it
    else:
        with pytest.raises(RuntimeError, match=r"QLORA_ENGINE_LINEAR=fused.*but no kernel takes this gradient"):
            backward(grad, w4)


@pytest.mark.parametrize("M", [6, 100, 300, 3000])
def test_any_address(M, poisoned_memory):
    w4 = random_weight(128, 256)
    packed, *scales = w4.arguments
    grad = torch.randn(M, 128, device="cuda", dtype=torch.bfloat16)
    expected = backward(grad, w4).double()

    def misaligned(t):
        longer = torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")
        longer[1:] = t.reshape(-1)
        return longer[1:].view(t.shape)

    strided = torch.randn(M, 300, device="cuda", dtype=torch.bfloat16)
    strided[:, 7:135] = grad
    codes, *nested = scales
    for arguments in (
        (misaligned(grad), packed, *scales),
        (grad, misaligned(packed), *scales),
        (grad, packed, misaligned(codes), *nested),
        (strided[:, 7:135], packed, *scales),
    ):
        assert_close("dx", ops.linear_nf4_backward(*arguments, 256), expected, RELATIVE_RMS[torch.bfloat16])


@pytest.mark.parametrize(
    ("M", "chosen"),
    [(4, "few"), (4, "levels:8,1,1"), (300, "levels:256,1,2"), *((300, c) for c in (SINGLE, PAIRS, "many:1,2,8"))],
)
def test_scales_that_are_not_finite_stay_in_their_columns(force_gradient, chosen, M):
    """An infinite scale makes NaN of its 64 columns, as in a dequantized weight, and of no others."""
    force_gradient(chosen)
    w4 = random_weight(72, 256, double_quant=False)
    packed, absmax, *rest = w4.arguments
    absmax = absmax.clone()
    absmax[-2] = float("inf")  # of the last row, columns 128 to 191
    grad = torch.randn(M, 72, device="cuda", dtype=torch.bfloat16)
    dx = ops.linear_nf4_backward(grad, packed, absmax, *rest, 256)
    assert not torch.isfinite(dx[:, 128:192]).any()
    assert torch.isfinite(dx[:, :128]).all()
    assert torch.isfinite(dx[:, 192:]).all()


@needs_sm_90
@pytest.mark.parametrize(
    ("M", "chosen"), [(8, "few"), (64, "levels:64,1,3"), (300, SINGLE), (600, PAIRS), (300, "many:1,4,8")]
)
def test_graph_replays_with_new_gradients(force_gradient, M, chosen):
    force_gradient(chosen)
    w4 = random_weight(1024, 512)
    grad = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
    backward(grad, w4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.linear_nf4_backward(grad, *w4.arguments, 512)
    for _ in range(3):
        grad.normal_()
        graph.replay()
        assert torch.equal(captured, backward(grad, w4))


@pytest.mark.parametrize("value", ["fast", "Fused", "fused:64,1"])
def test_unknown_paths_are_refused(monkeypatch, value):
    monkeypatch.setenv("QLORA_ENGINE_LINEAR", value)
    w4 = random_weight(64, 64)
    with pytest.raises(RuntimeError, match=r"expected auto, few, levels:TOKENS.*fused:TOKENS"):
        backward(torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), w4)


@pytest.mark.parametrize("value", ["few", "levels:16,1,1"])
def test_ways_of_the_product_alone_leave_the_gradient_as_it_is(monkeypatch, value):
    w4 = random_weight(136, 512)
    for M in (5, 100, 1500):
        grad = torch.randn(M, 136, device="cuda", dtype=torch.bfloat16)
        monkeypatch.setenv("QLORA_ENGINE_LINEAR", "auto")
        expected = backward(grad, w4)
        monkeypatch.setenv("QLORA_ENGINE_LINEAR", value)
        assert torch.equal(backward(grad, w4), expected)


@pytest.mark.parametrize(
    "value", ["fast", "levels", "levels:24,1,1", "levels:16,2,1", "levels:16,1,9", "many:3,1,8", "1,1,8"]
)
def test_unknown_ways_of_the_gradient_are_refused(force_gradient, value):
    force_gradient(value)
    with pytest.raises(
        RuntimeError, match=f"QLORA_ENGINE_BACKWARD={value}; expected auto, few, levels:TOKENS,1,SPLITS"
    ):
        backward(torch.randn(4, 64, device="cuda", dtype=torch.bfloat16), random_weight(64, 64))


@needs_sm_90
def test_ways(force_gradient, monkeypatch):
    """Fused and dequantize of the product are those of its gradient too, where none is asked for."""
    bf16 = torch.bfloat16
    for asked, M, way in (("few", 8, "few rows"), ("many", 8, "many rows"), ("dequantize", 8, "dequantize")):
        force_gradient(asked)
        assert ops.gradient_path(M, 4096, 4096, bf16).name == way
    force_gradient("levels:32,1,3")
    assert ops.gradient_path(4, 4096, 4096, bf16) == ("levels", (32, 1, 3))
    force_gradient("many:2,3,8")
    assert ops.gradient_path(4, 4096, 4096, bf16) == ("many rows", (2, 3, 8))
    force_gradient("auto")
    assert ops.gradient_path(64, 14336, 4096, bf16).name == "levels"
    assert ops.gradient_path(8192, 14336, 4096, bf16).name == "dequantize"
    assert ops.gradient_path(64, 14336, 4096, torch.float32).name == "dequantize"
    assert ops.gradient_path(64, 14337, 4096, bf16).name == "dequantize"
    monkeypatch.delenv("QLORA_ENGINE_BACKWARD")
    for asked, way in (("dequantize", "dequantize"), ("fused", "many rows"), ("few", "levels")):
        monkeypatch.setenv("QLORA_ENGINE_LINEAR", asked)
        assert ops.gradient_path(64, 14336, 4096, bf16).name == way
