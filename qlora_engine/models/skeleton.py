"""The layers of whole models: 4-bit ones without weights, for files to be loaded into, and ordinary ones again."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.merge import plain_layer
from qlora_engine.models.prepare import replace_module, shared_places
from qlora_engine.models.targets import check_patterns, find_targets, linear_modules, matches_any
from qlora_engine.nn.nf4_experts import NF4Experts, expert_projections
from qlora_engine.nn.nf4_linear import NF4Linear, is_transposed_linear


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of stacked experts, in 16 bits (see `nn.nf4_experts`) or 4."""
    modules = {p: m for p, m in model.named_modules() if isinstance(m, NF4Experts) or expert_projections(m)}
    inside = {f"{path}.gating" for path, module in modules.items() if isinstance(module, NF4Experts)}
    return {path: module for path, module in modules.items() if path not in inside}


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of all linear layers and stacked experts, quantized ones included."""
    return linear_modules(model) | expert_modules(model)


def find_modules(model: nn.Module, skip_modules: Iterable[str] | None = None, experts: bool = True) -> list[str]:
    """Paths of what is to be stored in 4 bits.

    Args:
        model: the model.
        skip_modules: patterns for what stays in 16 bits, experts included, as in `QLoRAConfig`; None: its default.
        experts: whether stacked experts are quantized at all.

    Raises:
        TargetError: where a pattern matches nothing, or there is nothing to quantize.
    """
    stacked = expert_modules(model)
    patterns = None if skip_modules is None else list(skip_modules)
    check_patterns(patterns or (), list(quantizable(model)), "skip_modules")
    of_linears = patterns and [p for p in patterns if any(matches_any([p], path) for path in linear_modules(model))]
    paths, _, _ = find_targets(model, QLoRAConfig(r=0, skip_modules=of_linears if patterns else patterns))
    kept = [path for path in stacked if not experts or matches_any(patterns or (), path)]
    return [*paths, *(path for path in stacked if path not in kept)]


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
