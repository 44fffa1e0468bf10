"""Defines the operators and decides what implements them: the compiled library, Triton, or the reference.

QLORA_ENGINE_BACKEND=auto (default) | compiled (an error where the library is missing) | reference
"""

import ctypes
import functools
import importlib.resources
import json
import os
from pathlib import Path

import torch

from qlora_engine import kernels
from qlora_engine.ops.schema import ADAPTER_SCHEMAS, LAYER_SCHEMAS, NAMESPACE, OPTIMIZER_SCHEMAS, SCHEMAS
from qlora_engine.reference import adamw as _adamw
from qlora_engine.reference import adapter as _adapter
from qlora_engine.reference import dequantize as _dequantize
from qlora_engine.reference import gated as _gated
from qlora_engine.reference import host_memory as _memory
from qlora_engine.reference import linear as _linear
from qlora_engine.reference import lora as _lora
from qlora_engine.reference import quantize as _quantize
from qlora_engine.reference import scale_search as _scale_search

ENVIRONMENT_VARIABLE = "QLORA_ENGINE_BACKEND"
_REFERENCE = {
    "quantize_nf4": _quantize.quantize_nf4,
    "quantize_nf4_double": _quantize.quantize_nf4_double,
    "quantize_nf4_search": _scale_search.quantize_nf4_search,
    "quantize_absmax": _quantize.quantize_absmax,
    "dequantize_nf4": _dequantize.dequantize_nf4,
    "dequantize_absmax": _dequantize.dequantize_absmax,
    "linear_nf4": _linear.linear_nf4,
    "linear_nf4_lora": _linear.linear_nf4_lora,
    "linear_nf4_backward": _linear.linear_nf4_backward,
    "linear_nf4_backward_lora": _linear.linear_nf4_backward_lora,
    "linear_nf4_backward_add": _linear.linear_nf4_backward_add,
    "lora_down": _lora.lora_down,
    "lora_add": _lora.lora_add,
    "lora_grad_B": _lora.lora_grad_B,
    "lora_grad_A": _lora.lora_grad_A,
    "gated_activation": _gated.gated_activation,
    "gated_activation_backward": _gated.gated_activation_backward,
    "gated_activation_backward_inplace": _gated.gated_activation_backward_inplace,
    "adapter_forward": _adapter.adapter_forward,
    "adapter_backward_S": _adapter.adapter_backward_S,
    "adapter_backward_x": _adapter.adapter_backward_x,
    "adamw_step": _adamw.adamw_step,
    "gradient_norm": _adamw.gradient_norm,
    "concurrent_managed_access": _memory.concurrent_managed_access,
    "host_slab": _memory.host_slab,
    "copy_bytes": _memory.copy_bytes,
}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_implementations: dict[tuple[str, str], str] = {}
_library_error: str | None = None


def library_path() -> Path:
    """Where the compiled library is expected."""
    return Path(str(importlib.resources.files("qlora_engine"))) / "_C.so"


def library_error() -> str | None:
    """Why the compiled library is not in use, or None where it is."""
    return _library_error


@functools.cache
def build_info() -> dict:
    """What was built at install time: `compiled`, `cuda`, `architectures`, `reason`; empty if unknown."""
    record = library_path().with_name("_build.json")
    return json.loads(record.read_text()) if record.exists() else {}


def implementation(op: str, device_type: str) -> str:
    """What serves an operator on a device: "compiled", "triton" or "reference".

    Args:
        op: an operator's name, such as "linear_nf4".
        device_type: "cpu" or "cuda".

    Raises:
        KeyError: for an operator or a device that does not exist.
    """
    return _implementations[op, device_type]


def cpu_kernels() -> str | None:
    """Which kernels serve the compiled CPU operators: "avx512bf16", "avx512", "avx2" or "baseline".

    The fastest that the processor runs, unless the environment variable QLORA_ENGINE_CPU names another.

    Returns:
        None where the library is not in use, or where QLORA_ENGINE_CPU names kernels that cannot run here; operators
        raise then.
    """
    if _library_error:
        return None
    name = ctypes.CDLL(str(library_path())).qlora_engine_cpu_kernels
    name.restype = ctypes.c_char_p
    found = name()
    return found.decode() if found else None


def _load_library() -> None:
    global _library_error
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if choice not in ("auto", "compiled", "reference"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={choice!r}; expected auto, compiled or reference")
    if choice == "reference":
        _library_error = f"{ENVIRONMENT_VARIABLE}=reference"
        return
    path = library_path()
    if not path.exists():
        why = build_info().get("reason") or f"{path} does not exist; reinstall with g++ and torch present"
        _library_error = f"not compiled: {why}"
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            _library_error = f"{path} could not be loaded: {error}"
    if _library_error and choice == "compiled":
        raise ImportError(f"{ENVIRONMENT_VARIABLE}=compiled, but the compiled library is missing: {_library_error}")


def reference_function(name: str):
    """The reference of an operator, without argument checks."""
    return _REFERENCE[name]


def _check_of(name: str):
    from qlora_engine.ops.adapter_checks import ADAPTER_CHECKS
    from qlora_engine.ops.checks import CHECKS

    return (CHECKS | ADAPTER_CHECKS)[name]


def reference_operator(name: str):
    """The reference of an operator behind the argument checks that the compiled operators make themselves."""
    function, check = _REFERENCE[name], _check_of(name)

    def call(*arguments):
        check(*arguments)
        return function(*arguments)

    return call


def triton_operator(name: str):
    """An operator's Triton kernel behind its argument checks; the kernel is imported by the first call."""
    check = _check_of(name)

    def call(*arguments):
        check(*arguments)
        return kernels.function(name)(*arguments)

    return call


def _uses_triton(name: str, device: str) -> bool:
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    return device == "cuda" and choice != "reference" and name in kernels.operators() and kernels.why_not() is None


def _register() -> None:
    schemas = {**SCHEMAS, **ADAPTER_SCHEMAS, **LAYER_SCHEMAS, **OPTIMIZER_SCHEMAS}
    for name, schema in schemas.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    _load_library()
    for name in schemas:
        qualified = f"{NAMESPACE}::{name}"
        for device, key in _DISPATCH_KEYS.items():
            compiled = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
            served = "compiled" if compiled else "triton" if _uses_triton(name, device) else "reference"
            if served != "compiled":
                operator = triton_operator if served == "triton" else reference_operator
                torch.library.impl(qualified, device)(operator(name))
            _implementations[name, device] = served


_register()
