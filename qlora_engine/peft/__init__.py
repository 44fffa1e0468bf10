"""Parameter-efficient methods behind one call: `apply(model, BitFit())`."""

from qlora_engine.peft.base import METHODS, Method, MethodConfig, MethodError, MethodReport, applied, apply, load
from qlora_engine.peft.bitfit import BitFit
from qlora_engine.peft.bottleneck import Bottleneck
from qlora_engine.peft.diff_pruning import DiffPruning
from qlora_engine.peft.fishmask import FishMask
from qlora_engine.peft.ia3 import IA3
from qlora_engine.peft.selection import LayerSelection

__all__ = [
    "IA3",
    "METHODS",
    "BitFit",
    "Bottleneck",
    "DiffPruning",
    "FishMask",
    "LayerSelection",
    "Method",
    "MethodConfig",
    "MethodError",
    "MethodReport",
    "applied",
    "apply",
    "load",
]
