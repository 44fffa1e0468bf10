"""qlora_engine: fine-tune large language models on a frozen 4-bit base."""

from qlora_engine.quantization.weight import NF4Weight, quantize

__all__ = ["NF4Weight", "quantize"]
