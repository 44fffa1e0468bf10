"""qlora_engine: fine-tune large language models on a frozen 4-bit base."""

from qlora_engine import functional
from qlora_engine.models.adapters import adapter_names, adapters_disabled, delete_adapter, set_adapters
from qlora_engine.models.config import QLoRAConfig, TargetError
from qlora_engine.models.prepare import prepare, quantize_model
from qlora_engine.nn import NF4Linear, QLoRALinear
from qlora_engine.quantization.weight import NF4Weight, quantize

__version__ = "0.1.0"

__all__ = [
    "NF4Linear",
    "NF4Weight",
    "QLoRAConfig",
    "QLoRALinear",
    "TargetError",
    "adapter_names",
    "adapters_disabled",
    "delete_adapter",
    "functional",
    "prepare",
    "quantize",
    "quantize_model",
    "set_adapters",
]
