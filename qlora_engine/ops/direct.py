"""The adapter's operators for autograd nodes, which have checked their arguments: past the dispatcher where they may.

A small layer's step is bound by the host, and a call through PyTorch's dispatcher into Python and the argument checks
cost it more than the launch itself. Where nothing watches the call (no tracing, no dispatch mode, plain tensors) a
node calls the implementation; else the operator.
"""

from collections.abc import Callable

import torch

from qlora_engine import kernels
from qlora_engine.ops import backend
from qlora_engine.ops.schema import LAYER_SCHEMAS, SCHEMAS

_HAS_TRITON = kernels.why_not() is None  # asked once: a cached function is more than torch.compile can trace
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_implementations: dict[tuple[str, str], Callable] = {}


def operator(name: str, x: torch.Tensor) -> Callable:
    """What to call for an operator on the device of x, with all of its schema's arguments. It makes no graph."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.qlora_engine, name).default
    place = name, x.device.type
    if place not in _implementations:
        _implementations[place] = _implementation(*place)
    return _implementations[place]


def makes_graph(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record a call with these: if not, no node is needed, whose making costs microseconds."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def serves_layers(device: str) -> bool:
    """Whether the `adapter_*` operators are compiled for a device, and Triton's kernels not asked for instead."""
    return (
        device == "cuda"
        and backend.implementation("adapter_forward", device) == "compiled"
        and kernels.adapter_choice != "triton"
    )


def one_read_pays(grad: torch.Tensor, lora_B: torch.Tensor) -> bool:
    """Whether Triton's kernel, which reads a gradient once for dS and dB, beats two products of cuBLAS."""
    return _HAS_TRITON and kernels.adapter_choice == "auto" and kernels.one_read_pays(*grad.shape, lora_B.shape[1])


def _implementation(name: str, device: str) -> Callable:
    registered = getattr(torch.ops.qlora_engine, name).default
    if name in SCHEMAS or name in LAYER_SCHEMAS:
        return _below_autograd(registered)
    if device not in ("cpu", "cuda"):
        return registered
    if backend.implementation(name, device) == "triton":
        return kernels.function(name)
    return backend.reference_function(name)


def _below_autograd(registered: Callable) -> Callable:
    """The operator past its autograd formula, which is Python's and not needed inside a node."""

    def call(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*arguments)

    return call
