"""Layers on 4-bit weights."""

from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.nn.qlora_linear import LoRASettings, QLoRALinear

__all__ = ["LoRASettings", "NF4Embedding", "NF4Experts", "NF4Linear", "QLoRALinear", "TiedNF4Linear"]
