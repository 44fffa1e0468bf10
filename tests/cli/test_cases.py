"""What `qlora env` says about which kernel serves which case."""

import pytest
import torch

from qlora_engine import kernels
from qlora_engine.cli import cases
from qlora_engine.ops import backend, host_memory, linear
from qlora_engine.ops.linear import LinearPath


def by_case(device):
    rows = cases.collect(device)
    assert all(row.keys() == {"case", "served_by", "why_not"} for row in rows)
    return {row["case"]: row for row in rows}


def test_cpu_kernels_are_named_and_a_forced_choice_is_the_reason(monkeypatch):
    monkeypatch.delenv("QLORA_ENGINE_CPU", raising=False)
    assert backend.cpu_kernels() in by_case("cpu")["products, bfloat16 x"]["served_by"]
    monkeypatch.setattr(backend, "cpu_kernels", lambda: "avx2")
    assert by_case("cpu")["products, float32 x"]["why_not"] == "the processor has no AVX-512"
    monkeypatch.setenv("QLORA_ENGINE_CPU", "avx2")
    assert by_case("cpu")["products, float32 x"]["why_not"] == "QLORA_ENGINE_CPU=avx2"
    assert cases.variables()["QLORA_ENGINE_CPU"] == "avx2"


def test_without_the_library_everything_is_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "implementation", lambda op, device: "reference")
    monkeypatch.setattr(backend, "library_error", lambda: "not compiled: no g++")
    for device in ("cpu", "cuda:0"):
        (row,) = cases.collect(device)
        assert (row["served_by"], row["why_not"]) == ("the pure-PyTorch reference", "not compiled: no g++")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given compute capability, as far as this report asks for it."""

    def of(capability, fused_rows):
        def path(rows, N, K, dtype, blocksize=64, device="cuda"):
            if rows <= 8:
                return LinearPath("few rows")
            return LinearPath("fused", 64, 1, 1) if rows <= fused_rows else LinearPath("dequantize")

        monkeypatch.setattr(backend, "implementation", lambda op, device: "compiled")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(linear, "linear_path", path)
        monkeypatch.setattr(kernels, "why_not", lambda: None)
        monkeypatch.setattr(host_memory, "concurrent_managed_access", lambda device: False)
        return by_case("cuda:0")

    for name in ("QLORA_ENGINE_LINEAR", "QLORA_ENGINE_LORA"):
        monkeypatch.delenv(name, raising=False)
    return of


def test_hopper(gpu):
    rows = gpu((9, 0), 2048)
    assert rows["products, 1 rows of 16-bit x"]["why_not"] is None
    assert "tensor cores" in rows["products, 2048 rows of 16-bit x"]["served_by"]
    assert rows["products, 8192 rows of 16-bit x"]["why_not"].startswith("measured")
    assert "pinned" in rows["PagedAdamW's state in host memory"]["served_by"]


def test_other_gpus_and_other_builds(gpu, monkeypatch):
    assert "this is 8.6" in gpu((8, 6), 0)["products, 512 rows of 16-bit x"]["why_not"]
    assert "without sm_90a" in gpu((9, 0), 0)["products, 512 rows of 16-bit x"]["why_not"]
    monkeypatch.setenv("QLORA_ENGINE_LINEAR", "dequantize")
    monkeypatch.setenv("QLORA_ENGINE_LORA", "blas")
    rows = gpu((9, 0), 0)
    assert rows["products, 512 rows of 16-bit x"]["why_not"] == "QLORA_ENGINE_LINEAR=dequantize"
    assert (rows["adapters' narrow products"]["served_by"], rows["adapters' narrow products"]["why_not"]) == (
        "cuBLAS",
        "QLORA_ENGINE_LORA=blas",
    )


@pytest.mark.gpu
def test_on_a_gpu():
    assert "CUDA" in by_case("cuda:0")["quantize, dequantize"]["served_by"]
