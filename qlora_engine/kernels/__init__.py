"""Triton kernels of the operators, imported when one first runs on a GPU; `ops.backend` decides whether."""

import functools
import importlib
import importlib.metadata
import importlib.util
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
