"""The layers of whole models: 4-bit ones without weights, for files to be loaded into, and ordinary ones again."""

from collections.abc import Mapping

import torch
from torch import nn

from qlora_engine.models.merge import plain_layer
from qlora_engine.models.prepare import replace_module, shared_places
from qlora_engine.models.targets import expert_modules, linear_modules
from qlora_engine.nn.nf4_experts import NF4Experts, expert_projections
from qlora_engine.nn.nf4_linear import NF4Linear, is_transposed_linear


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of all linear layers and stacked experts, quantized ones included."""
    return linear_modules(model) | expert_modules(model)


def empty_module(model: nn.Module, path: str, blocksize: int, double_quant: bool) -> nn.Module:
    """A 4-bit module without weights for the one at a path, which loses its own."""
    old = model.get_submodule(path)
    if expert_projections(old):
        return NF4Experts(old, blocksize=blocksize, double_quant=double_quant)
    transposed = is_transposed_linear(old)
    in_features, out_features = old.weight.shape if transposed else old.weight.shape[::-1]
    new = NF4Linear(
        in_features,
        out_features,
        old.bias is not None,
        blocksize=blocksize,
        double_quant=double_quant,
        device="meta",
        dtype=old.weight.dtype,
    )
    new.fan_in_fan_out = transposed
    return new.train(old.training)


def empty_modules(model: nn.Module, modules: Mapping[str, dict]) -> None:
    """Puts 4-bit modules without weights into a model, in place.

    Args:
        model: the model, whose weights are on the meta device.
        modules: path -> blocksize and double_quant.
    """
    places = shared_places(model)
    for path, options in modules.items():
        replace_module(model, path, empty_module(model, path, **options), places)


def decode_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts ordinary layers and experts with the decoded weights in the place of all 4-bit ones, in place.

    Args:
        model: the model.
        dtype: of their weights and biases; default: each layer's before it was quantized.
    """
    places = shared_places(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Experts):
            replace_module(model, path, module.to_experts(dtype), places)
        elif isinstance(module, NF4Linear):
            replace_module(model, path, plain_layer(module, module.dequantize(dtype)).train(module.training), places)
