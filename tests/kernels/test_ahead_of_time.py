"""Every launch compiles for sm_80 and sm_90 without a GPU, fits into shared memory, and spills nothing."""

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from qlora_engine import kernels
from qlora_engine.kernels import cross_entropy, gated, launch, lora
from tests.kernels.compiled import compile_launch, record

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have
M, K = 4096, 4096


def calls(dtype, rank, dropout_p, adapter_dtype):
    """Every operator with arguments of a layer of that size, on the meta device."""

    def matrix(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    A, B = matrix(rank, K, dtype=adapter_dtype), matrix(K, rank, dtype=adapter_dtype)
    x, S = matrix(M, K), matrix(M, rank)
    return {
        "lora_down": (x, [A], 1.0, dropout_p, seed),
        "lora_add": (x, S, A.T, 1.0, [x, x], dropout_p, seed),
        "lora_grad_B": (x, S, B, 1.0, S),
        "lora_grad_A": (S, x, dropout_p, seed, adapter_dtype),
    }


CASES = [
    (torch.bfloat16, 16, 0.0, torch.float32),
    (torch.bfloat16, 16, 0.1, torch.float32),
    (torch.bfloat16, 64, 0.1, torch.bfloat16),
    (torch.float16, 256, 0.1, torch.float32),
    (torch.float32, 64, 0.1, torch.float32),
]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "rank", "dropout_p", "adapter_dtype"), CASES)
def test_narrow_products(monkeypatch, dtype, rank, dropout_p, adapter_dtype, capability):
    monkeypatch.setattr(kernels, "adapter_choice", "triton")
    for name, arguments in calls(dtype, rank, dropout_p, adapter_dtype).items():
        launches = record(monkeypatch, (lora, launch), kernels.function(name), *arguments)
        assert launches, name
        for one in launches:
            usage = compile_launch(one, capability)
            what = f"{name}: {one.kernel.__name__} for sm_{capability}: {usage.registers} registers, {usage.shared} B"
            assert usage.shared <= SHARED_MEMORY[capability], what
            assert usage.stack == usage.local == 0, f"{what}, stack {usage.stack}"
            if dtype != torch.float32 and one.kernel.__name__.startswith("lora"):
                assert "mma" in usage.ptx, f"{what}: no tensor cores"


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation(monkeypatch, activation):
    gate = torch.empty(M, K, dtype=torch.bfloat16, device="meta")
    launches = record(monkeypatch, (gated,), kernels.function("gated_activation"), gate, gate, activation)
    backward = kernels.function("gated_activation_backward_inplace")
    launches += record(monkeypatch, (gated,), backward, gate, gate, gate, activation)
    assert len(launches) == 2
    for one in launches:
        for capability in SHARED_MEMORY:
            usage = compile_launch(one, capability)
            assert usage.stack == usage.local == 0
            assert "ld.global.v4" in usage.ptx  # 16 bytes at a time


@pytest.mark.parametrize("gradient", [False, True])
def test_cross_entropy(monkeypatch, gradient):
    logits, labels = torch.empty(256, 128256, dtype=torch.bfloat16, device="meta"), torch.empty(256, device="meta")
    rest = labels.long(), labels, labels.int(), -100, gradient
    (one,) = record(monkeypatch, (cross_entropy,), cross_entropy.cross_entropy_, logits, *rest)
    for capability in SHARED_MEMORY:
        usage = compile_launch(one, capability)
        assert usage.stack == usage.local == 0
        assert "ld.global.v4" in usage.ptx  # 16 bytes at a time
