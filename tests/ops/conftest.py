import pytest
import torch

from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE


@pytest.fixture
def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this kernel needs compute capability 9.0")


@pytest.fixture
def force(monkeypatch):
    """force(path) sets QLORA_ENGINE_LINEAR."""
    return lambda path: monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, path)
