"""Triton kernels of the operators, imported when one first runs on a GPU; `ops.backend` decides whether.

QLORA_ENGINE_LORA=auto (default) | triton | blas decides who computes adapters' narrow products: `blas` is cuBLAS but
for dropout, `triton` a kernel for every one of them.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

OLDEST_TRITON = (3, 6)
_HOMES = {
    "lora_down": "lora",
    "lora_add": "lora",
    "lora_grad_B": "lora",
    "lora_grad_A": "lora",
    "gated_activation": "gated",
    "gated_activation_backward": "gated",
    "gated_activation_backward_inplace": "gated",
}
# Elements of a wide matrix from which one pass instead of two is worth a kernel: 32 MiB, 11 us of an H100's bandwidth
LARGE = 1 << 24
ONE_READ_RANK = 32  # up to it, one read of dY takes less time than two products of cuBLAS
CHOICE_VARIABLE = "QLORA_ENGINE_LORA"
adapter_choice = os.environ.get(CHOICE_VARIABLE, "auto")
if adapter_choice not in ("auto", "triton", "blas"):
    raise ValueError(f"{CHOICE_VARIABLE}={adapter_choice!r}; expected auto, triton or blas")


def one_read_pays(M: int, N: int, rank: int) -> bool:
    """Whether `lora_grad_B`'s kernel is to serve an output's gradient [M, N], where nothing forces the choice."""
    return M * N >= LARGE and rank <= ONE_READ_RANK


def operators() -> frozenset[str]:
    """Names of the operators that have a Triton kernel."""
    return frozenset(_HOMES)


@functools.cache
def why_not() -> str | None:
    """Why Triton kernels cannot be used here, or None. Imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST_TRITON:
            return f"triton is {version}; the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
        return None
    return "triton has no version"


@functools.cache
def function(name: str) -> Callable:
    """The function that launches an operator's kernels; it takes what the operator takes."""
    return getattr(importlib.import_module(f"qlora_engine.kernels.{_HOMES[name]}"), name)
