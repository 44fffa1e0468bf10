"""qlora_engine: fine-tune large language models on a frozen 4-bit base.

The public names are imported when they are first used, so that `qlora --help` need not wait for torch. Their use,
or `import qlora_engine.ops`, registers the operators under `torch.ops.qlora_engine`.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "MergeReport": "qlora_engine.models.merge",
    "NF4Config": "qlora_engine.integrations.transformers",
    "NF4Embedding": "qlora_engine.nn",
    "NF4Experts": "qlora_engine.nn",
    "NF4Linear": "qlora_engine.nn",
    "NF4Weight": "qlora_engine.quantization.weight",
    "QLoRAConfig": "qlora_engine.models.config",
    "QLoRALinear": "qlora_engine.nn",
    "TargetError": "qlora_engine.models.config",
    "adapter_names": "qlora_engine.models.adapters",
    "adapters_disabled": "qlora_engine.models.adapters",
    "delete_adapter": "qlora_engine.models.adapters",
    "load_adapter": "qlora_engine.models.adapter",
    "load_quantized": "qlora_engine.models.checkpoint",
    "merge": "qlora_engine.models.merge",
    "prepare": "qlora_engine.models.prepare",
    "quantize": "qlora_engine.quantization.weight",
    "quantize_model": "qlora_engine.models.prepare",
    "save_adapter": "qlora_engine.models.adapter",
    "save_merged": "qlora_engine.models.merge",
    "save_quantized": "qlora_engine.models.checkpoint",
    "set_adapters": "qlora_engine.models.adapters",
    "unmerge": "qlora_engine.models.merge",
}

_MODULES = ("distributed", "functional", "integrations", "optim", "peft")

# needs transformers, which `from qlora_engine import *` does not
_OPTIONAL = ("NF4Config",)

__all__ = sorted({*_HOMES, *_MODULES} - {*_OPTIONAL})


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"qlora_engine.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_engine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_OPTIONAL})
