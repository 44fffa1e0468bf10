"""qlora_engine: fine-tune large language models on a frozen 4-bit base."""

from qlora_engine import functional
from qlora_engine.models.adapter import load_adapter, save_adapter
from qlora_engine.models.adapters import adapter_names, adapters_disabled, delete_adapter, set_adapters
from qlora_engine.models.checkpoint import load_quantized, save_quantized
from qlora_engine.models.config import QLoRAConfig, TargetError
from qlora_engine.models.merge import MergeReport, merge, save_merged, unmerge
from qlora_engine.models.prepare import prepare, quantize_model
from qlora_engine.nn import NF4Linear, QLoRALinear
from qlora_engine.quantization.weight import NF4Weight, quantize

__version__ = "0.1.0"

__all__ = [
    "MergeReport",
    "NF4Linear",
    "NF4Weight",
    "QLoRAConfig",
    "QLoRALinear",
    "TargetError",
    "adapter_names",
    "adapters_disabled",
    "delete_adapter",
    "functional",
    "load_adapter",
    "load_quantized",
    "merge",
    "prepare",
    "quantize",
    "quantize_model",
    "save_adapter",
    "save_merged",
    "save_quantized",
    "set_adapters",
    "unmerge",
]
