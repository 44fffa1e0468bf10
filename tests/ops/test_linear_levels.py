"""The product by levels for Hopper: every tile and division of K, odd shapes, scales of all kinds, adapters."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, linear_path
from tests.numerics import assert_close, relative_rms, size_of_sums
from tests.ops.fused_products import extra_memory, fused, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [8, 16, 32, 64, 128]
WHOLE = [f"levels:{tokens},1,1" for tokens in TOKENS]
SPLIT = [f"levels:{tokens},1,{splits}" for tokens in TOKENS for splits in (2, 3, 8)]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def float64(x, w4, bias=None):
    """With the weight as it is: it is not rounded to x's dtype here."""
    y = x.double() @ w4.dequantize(torch.float32).double().T
    return y if bias is None else y + bias.double()


def check(x, w4, bias=None):
    """A single small sum says nothing about its error: errors are relative to what such sums are usually worth."""
    size = size_of_sums(x, w4.dequantize(torch.float32).T)
    assert_close("y", fused(x, w4, bias), float64(x, w4, bias), BOUND[x.dtype], size)


@pytest.mark.parametrize("config", [*WHOLE, *SPLIT])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 64), (9, 77, 128), (33, 129, 832), (130, 256, 1024), (257, 300, 1088), (5, 4096, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, M, N, K, config, force, poisoned_memory):
    force(config)
    w4 = random_weight(N, K)
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, K), (N,)))
    check(x, w4)
    check(x, w4, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", WHOLE)
def test_more_accurate_than_cublas_on_a_decoded_weight(config, dtype, force):
    force(config)
    w4 = random_weight(640, 2048)
    x = torch.randn(200, 2048, device="cuda", dtype=dtype)
    expected = float64(x, w4)
    assert relative_rms(fused(x, w4), expected) < relative_rms(F.linear(x, w4.dequantize(dtype)), expected)


@pytest.mark.parametrize("config", WHOLE)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 1024])
def test_every_scale(blocksize, double_quant, config, force):
    """Of rows whose scales differ by 7 orders of magnitude, zero among them: each row is compared by itself."""
    force(config)
    weight = torch.randn(200, 2048, device="cuda") * torch.logspace(-6, 1, 200, device="cuda").unsqueeze(1)
    weight[3] = 0
    w4 = quantize(weight, blocksize, double_quant)
    x = torch.randn(24, 2048, device="cuda", dtype=torch.bfloat16)
    y, expected = fused(x, w4).double(), float64(x, w4)
    size = expected.norm(dim=0)
    assert ((y - expected).norm(dim=0) <= BOUND[torch.bfloat16] * size).all()


def test_scales_at_odd_addresses(force):
    """Scales that are views into a longer tensor are read one by one."""
    w4 = quantize(torch.randn(300, 1024, device="cuda"), 64, double_quant=False)
    x = torch.randn(40, 1024, device="cuda", dtype=torch.bfloat16)
    packed, absmax, *rest = w4.arguments
    moved = torch.cat([absmax.new_zeros(1), absmax])[1:]
    for config in WHOLE:
        force(config)
        expected = ops.linear_nf4(x, packed, absmax, *rest, 300, None)
        assert torch.equal(ops.linear_nf4(x, packed, moved, *rest, 300, None), expected)


@pytest.mark.parametrize("M", [*range(1, 18), 31, 33, 63, 65, 127, 129, 255, 257])
@pytest.mark.parametrize("config", WHOLE)
def test_every_residue_of_m(M, config, force, poisoned_memory):
    force(config)
    w4 = random_weight(264, 512)
    x = torch.randn(M, 512, device="cuda", dtype=torch.bfloat16)
    check(x, w4)


@pytest.mark.parametrize("N", [*range(120, 137), 191, 193, 255, 257])
@pytest.mark.parametrize("config", ["levels:16,1,1", "levels:64,1,3", "levels:128,1,2"])
def test_every_residue_of_n(N, config, force, poisoned_memory):
    force(config)
    w4 = random_weight(N, 768)
    x, bias = (torch.randn(*shape, device="cuda", dtype=torch.float16) for shape in ((40, 768), (N,)))
    check(x, w4, bias)


@pytest.mark.parametrize("K", [64 * k for k in range(1, 14)])
@pytest.mark.parametrize("config", [*WHOLE, "levels:8,1,8", "levels:128,1,3"])
def test_every_residue_of_k(K, config, force, poisoned_memory):
    force(config)
    w4 = random_weight(160, K)
    x = torch.randn(70, K, device="cuda", dtype=torch.bfloat16)
    check(x, w4)


@pytest.mark.parametrize("config", [*WHOLE, "levels:16,1,4", "levels:64,1,3"])
def test_many_tiles_a_block_and_repeatable(config, force, poisoned_memory):
    """More tiles than multiprocessors: rings and staging are used over and over."""
    force(config)
    w4 = random_weight(4096, 1024)
    x = torch.randn(1500, 1024, device="cuda", dtype=torch.bfloat16)
    first = fused(x, w4)
    assert_close("y", first, float64(x, w4), BOUND[torch.bfloat16])
    assert all(torch.equal(fused(x, w4), first) for _ in range(5))


@pytest.mark.parametrize("config", ["levels:16,1,1", "levels:64,1,1", "levels:128,1,4"])
def test_what_is_not_finite_stays_in_its_row(config, force):
    force(config)
    w4 = random_weight(256, 320)
    x = torch.randn(80, 320, device="cuda", dtype=torch.bfloat16)
    expected = fused(x, w4)
    x[7, 300], x[11, 1] = float("inf"), float("nan")
    y = fused(x, w4)
    others = [m for m in range(80) if m not in (7, 11)]
    assert torch.equal(y[others], expected[others])
    assert y[11].isnan().all()
    assert not y[7].isfinite().any()


@pytest.mark.parametrize("rank", [8, 16, 40, 64, 136, 264])
@pytest.mark.parametrize("config", [*WHOLE, "levels:16,1,3", "levels:64,1,4", "levels:128,1,2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter(dtype, config, rank, force, poisoned_memory):
    """S as columns of a wider matrix, as the adapters of several projections have it."""
    force(config)
    w4 = random_weight(392, 576)
    x, wide, B = (torch.randn(*s, device="cuda", dtype=dtype) for s in ((300, 576), (300, rank + 16), (392, rank)))
    S, bias = wide[:, 8 : 8 + rank], torch.randn(392, device="cuda", dtype=dtype)
    y = ops.linear_nf4_lora(x, *w4.arguments, 392, S, B, bias)
    assert_close("y", y, float64(x, w4, bias) + S.double() @ B.double().T, BOUND[dtype])


@pytest.mark.parametrize("config", WHOLE)
def test_adapter_of_many_tiles_a_block_repeats(config, force, poisoned_memory):
    force(config)
    w4 = random_weight(4104, 512)
    x, S, B = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((1200, 512), (1200, 72), (4104, 72)))
    first = ops.linear_nf4_lora(x, *w4.arguments, 4104, S, B)
    assert_close("y", first, float64(x, w4) + S.double() @ B.double().T, BOUND[torch.bfloat16])
    assert all(torch.equal(ops.linear_nf4_lora(x, *w4.arguments, 4104, S, B), first) for _ in range(5))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_products(data, monkeypatch):
    blocksize = data.draw(st.sampled_from([64, 128, 256]), "blocksize")
    M, N = data.draw(st.integers(1, 400), "M"), data.draw(st.integers(1, 700), "N")
    K = blocksize * data.draw(st.integers(1, 2560 // blocksize), "K / blocksize")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, data.draw(st.sampled_from([*WHOLE, *SPLIT]), "config"))
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    w4 = random_weight(N, K, blocksize, data.draw(st.booleans(), "double"))
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    bias = torch.randn(N, device="cuda", dtype=dtype) if data.draw(st.booleans(), "bias") else None
    check(x, w4, bias)


def test_another_stream(force):
    force("levels:64,1,1")
    w4 = random_weight(512, 1024)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    expected = fused(x, w4)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = fused(x, w4)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("M", [16, 128])
def test_holds_no_decoded_weight(M, force):
    force(f"levels:{M},1,1")
    w4 = random_weight(4096, 4096)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    assert extra_memory(x, w4) <= 512


def test_what_does_not_fit_is_refused_by_name(force):
    force("levels:16,1,1")
    with pytest.raises(RuntimeError, match="QLORA_ENGINE_LINEAR=levels:16,1,1, but the fused kernel takes float16"):
        fused(torch.randn(16, 96, device="cuda", dtype=torch.bfloat16), random_weight(32, 96, 32))
    for wrong in ("levels", "levels:24,1,1", "levels:256,1,1", "levels:16,2,1", "levels:16,1,9"):
        force(wrong)
        with pytest.raises(RuntimeError, match=f"QLORA_ENGINE_LINEAR={wrong}; expected auto, few, levels"):
            linear_path(16, 4096, 4096, torch.bfloat16)


def test_paths(force):
    force("levels:64,1,3")
    assert linear_path(4, 4096, 4096, torch.bfloat16) == ("levels", 64, 1, 3)
    force("auto")
    assert linear_path(64, 14336, 4096, torch.bfloat16) == ("levels", 64, 1, 1)
    assert linear_path(40, 14000, 4200, torch.bfloat16).name == "dequantize"  # no whole blocks in a row
    assert linear_path(40, 14000, 4224, torch.bfloat16) == ("levels", 64, 1, 1)  # the nearest's
    assert linear_path(3000, 14336, 4096, torch.bfloat16).name == "dequantize"
