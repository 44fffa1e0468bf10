"""Parameter-efficient methods behind one call: `apply(model, BitFit())`."""

from qlora_engine.peft.adalora import AdaLoRA
from qlora_engine.peft.base import METHODS, Method, MethodConfig, MethodError, MethodReport, applied, apply, load
from qlora_engine.peft.bitfit import BitFit
from qlora_engine.peft.bottleneck import Bottleneck
from qlora_engine.peft.diff_pruning import DiffPruning
from qlora_engine.peft.dora import DoRA
from qlora_engine.peft.fishmask import FishMask
from qlora_engine.peft.ia3 import IA3
from qlora_engine.peft.lora import LoRA
from qlora_engine.peft.lora_fa import LoRAFA
from qlora_engine.peft.lora_plus import LoRAPlus
from qlora_engine.peft.p_tuning import PTuning
from qlora_engine.peft.p_tuning_v2 import PTuningV2
from qlora_engine.peft.prefix_tuning import PrefixTuning
from qlora_engine.peft.prompt_tuning import PromptTuning
from qlora_engine.peft.selection import LayerSelection
from qlora_engine.peft.vera import VeRA

__all__ = [
    "IA3",
    "METHODS",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DiffPruning",
    "DoRA",
    "FishMask",
    "LayerSelection",
    "LoRA",
    "LoRAFA",
    "LoRAPlus",
    "Method",
    "MethodConfig",
    "MethodError",
    "MethodReport",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "VeRA",
    "applied",
    "apply",
    "load",
]
