import pytest
import torch

from qlora_engine.ops.linear import BACKWARD_ENVIRONMENT_VARIABLE, LINEAR_ENVIRONMENT_VARIABLE


@pytest.fixture
def needs_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this kernel needs compute capability 9.0")


@pytest.fixture
def force(monkeypatch):
    """force(path) sets QLORA_ENGINE_LINEAR."""
    return lambda path: monkeypatch.setenv(LINEAR_ENVIRONMENT_VARIABLE, path)


@pytest.fixture
def force_gradient(monkeypatch):
    """force_gradient(path) sets QLORA_ENGINE_BACKWARD."""
    return lambda path: monkeypatch.setenv(BACKWARD_ENVIRONMENT_VARIABLE, path)
