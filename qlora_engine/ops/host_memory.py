"""`host_slab`: host memory that kernels use in place. `copy_bytes`: to it, from it, and between."""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)


@torch.library.register_fake("qlora_engine::concurrent_managed_access")
def _(like):
    return False


@torch.library.register_fake("qlora_engine::host_slab")
def _(like, bytes, managed):
    checks.host_slab(like, bytes, managed)
    return like.new_empty(bytes, dtype=torch.uint8)


@torch.library.register_fake("qlora_engine::copy_bytes")
def _(source, target):
    checks.copy_bytes(source, target)


def concurrent_managed_access(device: torch.device) -> bool:
    """Whether the host and a device may use managed memory at the same time (not on WSL, Windows, and some virtual
    machines).

    >>> concurrent_managed_access(torch.device("cpu"))
    False
    """
    return torch.ops.qlora_engine.concurrent_managed_access(torch.empty(0, device=device))


def host_slab(size: int, device: torch.device, managed: bool) -> torch.Tensor:
    """Zeroed host memory that kernels of a device read and write across the bus, without moving it.

    Args:
        size: bytes.
        device: whose kernels will use it. On a CPU this is ordinary memory.
        managed: managed memory that prefers the host and is mapped into the device; else pinned, mapped memory.

    Returns:
        uint8 `[size]`, a tensor of `device`. Its memory goes back to the system with its last reference.

    Raises:
        RuntimeError: where the memory cannot be had, or the CUDA operators are not compiled.
    """
    return torch.ops.qlora_engine.host_slab(torch.empty(0, device=device), size, managed)


def copy_bytes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies between any two of device memory, host slabs, and ordinary CPU memory.

    On the current stream; returns when the copy is done where one side is a CPU tensor.

    Args:
        source: uint8 `[n]`.
        target: uint8 `[n]`, overwritten.

    Raises:
        RuntimeError: where dtype or size differ.
    """
    torch.ops.qlora_engine.copy_bytes(source, target)
