"""Parameter-efficient methods behind one call: `apply(model, BitFit())`."""

from qlora_engine.peft.base import METHODS, Method, MethodConfig, MethodError, MethodReport, applied, apply, load
from qlora_engine.peft.bitfit import BitFit
from qlora_engine.peft.lora import LoRA

__all__ = [
    "METHODS",
    "BitFit",
    "LoRA",
    "Method",
    "MethodConfig",
    "MethodError",
    "MethodReport",
    "applied",
    "apply",
    "load",
]
