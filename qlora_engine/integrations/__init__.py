"""Other libraries' own ways in. Each module here imports its library; nothing else of the package imports them."""

import importlib

_MODULES = ("peft", "transformers")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"qlora_engine.integrations.{name}")
    raise AttributeError(f"module 'qlora_engine.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
