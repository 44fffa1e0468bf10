"""The gradient by levels for Hopper: every tile and division of N, odd shapes, scales of all kinds, adapters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from tests.numerics import assert_close, relative_rms, size_of_sums
from tests.ops.fused_products import random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [8, 16, 32, 64, 128, 256]
WHOLE = [f"levels:{tokens},1,1" for tokens in TOKENS]
SPLIT = [f"levels:{tokens},1,{splits}" for tokens in TOKENS for splits in (2, 3, 8)]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def gradient(grad, w4):
    return ops.linear_nf4_backward(grad, *w4.arguments, w4.shape[1])


def float64(grad, w4):
    """With the weight as it is: it is not rounded to dY's dtype here."""
    return grad.double() @ w4.dequantize(torch.float32).double()


def check(grad, w4):
    """A single small sum says nothing about its error: errors are relative to what such sums are usually worth."""
    size = size_of_sums(grad, w4.dequantize(torch.float32))
    assert_close("dx", gradient(grad, w4), float64(grad, w4), BOUND[grad.dtype], size)


@pytest.mark.parametrize("config", [*WHOLE, *SPLIT])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 8, 64), (9, 72, 128), (33, 832, 192), (130, 1024, 256), (257, 1096, 320), (5, 256, 4096)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, M, N, K, config, force_gradient, poisoned_memory):
    force_gradient(config)
    check(torch.randn(M, N, device="cuda", dtype=dtype), random_weight(N, K))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", WHOLE)
def test_as_accurate_as_cublas_on_a_decoded_weight(config, dtype, force_gradient):
    """1.06 of its error in bfloat16: levels lose a little before their products with scales are rounded."""
    force_gradient(config)
    w4 = random_weight(4096, 640)
    grad = torch.randn(200, 4096, device="cuda", dtype=dtype)
    expected = float64(grad, w4)
    assert relative_rms(gradient(grad, w4), expected) < 1.08 * relative_rms(grad @ w4.dequantize(dtype), expected)


@pytest.mark.parametrize("config", WHOLE)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("K", [320, 2048])
def test_every_scale(K, blocksize, double_quant, config, force_gradient):
    """Of columns whose scales differ by 7 orders of magnitude, zero among them: each block is compared by itself."""
    force_gradient(config)
    weight = torch.randn(200, K, device="cuda")
    if blocksize == 64:
        weight *= torch.logspace(-6, 1, K // 64, device="cuda").repeat_interleave(64)
    weight[3] = 0
    w4 = quantize(weight, blocksize, double_quant)
    grad = torch.randn(24, 200, device="cuda", dtype=torch.bfloat16)
    dx, expected = gradient(grad, w4).double(), float64(grad, w4)
    blocks = lambda t: t.view(24, -1, 64).norm(dim=(0, 2))  # noqa: E731
    assert (blocks(dx - expected) <= BOUND[torch.bfloat16] * blocks(expected)).all()


def test_scales_at_odd_addresses(force_gradient):
    """Scales that are views into a longer tensor are read one by one."""
    w4 = quantize(torch.randn(304, 1024, device="cuda"), 64, double_quant=False)
    grad = torch.randn(40, 304, device="cuda", dtype=torch.bfloat16)
    packed, absmax, *rest = w4.arguments
    moved = torch.cat([absmax.new_zeros(1), absmax])[1:]
    for config in WHOLE:
        force_gradient(config)
        expected = ops.linear_nf4_backward(grad, packed, absmax, *rest, 1024)
        assert torch.equal(ops.linear_nf4_backward(grad, packed, moved, *rest, 1024), expected)


@pytest.mark.parametrize("M", [*range(1, 18), 31, 33, 63, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("config", WHOLE)
def test_every_residue_of_m(M, config, force_gradient, poisoned_memory):
    force_gradient(config)
    check(torch.randn(M, 512, device="cuda", dtype=torch.bfloat16), random_weight(512, 320))


@pytest.mark.parametrize("N", [8 * n for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 129)])
@pytest.mark.parametrize("config", [*WHOLE, "levels:16,1,8", "levels:64,1,3", "levels:256,1,8"])
def test_every_residue_of_n(N, config, force_gradient, poisoned_memory):
    force_gradient(config)
    check(torch.randn(40, N, device="cuda", dtype=torch.float16), random_weight(N, 192))


@pytest.mark.parametrize("K", [64 * k for k in range(1, 8)])
@pytest.mark.parametrize("config", [*WHOLE, "levels:8,1,8", "levels:128,1,3"])
def test_every_residue_of_k(K, config, force_gradient, poisoned_memory):
    force_gradient(config)
    check(torch.randn(70, 776, device="cuda", dtype=torch.bfloat16), random_weight(776, K))


@pytest.mark.parametrize("config", [*WHOLE, "levels:16,1,4", "levels:64,1,3", "levels:256,1,2"])
def test_more_tiles_than_multiprocessors_and_repeatable(config, force_gradient, poisoned_memory):
    force_gradient(config)
    w4 = random_weight(1024, 4096)
    grad = torch.randn(1500, 1024, device="cuda", dtype=torch.bfloat16)
    first = gradient(grad, w4)
    assert_close("dx", first, float64(grad, w4), BOUND[torch.bfloat16])
    assert all(torch.equal(gradient(grad, w4), first) for _ in range(5))


@pytest.mark.parametrize("config", ["levels:16,1,1", "levels:64,1,1", "levels:128,1,4", "levels:256,1,1"])
def test_what_is_not_finite_stays_in_its_row(config, force_gradient):
    force_gradient(config)
    w4 = random_weight(320, 256)
    grad = torch.randn(80, 320, device="cuda", dtype=torch.bfloat16)
    expected = gradient(grad, w4)
    grad[7, 300], grad[11, 1] = float("inf"), float("nan")
    dx = gradient(grad, w4)
    others = [m for m in range(80) if m not in (7, 11)]
    assert torch.equal(dx[others], expected[others])
    assert dx[11].isnan().all()
    assert not dx[7].isfinite().any()


@pytest.mark.parametrize("rank", [8, 16, 40, 64, 136, 264])
@pytest.mark.parametrize("config", [*WHOLE, "levels:16,1,3", "levels:64,1,4", "levels:256,1,2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter(dtype, config, rank, force_gradient, poisoned_memory):
    """dS as columns of a wider matrix; then added to what is there."""
    force_gradient(config)
    w4 = random_weight(392, 320)
    grad, wide, A = (torch.randn(*s, device="cuda", dtype=dtype) for s in ((300, 392), (300, rank + 16), (rank, 320)))
    dS, addend = wide[:, 8 : 8 + rank], torch.randn(300, 320, device="cuda", dtype=dtype)
    expected = float64(grad, w4) + dS.double() @ A.double()
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, 320, dS, A)
    assert_close("dx", dx, expected, BOUND[dtype])
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, 320, dS, A, addend)
    assert_close("dx + addend", dx, expected + addend.double(), 1.5 * BOUND[dtype])
    expected = float64(grad, w4) + addend.double()
    ops.linear_nf4_backward_add(addend, grad, *w4.arguments)
    assert_close("dx in place", addend, expected, 1.5 * BOUND[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_gradients(data):
    blocksize = data.draw(st.sampled_from([64, 128, 1024]), "blocksize")
    M, N = data.draw(st.integers(1, 600), "M"), 8 * data.draw(st.integers(1, 150), "N / 8")
    K = 64 * data.draw(st.integers(1, 20), "K / 64")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    w4 = random_weight(N, K, blocksize, data.draw(st.booleans(), "double"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_ENGINE_BACKWARD", data.draw(st.sampled_from([*WHOLE, *SPLIT]), "config"))
        check(torch.randn(M, N, device="cuda", dtype=dtype), w4)


def test_another_stream(force_gradient):
    force_gradient("levels:64,1,1")
    w4 = random_weight(1024, 512)
    grad = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    expected = gradient(grad, w4)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        dx = gradient(grad, w4)
    torch.cuda.synchronize()
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("M", [16, 128, 256])
def test_takes_no_memory(M, force_gradient):
    force_gradient(f"levels:{M},1,1")
    w4 = random_weight(4096, 4096)
    grad = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    gradient(grad, w4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    dx = gradient(grad, w4)
    assert torch.cuda.max_memory_allocated() - before == dx.nbytes
