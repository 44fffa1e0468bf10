"""Host memory for optimizer state, without the compiled CUDA library: there is none that a kernel could read."""

import torch


def concurrent_managed_access(like: torch.Tensor) -> bool:
    """See `qlora_engine.ops.host_memory`."""
    return False


def host_slab(like: torch.Tensor, size: int, managed: bool) -> torch.Tensor:
    """See `qlora_engine.ops.host_memory`. On a CPU every tensor is host memory.

    Raises:
        RuntimeError: for a CUDA device.
    """
    if like.device.type == "cpu":
        return torch.zeros(size, dtype=torch.uint8)
    raise RuntimeError(
        "host_slab: optimizer state in host memory needs the compiled CUDA operators (`qlora env` says why they are "
        "missing); reinstall with nvcc present, or keep the state on the device: device_budget=None"
    )


def copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """See `qlora_engine.ops.host_memory`."""
    target.copy_(source)
