"""What this machine can run, and what every test may use."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from qlora_engine.ops import backend


def why_no_gpu() -> str | None:
    """Why tests marked `gpu` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backend.implementation("dequantize_nf4", "cuda") != "compiled":
        return f"the CUDA operators are not compiled: {backend.library_error() or backend.build_info().get('reason')}"
    return None


def pytest_collection_modifyitems(config, items):
    reason = why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu: {reason}"))


def pytest_terminal_summary(terminalreporter):
    """Which operators ran, and how many GPU tests did not: a skip must not go unseen."""
    libraries = {device: backend.implementation("linear_nf4", device) for device in ("cpu", "cuda")}
    reports = [r for kind in ("passed", "failed", "skipped") for r in terminalreporter.stats.get(kind, [])]
    gpu = [r for r in reports if "gpu" in getattr(r, "keywords", {})]
    skipped = sum(r.outcome == "skipped" for r in gpu)
    reason = f" ({why_no_gpu()})" if why_no_gpu() else ""
    terminalreporter.write_line(
        f"operators: {libraries}; GPU tests: {len(gpu) - skipped} run, {skipped} skipped{reason}"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every device that a test of this machine can use."""
    return request.param


@pytest.fixture
def poisoned_memory():
    """Freshly allocated tensors hold NaN (or the largest integer), so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
