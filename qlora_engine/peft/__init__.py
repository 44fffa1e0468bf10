"""Parameter-efficient methods behind one call: `apply(model, BitFit())`."""

from qlora_engine.peft.base import METHODS, Method, MethodConfig, MethodError, MethodReport, applied, apply, load
from qlora_engine.peft.bitfit import BitFit
from qlora_engine.peft.p_tuning import PTuning
from qlora_engine.peft.p_tuning_v2 import PTuningV2
from qlora_engine.peft.prefix_tuning import PrefixTuning
from qlora_engine.peft.prompt_tuning import PromptTuning

__all__ = [
    "METHODS",
    "BitFit",
    "Method",
    "MethodConfig",
    "MethodError",
    "MethodReport",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "applied",
    "apply",
    "load",
]
