"""The fused product for compute capability 8.0 and later, forced: equal to a decoded weight's, whatever the shape."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, linear_path
from tests.numerics import assert_close, relative_rms
from tests.ops.fused_products import float64, fused, random_weight

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
CONFIGS = [f"{tokens},{splits}" for tokens in (16, 32, 64, 128) for splits in (1, 3)] + ["16,16"]
BOUND = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture
def force(monkeypatch):
    """force(config) sets QLORA_ENGINE_LINEAR to fused:sm80:config; force("") to fused:sm80."""
    return lambda config: monkeypatch.setenv(
        LINEAR_ENVIRONMENT_VARIABLE, f"fused:sm80:{config}" if config else "fused:sm80"
    )


@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_decoded_as_dequantize_does(dtype, double_quant, blocksize, force):
    """The identity as x gives W back, subnormal and zero scales included."""
    N, K = 200, 4096
    weight = torch.randn(N, K, device="cuda") * torch.logspace(-6, 1, N, device="cuda").unsqueeze(1)
    weight[3] = 0
    weight[5] *= 1e-37
    w4 = quantize(weight, blocksize, double_quant)
    for config in ("16,1", "128,1", "64,4"):
        force(config)
        x = torch.eye(K, device="cuda", dtype=dtype)
        assert torch.equal(fused(x, w4), w4.dequantize(dtype).T)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 64), (9, 77, 128), (33, 129, 192), (130, 256, 320), (300, 520, 1088)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, M, N, K, config, force, poisoned_memory):
    force(config)
    w4 = random_weight(N, K)
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((M, K), (N,)))
    y = fused(x, w4, bias)
    assert_close("y with bias", y, float64(x, w4, bias), BOUND[dtype])
    assert torch.equal(fused(x, w4, bias), y)


@pytest.mark.parametrize("config", ["", "128,1", "64,4"])
def test_many_tiles(config, force, poisoned_memory):
    force(config)
    w4 = random_weight(4096, 1024)
    x = torch.randn(3000, 1024, device="cuda", dtype=torch.bfloat16)
    y, expected = fused(x, w4), float64(x, w4)
    assert relative_rms(y, expected) <= 1.05 * relative_rms(F.linear(x, w4.dequantize(torch.bfloat16)), expected)
    assert all(torch.equal(fused(x, w4), y) for _ in range(5))


def test_adapter_comes_after(force, poisoned_memory):
    force("")
    w4 = random_weight(256, 512)
    x, S, B = (torch.randn(*s, device="cuda", dtype=torch.float16) for s in ((300, 512), (300, 16), (256, 16)))
    y = ops.linear_nf4_lora(x, *w4.arguments, 256, S, B)
    assert_close("y", y, float64(x, w4) + S.double() @ B.double().T, 2 * BOUND[torch.float16])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_products(data, monkeypatch):
    blocksize = data.draw(st.sampled_from([64, 128, 256]), "blocksize")
    M, N = data.draw(st.integers(1, 300), "M"), data.draw(st.integers(1, 600), "N")
    K = blocksize * data.draw(st.integers(1, 1280 // blocksize), "K / blocksize")
    dtype, config = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from(CONFIGS), "config")
    monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, f"fused:sm80:{config}")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    w4 = random_weight(N, K, blocksize, data.draw(st.booleans(), "double"))
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    bias = torch.randn(N, device="cuda", dtype=dtype) if data.draw(st.booleans(), "bias") else None
    assert_close("y", fused(x, w4, bias), float64(x, w4, bias), BOUND[dtype])


def test_paths(force, monkeypatch):
    force("64,3")
    assert linear_path(40, 4096, 4096, torch.bfloat16) == ("fused sm80", 64, 1, 3)
    force("")
    assert linear_path(4096, 4096, 4096, torch.bfloat16) == ("fused sm80", 128, 1, 1)
    force("48,1")
    with pytest.raises(RuntimeError, match="QLORA_ENGINE_LINEAR=fused:sm80:48,1; expected auto"):
        linear_path(40, 4096, 4096, torch.bfloat16)
    force("")
    with pytest.raises(RuntimeError, match="a blocksize of 64 or more"):
        fused(torch.randn(16, 96, device="cuda", dtype=torch.bfloat16), random_weight(32, 96, 32))
