"""Reference of `gated_activation` and its backward: `h = act(gate) * up`, computed in float32."""

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """`act(gate)`, in the dtype of `gate`."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The derivative of `act` at `gate`."""
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu":
        density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(gate / math.sqrt(2))) + gate * density
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    tanh = torch.tanh(inner)
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * gate * gate)
    return 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * inner_slope


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `qlora_engine.ops.gated_activation`."""
    return (activate(gate.float(), activation) * up.float()).to(gate.dtype).contiguous()


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `qlora_engine.ops.gated_activation_backward`."""
    wide_grad, wide_gate, wide_up = grad.float(), gate.float(), up.float()
    value = activate(wide_gate, activation)
    grad_gate = wide_grad * wide_up * slope(wide_gate, activation)
    results = value * wide_up, grad_gate, wide_grad * value
    return tuple(result.to(gate.dtype).contiguous() for result in results)


def gated_activation_backward_inplace(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    """See `qlora_engine.ops.gated_activation_backward`."""
    results = gated_activation_backward(grad, gate, up, activation)
    for tensor, result in zip((grad, gate, up), results, strict=True):
        tensor.copy_(result)
