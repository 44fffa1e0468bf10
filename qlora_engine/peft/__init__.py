"""Parameter-efficient methods behind one call: `apply(model, BitFit())`."""

from qlora_engine.peft.base import METHODS, Method, MethodConfig, MethodError, MethodReport, applied, apply, load
from qlora_engine.peft.bitfit import BitFit
from qlora_engine.peft.bottleneck import Bottleneck
from qlora_engine.peft.ia3 import IA3

__all__ = [
    "IA3",
    "METHODS",
    "BitFit",
    "Bottleneck",
    "Method",
    "MethodConfig",
    "MethodError",
    "MethodReport",
    "applied",
    "apply",
    "load",
]
