"""`prepare`: a model becomes a 4-bit model with trainable adapters, in place."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qlora_engine.models.adapters import set_adapters
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.grouping import group_layers, ungroup_layers
from qlora_engine.models.targets import find_embedding, find_experts, find_targets, matches, matches_any
from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.nn.qlora_linear import QLoRALinear


def prepare(
    model: nn.Module, config: QLoRAConfig | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Quantizes a model's linear layers and experts to NF4, adds adapters, and freezes everything else. In place.

    Layers are converted one at a time, and each 16-bit weight is released before the next. A model that is
    already quantized gets the adapters only; the new adapter is then the only active and trainable one. The output
    head and the embeddings stay in 16 bits by default: see `QLoRAConfig.quantize_head` and `quantize_embeddings`.

    Args:
        model: any `nn.Module` with `nn.Linear` layers, or transformers' `Conv1D`.
        config: what to quantize and adapt; default `QLoRAConfig()`.
        device: where the prepared model is to live; default: where it is. With a model on the CPU and a GPU
            here, the 16-bit model never exists on the GPU.

    Returns:
        The same model. `model.qlora_config` is the configuration, with modules that an earlier one named to be
        trained whole and saved.

    Raises:
        TargetError: where a pattern matches nothing. The model is then unchanged.
        ValueError: where a layer has an adapter of that name already. The model is then unchanged.
    """
    config = config or QLoRAConfig()
    quantized, adapted, saved = find_targets(model, config)
    embedding, head = find_embedding(model, config)
    stacked = find_experts(model, config)
    ranks = {path: _of_pattern(config.rank_pattern, path, config.r) for path in adapted}
    alphas = {path: _of_pattern(config.alpha_pattern, path, config.alpha) for path in adapted}
    for path in adapted:
        if ranks[path] and config.adapter_name in getattr(model.get_submodule(path), "adapters", {}):
            raise ValueError(
                f"{path} has an adapter {config.adapter_name!r} already; give the new one another adapter_name, or "
                "delete the old one with qlora_engine.delete_adapter"
            )
    places, earlier = shared_places(model), saved_modules(model)
    how = {name: getattr(config, name) for name in ("blocksize", "double_quant", "scales")} | {"device": device}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in quantized:
        layer = model.get_submodule(path)
        if not isinstance(layer, NF4Linear):
            untie(model, path)
            new = NF4Linear.from_linear(layer, **how)
            replace_module(model, path, new, places)
    if embedding is not None:
        _quantize_embedding(model, embedding, head, how, places)
    for path in stacked:
        new = NF4Experts.from_experts(model.get_submodule(path), **how)
        replace_module(model, path, new, places)
    if device is not None:
        model.to(device)
    for path in adapted:
        if ranks[path]:
            adapter_layer(model, path, places).add_adapter(
                config.adapter_name,
                r=ranks[path],
                alpha=alphas[path],
                dropout=config.dropout,
                rslora=config.rslora,
                dtype=config.adapter_dtype,
            )
    if any(ranks.values()):
        set_adapters(model, config.adapter_name)
    own_parameters(model, saved)
    for path in saved:
        model.get_submodule(path).requires_grad_(True)
    remember_saved(model, config, earlier)
    (group_layers if config.fused else ungroup_layers)(model)
    return model


def _quantize_embedding(
    model: nn.Module,
    path: str,
    head: str | None,
    how: dict,
    places: Mapping[str, Iterable[str]],
) -> None:
    """Puts the embeddings into 4 bits, and a head that is tied to them onto the same weight."""
    new = NF4Embedding.from_embedding(model.get_submodule(path), **how)
    replace_module(model, path, new, places)
    if head is not None:
        untie(model, head)
        old = model.get_submodule(head)
        replace_module(model, head, TiedNF4Linear(new, old.bias).train(old.training), places)


def quantize_model(
    model: nn.Module, config: QLoRAConfig | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Quantizes a model's linear layers to NF4 without adding adapters; see `prepare`."""
    return prepare(model, dataclasses.replace(config or QLoRAConfig(), r=0), device)


def untie(model: nn.Module, path: str) -> str | None:
    """A layer whose weight transformers ties to another, as a head to the embeddings, stops being tied to it.

    A 4-bit layer has a weight of its own; tying the model again would put the 16-bit one back in its place.

    Returns:
        The name of the parameter that it was tied to, or None where it was not.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.pop(f"{path}.weight", None)
    if source is not None and not tied:
        model.config.tie_word_embeddings = False
    return source


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Paths of heads without a weight of their own -> of the 4-bit tables that they read."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {p: paths[id(m.embedding)] for p, m in model.named_modules() if isinstance(m, TiedNF4Linear)}


def retie(model: nn.Module, heads: Mapping[str, str]) -> None:
    """Ordinary heads share the weights of ordinary tables again, and transformers knows it; undoes `untie`.

    Args:
        model: the model, in which both are ordinary layers by now.
        heads: what `tied_heads` returned before they were.
    """
    for head, table in heads.items():
        model.get_submodule(head).weight = model.get_submodule(table).weight
        tied = getattr(model, "all_tied_weights_keys", None)
        if tied is not None:
            tied[f"{head}.weight"] = f"{table}.weight"
            model.config.tie_word_embeddings = True


def saved_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that are trained whole beside the adapters."""
    config = getattr(model, "qlora_config", None)
    patterns = config.modules_to_save if config else ()
    return [path for path, _ in model.named_modules() if path and matches_any(patterns, path)]


def remember_saved(model: nn.Module, config: QLoRAConfig, paths: Iterable[str]) -> None:
    """Gives the model a configuration, in which modules that were trained whole before are named as well."""
    model.qlora_config = config
    known = set(saved_modules(model))
    new = [path for path in paths if path not in known]
    if new:
        model.qlora_config = dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *new))


def own_parameters(model: nn.Module, paths: Iterable[str]) -> None:
    """Modules that are trained whole stop sharing parameters with modules that are not.

    Else training a head would change the embeddings that it is tied to, and the file of an adapter, which has the
    head alone, would not be what was trained. Modules among `paths` go on sharing between themselves. In place.
    """
    inside = tuple(f"{path}." for path in paths)
    holders: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name, f"{path}.{name}".startswith(inside)))
    for shared in holders.values():
        chosen = [(module, name) for module, name, is_inside in shared if is_inside]
        if chosen and len(chosen) < len(shared):
            module, name = chosen[0]
            parameter = module._parameters[name]
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            for module, name in chosen:
                module._parameters[name] = own
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    apart = [name for name, source in tied.items() if name.startswith(inside) != source.startswith(inside)]
    for name in apart:
        del tied[name]
    if apart and not tied:
        model.config.tie_word_embeddings = False


def shared_places(model: nn.Module) -> dict[str, list[str]]:
    """First path of every module that the model holds in several places -> its other paths."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return {paths[0]: paths[1:] for paths in places.values() if len(paths) > 1}


def replace_module(
    model: nn.Module, path: str, new: nn.Module, places: Mapping[str, Iterable[str]] | None = None
) -> None:
    """Puts a module in the place of another, everywhere.

    Args:
        model: the model.
        path: first path of the old module.
        new: the new one.
        places: what `shared_places` returned; default: asked for now, which visits the whole model.
    """
    places = shared_places(model) if places is None else places
    for place in (path, *places.get(path, ())):
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def adapter_layer(model: nn.Module, path: str, places: Mapping[str, Iterable[str]] | None = None) -> QLoRALinear:
    """The layer at a path as one that can hold adapters; a plain 4-bit layer is replaced by one."""
    layer = model.get_submodule(path)
    if not isinstance(layer, QLoRALinear):
        layer = QLoRALinear.from_nf4(layer, r=0)
        replace_module(model, path, layer, places)
    return layer


def _of_pattern(patterns, path: str, default):
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)
