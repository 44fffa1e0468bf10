"""The typed Python face of every operator: `torch.ops.qlora_engine.*` with fake kernels and autograd."""

from qlora_engine.ops import backend
from qlora_engine.ops.adamw import adamw_step, gradient_norm
from qlora_engine.ops.adapter import adapter_backward_S, adapter_backward_x, adapter_forward
from qlora_engine.ops.dequantize import dequantize_absmax, dequantize_nf4
from qlora_engine.ops.gated import gated_activation, gated_activation_backward
from qlora_engine.ops.linear import (
    GradientPath,
    LinearPath,
    gradient_path,
    linear_nf4,
    linear_nf4_backward,
    linear_nf4_backward_add,
    linear_nf4_backward_lora,
    linear_nf4_lora,
    linear_path,
)
from qlora_engine.ops.lora import lora_add, lora_down, lora_grad_A, lora_grad_B
from qlora_engine.ops.quantize import quantize_absmax, quantize_nf4, quantize_nf4_double, quantize_nf4_search

__all__ = [
    "GradientPath",
    "LinearPath",
    "adamw_step",
    "adapter_backward_S",
    "adapter_backward_x",
    "adapter_forward",
    "backend",
    "dequantize_absmax",
    "dequantize_nf4",
    "gated_activation",
    "gated_activation_backward",
    "gradient_norm",
    "gradient_path",
    "linear_nf4",
    "linear_nf4_backward",
    "linear_nf4_backward_add",
    "linear_nf4_backward_lora",
    "linear_nf4_lora",
    "linear_path",
    "lora_add",
    "lora_down",
    "lora_grad_A",
    "lora_grad_B",
    "quantize_absmax",
    "quantize_nf4",
    "quantize_nf4_double",
    "quantize_nf4_search",
]
