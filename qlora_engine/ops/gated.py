"""`gated_activation`: `h = act(gate) * up`, and the backward that computes h again."""

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)
from qlora_engine.reference.gated import ACTIVATIONS

__all__ = ["ACTIVATIONS", "gated_activation", "gated_activation_backward"]


@torch.library.register_fake("qlora_engine::gated_activation")
def _(gate, up, activation):
    checks.gated_activation(gate, up, activation)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("qlora_engine::gated_activation_backward")
def _(grad, gate, up, activation):
    checks.gated_activation_backward(grad, gate, up, activation)
    return tuple(gate.new_empty(gate.shape) for _ in range(3))


@torch.library.register_fake("qlora_engine::gated_activation_backward_inplace")
def _(grad, gate, up, activation):
    checks.gated_activation_backward(grad, gate, up, activation)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """The hidden state of a gated MLP: `act(gate) * up`, computed in float32 and rounded once.

    Shazeer 2020, "GLU variants improve transformer", equations 5 and 6.

    Args:
        gate, up: float16, bfloat16 or float32, of one dtype, shape and strides: contiguous, or columns of a matrix.
        activation: "silu", "gelu" (exact) or "gelu_tanh".

    Returns:
        Of the dtype and shape of `gate`, contiguous.

    Raises:
        RuntimeError: for another activation, or tensors that do not fit each other.
    """
    return torch.ops.qlora_engine.gated_activation(gate, up, activation)


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`h` again, and the gradients of gate and up.

    Args:
        grad: the gradient of `gated_activation`'s result, of its dtype, contiguous.
        gate, up, activation: as in `gated_activation`.
        inplace: write the results over `grad`, `gate` and `up`, and return those.

    Returns:
        `act(gate) * up`, the gradient of `gate`, the gradient of `up`.

    Raises:
        RuntimeError: for another activation, or tensors that do not fit each other.
    """
    if not inplace:
        return torch.ops.qlora_engine.gated_activation_backward(grad, gate, up, activation)
    torch.ops.qlora_engine.gated_activation_backward_inplace(grad, gate, up, activation)
    return grad, gate, up
