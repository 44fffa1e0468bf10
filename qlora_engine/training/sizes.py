"""Counts what a prepared model takes."""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qlora_engine.nn import NF4Embedding, NF4Linear


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model in its forms.

    Attributes:
        parameters: of the base model.
        trainable: parameters that are trained.
        bytes_16bit: the base model with 2 bytes a parameter.
        bytes_4bit: the base model as it is held: 4-bit layers with their scales; the rest at 2 bytes.
    """

    parameters: int
    trainable: int
    bytes_16bit: int
    bytes_4bit: int


def model_sizes(model: nn.Module) -> ModelSizes:
    """The sizes of a model that `prepare` or `load_quantized` made; tensors shared by modules count once."""
    parameters = packed_bytes = quantized = 0
    inside = set()
    for module in model.modules():
        if isinstance(module, (NF4Linear, NF4Embedding)) and id(module.weight) not in inside:
            weight = module.nf4_weight
            quantized += math.prod(weight.shape)
            packed_bytes += weight.nbytes
            inside.add(id(module.weight))
    trainable = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trainable += parameter.numel()
        if id(parameter) not in inside and ".lora_A." not in name and ".lora_B." not in name:
            parameters += parameter.numel()
    total = parameters + quantized
    return ModelSizes(total, trainable, 2 * total, packed_bytes + 2 * parameters)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
