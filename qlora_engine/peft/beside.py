"""Biases and whole modules that a low-rank method trains beside its branches."""

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import nn

from qlora_engine.models.peft_format import PREFIX
from qlora_engine.models.targets import check_patterns, matches_any
from qlora_engine.peft.base import MethodError
from qlora_engine.peft.layers import as_patterns
from qlora_engine.peft.values import TrainedValues


def trained_beside(
    model: nn.Module, layers: Mapping[str, nn.Module], bias: str, modules_to_save: str | Sequence[str]
) -> tuple[TrainedValues, list[str]]:
    """What is trained in place.

    Args:
        model: the model.
        layers: the adapted layers by path.
        bias: "none", "all" for every bias of the model, or else those of the adapted layers.
        modules_to_save: patterns (see `QLoRAConfig`) of modules whose parameters are all trained.

    Returns:
        The parameters, and the paths that `modules_to_save` means.

    Raises:
        TargetError: where a pattern matches nothing.
        MethodError: where a module is in 4 bits, or shares a parameter with one that is not to be trained.
    """
    modules = {path: m for path, m in model.named_modules() if path}
    patterns = as_patterns(modules_to_save)
    check_patterns(patterns, list(modules), "modules_to_save")
    whole = [path for path in modules if matches_any(patterns, path)]
    owners: dict[str, tuple[nn.Module, str]] = {}
    for root in whole:
        for path, module in modules[root].named_modules(prefix=root):
            owners |= {f"{path}.{name}": (module, name) for name, p in module._parameters.items() if p is not None}
    _check_trainable(model, owners)
    if bias != "none":
        chosen = modules if bias == "all" else layers
        with_bias = {path: m for path, m in chosen.items() if isinstance(getattr(m, "bias", None), nn.Parameter)}
        owners |= {f"{path}.bias": (m, "bias") for path, m in with_bias.items()}
    return TrainedValues(owners), whole


def _check_trainable(model: nn.Module, owners: Mapping[str, tuple[nn.Module, str]]) -> None:
    for name, (module, attribute) in owners.items():
        if not getattr(module, attribute).is_floating_point():
            raise MethodError(f"modules_to_save asks to train {name}, which is in 4 bits; give it an adapter")
    inside = {id(getattr(module, attribute)): name for name, (module, attribute) in owners.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and name not in owners:
            raise MethodError(f"modules_to_save: {inside[id(parameter)]} is also {name}; untie them first")


def peft_names(values: Mapping[str, torch.Tensor], adapted: Container[str]) -> dict[str, torch.Tensor]:
    """Such parameters under the names that PEFT's files give them.

    Args:
        values: by name in the model.
        adapted: paths of the adapted layers, which PEFT wraps.
    """
    found = {}
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        found[f"{PREFIX}{path}{'.base_layer' if path in adapted else ''}.{attribute}"] = value
    return found


def own_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `peft_names`, and of the prefix that PEFT puts before all names."""
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


def saved_names(config: Mapping, names: Iterable[str]) -> list[str]:
    """Those of the names in a configuration's `modules_to_save` of which the file has tensors.

    PEFT names both "classifier" and "score" for every classifier.
    """
    wanted = config.get("modules_to_save") or ()
    return [name for name in wanted if any(f".{name}." in f".{key}" for key in names)]
