"""The fused product for Hopper equals a decoded weight's, whatever the shape, the scales, and the configuration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, linear_path
from tests.numerics import assert_close, relative_rms
from tests.ops.fused_products import extra_memory, float64, fused, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]

DTYPES = [torch.bfloat16, torch.float16]
UNSPLIT = ["16,1,1", "32,1,1", "64,1,1", "128,1,1", "256,1,1", "256,2,1"]
SPLIT = [f"{tokens},1,{splits}" for tokens in (16, 32, 64, 128, 256) for splits in (2, 4, 8)]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("config", UNSPLIT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(300, 384, 1024), (64, 256, 4096), (17, 136, 64)])
def test_equals_the_product_with_the_decoded_weight(config, dtype, M, N, K, force, poisoned_memory):
    """Each row of x selects one column of W: the sum has one term, so any order of adding gives the same bits."""
    force(f"fused:{config}")
    w4 = random_weight(N, K)
    x = torch.zeros(M, K, device="cuda", dtype=dtype)
    columns = torch.randint(0, K, (M,), device="cuda")
    x[torch.arange(M, device="cuda"), columns] = 1
    assert torch.equal(fused(x, w4), w4.dequantize(dtype).T[columns])


@pytest.mark.parametrize("blocksize", [64, 128, 1024, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_decoded_as_dequantize_does(dtype, double_quant, blocksize, force):
    """The identity as x gives W back, subnormal and zero scales included."""
    N, K = 200, 4096
    weight = torch.randn(N, K, device="cuda") * torch.logspace(-6, 1, N, device="cuda").unsqueeze(1)
    weight[3] = 0
    weight[5] *= 1e-37
    w4 = quantize(weight, blocksize, double_quant)
    for config in ("64,1,1", "256,1,1", "128,1,4"):
        force(f"fused:{config}")
        x = torch.eye(K, device="cuda", dtype=dtype)
        assert torch.equal(fused(x, w4), w4.dequantize(dtype).T)


@pytest.mark.parametrize("config", UNSPLIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_cublas(config, dtype, force):
    force(f"fused:{config}")
    w4 = random_weight(640, 2048)
    x = torch.randn(500, 2048, device="cuda", dtype=dtype)
    expected = float64(x, w4)
    theirs = relative_rms(F.linear(x, w4.dequantize(dtype)), expected)
    assert relative_rms(fused(x, w4), expected) <= 1.05 * theirs


@pytest.mark.parametrize("config", [*UNSPLIT, *SPLIT])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 64), (9, 77, 128), (33, 129, 192), (130, 256, 320), (257, 300, 1088), (600, 520, 704)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, M, N, K, config, force, poisoned_memory):
    force(f"fused:{config}")
    w4 = random_weight(N, K)
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, K), (N,)))
    assert_close("y", fused(x, w4), float64(x, w4), BOUND[dtype])
    assert_close("y with bias", fused(x, w4, bias), float64(x, w4, bias), BOUND[dtype])


@pytest.mark.parametrize("M", [*range(9, 26), 63, 64, 65, 127, 129, 255, 256, 257])
def test_every_residue_of_m(M, force, poisoned_memory):
    force("fused")
    w4 = random_weight(264, 512)
    x = torch.randn(M, 512, device="cuda", dtype=torch.bfloat16)
    assert_close("y", fused(x, w4), float64(x, w4), BOUND[torch.bfloat16])


@pytest.mark.parametrize("N", [*range(120, 137), 191, 193, 255, 257])
@pytest.mark.parametrize("config", ["32,1,1", "256,2,1", "64,1,4"])
def test_every_residue_of_n(N, config, force, poisoned_memory):
    force(f"fused:{config}")
    w4 = random_weight(N, 256)
    x, bias = (torch.randn(*shape, device="cuda", dtype=torch.float16) for shape in ((40, 256), (N,)))
    assert_close("y", fused(x, w4, bias), float64(x, w4, bias), BOUND[torch.float16])


@pytest.mark.parametrize("K", [64 * k for k in range(1, 14)])
@pytest.mark.parametrize("config", ["16,1,1", "16,1,8", "128,1,1", "128,1,4", "256,1,1", "256,2,1", "256,1,2"])
def test_every_residue_of_k(K, config, force, poisoned_memory):
    force(f"fused:{config}")
    w4 = random_weight(160, K)
    x = torch.randn(70, K, device="cuda", dtype=torch.bfloat16)
    assert_close("y", fused(x, w4), float64(x, w4), BOUND[torch.bfloat16])


@pytest.mark.parametrize("config", ["16,1,4", "64,1,1", "64,1,8", "256,1,1", "256,2,1", "128,1,2"])
def test_many_tiles_a_block_and_repeatable(config, force, poisoned_memory):
    """More tiles than multiprocessors: rings and staging are used over and over."""
    force(f"fused:{config}")
    w4 = random_weight(4096, 1024)
    x = torch.randn(3000, 1024, device="cuda", dtype=torch.bfloat16)
    first = fused(x, w4)
    assert_close("y", first, float64(x, w4), BOUND[torch.bfloat16])
    assert all(torch.equal(fused(x, w4), first) for _ in range(5))


@pytest.mark.parametrize("config", ["64,1,1", "256,1,1", "256,2,1", "128,1,4"])
def test_what_is_not_finite_stays_in_its_row(config, force):
    force(f"fused:{config}")
    w4 = random_weight(256, 320)
    x = torch.randn(80, 320, device="cuda", dtype=torch.bfloat16)
    expected = fused(x, w4)
    x[7, 300], x[11, 1] = float("inf"), float("nan")
    y = fused(x, w4)
    others = [m for m in range(80) if m not in (7, 11)]
    assert torch.equal(y[others], expected[others])
    assert y[11].isnan().all()
    expected = F.linear(x[7:8], w4.dequantize(torch.bfloat16))[0]
    assert torch.equal(y[7].nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("rank", [8, 16, 40, 64, 136])
@pytest.mark.parametrize("config", [*UNSPLIT, "64,1,4", "256,1,2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter(dtype, config, rank, force, poisoned_memory):
    """S as columns of a wider matrix, as the adapters of several projections have it."""
    force(f"fused:{config}")
    w4 = random_weight(392, 576)
    x, wide, B = (torch.randn(*s, device="cuda", dtype=dtype) for s in ((300, 576), (300, rank + 16), (392, rank)))
    S, bias = wide[:, 8 : 8 + rank], torch.randn(392, device="cuda", dtype=dtype)
    y = ops.linear_nf4_lora(x, *w4.arguments, 392, S, B, bias)
    assert_close("y", y, float64(x, w4, bias) + S.double() @ B.double().T, BOUND[dtype])


@pytest.mark.parametrize("config", ["64,1,1", "128,1,1", "256,1,1"])
def test_adapter_of_many_tiles_a_block_repeats(config, force, poisoned_memory):
    force(f"fused:{config}")
    w4 = random_weight(4104, 512)
    x, S, B = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((3000, 512), (3000, 72), (4104, 72)))
    first = ops.linear_nf4_lora(x, *w4.arguments, 4104, S, B)
    assert_close("y", first, float64(x, w4) + S.double() @ B.double().T, BOUND[torch.bfloat16])
    assert all(torch.equal(ops.linear_nf4_lora(x, *w4.arguments, 4104, S, B), first) for _ in range(5))


@pytest.mark.parametrize("path", ["auto", "dequantize", "fused"])
@pytest.mark.parametrize(("M", "rank", "first"), [(5, 16, 0), (300, 12, 0), (300, 16, 1), (300, 16, 8)])
def test_adapter_after_the_product(M, rank, first, path, force, poisoned_memory):
    """Where the fused product is not taken, or the rank or S's alignment is not what it wants."""
    force(path)
    w4 = random_weight(256, 512)
    x, wide, B = (torch.randn(*s, device="cuda", dtype=torch.float16) for s in ((M, 512), (M, 48), (256, rank)))
    S, bias = wide[:, first : first + rank], torch.randn(256, device="cuda", dtype=torch.float16)
    y = ops.linear_nf4_lora(x, *w4.arguments, 256, S, B, bias)
    assert_close("y", y, float64(x, w4, bias) + S.double() @ B.double().T, 2 * BOUND[torch.float16])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_products(data, monkeypatch):
    blocksize = data.draw(st.sampled_from([64, 128, 256]), "blocksize")
    M, N = data.draw(st.integers(1, 700), "M"), data.draw(st.integers(1, 700), "N")
    K = blocksize * data.draw(st.integers(1, 1280 // blocksize), "K / blocksize")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    config = data.draw(st.sampled_from([*UNSPLIT, *SPLIT]), "config")
    monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, f"fused:{config}")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    w4 = random_weight(N, K, blocksize, data.draw(st.booleans(), "double"))
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    bias = torch.randn(N, device="cuda", dtype=dtype) if data.draw(st.booleans(), "bias") else None
    assert_close("y", fused(x, w4, bias), float64(x, w4, bias), BOUND[dtype])


def test_any_layout_of_x(force):
    force("fused")
    w4 = random_weight(128, 192)
    x = torch.randn(24, 192, device="cuda", dtype=torch.bfloat16)
    expected = fused(x, w4)
    wider = torch.randn(24, 301, device="cuda", dtype=torch.bfloat16)
    wider[:, 7:199] = x
    shifted = torch.empty(24 * 192 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(24, 192)
    shifted.copy_(x)
    for other in (wider[:, 7:199], shifted, x.view(2, 3, 4, 192), x.T.contiguous().T):
        assert torch.equal(fused(other, w4).view(24, 128), expected)


def test_holds_no_decoded_weight(force):
    force("fused")
    w4 = random_weight(4096, 4096)
    x = torch.randn(32, 4096, device="cuda", dtype=torch.bfloat16)
    assert extra_memory(x, w4) <= 512


def test_more_elements_of_y_than_32_bits_count(force):
    force("fused")
    M, N, K = 2**16 + 1, 2**15 + 8, 64
    w4 = random_weight(N, K)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    y = fused(x, w4)
    for rows in (slice(0, 64), slice(M - 64, M)):
        assert torch.equal(y[rows], F.linear(x[rows], w4.dequantize(torch.bfloat16)))


def test_what_does_not_fit_is_refused_by_name(force):
    force("fused")
    with pytest.raises(RuntimeError, match="the fused kernel takes float16 or bfloat16, a blocksize of 64"):
        fused(torch.randn(16, 96, device="cuda", dtype=torch.bfloat16), random_weight(32, 96, 32))
    force("quick")
    with pytest.raises(RuntimeError, match="QLORA_ENGINE_LINEAR=quick; expected auto, few, levels"):
        fused(torch.randn(16, 128, device="cuda", dtype=torch.bfloat16), random_weight(32, 128))


def test_paths(force):
    force("auto")
    assert linear_path(4, 4096, 4096, torch.bfloat16).name == "few rows"
    assert linear_path(8192, 4096, 4096, torch.bfloat16).name == "dequantize"
    assert linear_path(512, 14336, 4096, torch.bfloat16) == ("fused", 256, 1, 1)
    assert linear_path(1024, 1024, 4096, torch.bfloat16).name == "dequantize"
    assert linear_path(4096, 14336, 4096, torch.bfloat16).name == "dequantize"
    assert linear_path(4096, 14336, 4096, torch.bfloat16, adapter=True).name == "fused"
    assert linear_path(64, 4096, 4096, torch.float32).name == "dequantize"
    assert linear_path(64, 4096, 4000, torch.bfloat16).name == "dequantize"
    force("dequantize")
    assert linear_path(4, 4096, 4096, torch.bfloat16).name == "dequantize"
    force("fused:64,1,4")
    assert linear_path(4, 4096, 4096, torch.bfloat16) == ("fused", 64, 1, 4)
