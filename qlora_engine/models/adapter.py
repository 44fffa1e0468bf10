"""Adapters as files, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from qlora_engine.models.adapters import adapter_layers, adapter_names, set_adapters
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.files import atomic_files
from qlora_engine.models.grouping import group_layers
from qlora_engine.models.peft_format import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    read_adapter_config,
    read_tensors,
    settings_of,
    write_adapter_config,
)
from qlora_engine.models.prepare import adapter_layer, own_parameters, remember_saved, saved_modules, shared_places
from qlora_engine.models.sharding import assign, is_sharded_model, plain_class, wait_for_files, whole, writes_files
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.nn.qlora_linear import DEFAULT_ADAPTER, QLoRALinear


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    base_model: str | None = None,
) -> Path:
    """Saves an adapter in PEFT's file format, which PEFT and servers such as vLLM load.

    Modules that are trained whole (`QLoRAConfig.modules_to_save`) are saved with it. The files take the place of
    older ones when both are complete; other files in the folder stay. A model that is sharded over processes gives
    the same files: all of them call this, and the first writes.

    Args:
        model: a model that `prepare` has been called on.
        directory: folder to write `adapter_config.json` and `adapter_model.safetensors` to.
        adapter_name: which adapter.
        base_model: name or path of the base model for the configuration; default: the model's own.

    Returns:
        The folder.

    Raises:
        ValueError: where the model has no adapters.
        KeyError: where it has none of that name.
    """
    model = getattr(model, "_orig_mod", model)  # the names of a compiled model have a prefix
    layers = {path: m for path, m in adapter_layers(model).items() if adapter_name in m.adapters}
    if not layers:
        raise KeyError(f"there is no adapter {adapter_name!r}; the model has {adapter_names(model) or 'none'}")
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[adapter_name]
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[adapter_name]
    for path in saved_modules(model):
        for name, tensor in model.get_submodule(path).state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = tensor
    tensors = {name: whole(t.detach()).to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    if writes_files(model):
        _write(model, directory, tensors, layers, adapter_name, base_model)
    wait_for_files(model)
    return Path(directory)


def _write(model, directory, tensors, layers, adapter_name, base_model) -> None:
    from safetensors.torch import save_file

    kind, config = plain_class(model), getattr(model, "config", None)
    with atomic_files(directory) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_adapter_config(
            folder / CONFIG_FILE,
            {path: layer.adapters[adapter_name] for path, layer in layers.items()},
            module_paths=[path for path, _ in model.named_modules()],
            modules_to_save=saved_modules(model),
            fan_in_fan_out=all(layer.fan_in_fan_out for layer in layers.values()),
            base_model=base_model or getattr(config, "_name_or_path", None) or None,
            class_name=kind.__name__,
            # PEFT must be told which class to wrap where there is no configuration that says so
            auto_mapping=None if config else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        )


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    trainable: bool = True,
) -> nn.Module:
    """Loads an adapter in PEFT's file format, and makes it the only active one.

    Every tensor is checked before the model is changed. An adapter of that name that is already there gets the new
    values; its layers, ranks and settings must be the file's. Modules that were trained whole (`modules_to_save` of
    the file) are replaced in the model, whichever adapter is active, and are saved again by `save_adapter`; one
    whose weight is tied to another module's gets a weight of its own, as in PEFT.

    Args:
        model: a model with 4-bit layers (`prepare`, `quantize_model` or `load_quantized`).
        directory: folder with `adapter_config.json` and `adapter_model.safetensors`. Nothing in it is executed:
            pickled weights are refused.
        adapter_name: name of the adapter in the model.
        trainable: whether the parameters that were loaded require gradients.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file cannot be read, asks for what is not supported, or does not fit the model.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    target = getattr(model, "_orig_mod", model)
    pairs, others = _sort_tensors(target, read_tensors(directory), directory)
    settings = {path: settings_of(config, path, A.shape[0], directory) for path, (A, B) in pairs.items()}
    saved = _find_saved(target, config.get("modules_to_save") or [], others)
    _check_fit(target, pairs, others, saved, settings, adapter_name, directory)
    places = shared_places(target)
    for path, (A, B) in pairs.items():
        layer = adapter_layer(target, path, places)
        s = settings[path]
        if adapter_name not in layer.adapters:
            if is_sharded_model(target):
                raise ValueError(
                    f"the model is sharded and has no adapter {adapter_name!r}; load the adapter before sharding"
                )
            layer.add_adapter(adapter_name, r=s.r, alpha=s.alpha, dropout=s.dropout, rslora=s.rslora)
        for held, tensor in ((layer.lora_A, A), (layer.lora_B, B)):
            assign(held[adapter_name], tensor)
            held[adapter_name].requires_grad_(trainable)
    set_adapters(target, adapter_name)
    if not config.get("ensure_weight_tying"):
        _untie_saved(target, saved, others)
    own = _tensors_by_name(target)
    for name, tensor in others.items():
        assign(own[name], tensor)
    for path in saved:
        target.get_submodule(path).requires_grad_(trainable)
    remember_saved(target, getattr(target, "qlora_config", None) or QLoRAConfig(r=0), saved)
    if target.qlora_config.fused and not is_sharded_model(target):  # sharded layers are grouped, and cannot be probed
        group_layers(target)
    return model


def _tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; one that two modules share is there under both names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _untie_saved(model: nn.Module, saved: list[str], others: dict[str, torch.Tensor]) -> None:
    """Gives the file's modules parameters of their own; those it has the same values for may go on sharing them."""
    own = _tensors_by_name(model)
    first: dict[int, torch.Tensor] = {}
    alike = all(torch.equal(tensor, first.setdefault(id(own[name]), tensor)) for name, tensor in others.items())
    for paths in [saved] if alike else [[path] for path in saved]:
        own_parameters(model, paths)


def _sort_tensors(model, tensors, directory):
    """The file's tensors as {path: (A, B)}, and the rest by its name in the model."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    others, unexpected = {}, []
    packed = {path for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    own = {name for name in model.state_dict() if not _is_inside(name, packed)}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match and key.startswith(PREFIX):
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif key.startswith(PREFIX) and name.rpartition(".")[0] in packed:
            raise ValueError(
                f"{directory} replaces {name.rpartition('.')[0]}, which is a 4-bit layer of this model; quantize "
                "the model with this layer in modules_to_save or skip_modules, so that it stays in 16 bits"
            )
        elif key.startswith(PREFIX) and name in own:
            others[name] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"{directory}: tensors that belong nowhere in the model: {_some(unexpected)}")
    lonely = [path for path, half in halves.items() if len(half) != 2]
    if lonely:
        raise ValueError(f"{directory}: only one of lora_A and lora_B is there for {_some(lonely)}")
    if not halves:
        raise ValueError(f"{directory}: there is no lora_A or lora_B in {WEIGHTS_FILE}")
    return {path: (half["A"], half["B"]) for path, half in halves.items()}, others


def _is_inside(name: str, paths: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in paths for n in range(1, len(parts)))


def _find_saved(model: nn.Module, names: list[str], others: dict[str, torch.Tensor]) -> list[str]:
    """Paths of the modules that the file has whole: PEFT's rule for names, and tensors in the file."""
    endings = tuple(name for name in names if name)
    paths = [path for path, _ in model.named_modules() if path.endswith(endings)]
    return [path for path in paths if any(name.startswith(path + ".") for name in others)]


def _check_fit(model, pairs, others, saved, settings, adapter_name, directory) -> None:
    modules = dict(model.named_modules())
    missing = [path for path in pairs if path not in modules]
    if missing:
        raise ValueError(f"{directory}: the model has no layers {_some(missing)}; is it the adapter's base model?")
    unquantized = [path for path in pairs if not isinstance(modules[path], NF4Linear)]
    if unquantized:
        raise ValueError(
            f"{directory}: {_some(unquantized)} are not 4-bit layers; call qlora_engine.prepare or quantize_model "
            "on the model first, with these layers among those that it quantizes"
        )
    problems = []
    for path, (A, B) in pairs.items():
        layer = modules[path]
        expected = (A.shape[0], layer.in_features), (layer.out_features, A.shape[0])
        if (tuple(A.shape), tuple(B.shape)) != expected:
            problems.append(f"{path}: lora_A {list(A.shape)}, lora_B {list(B.shape)}; expected {expected}")
        elif not (A.is_floating_point() and B.is_floating_point()):
            problems.append(f"{path}: lora_A {A.dtype}, lora_B {B.dtype}; expected floating-point numbers")
        known = layer.adapters.get(adapter_name) if isinstance(layer, QLoRALinear) else None
        if known is not None and known != settings[path]:
            problems.append(f"{path}: the model's adapter {adapter_name!r} has {known}, the file {settings[path]}")
    own = model.state_dict()
    for name, tensor in others.items():
        if own[name].shape != tensor.shape:
            problems.append(f"{name}: {list(tensor.shape)}; expected {list(own[name].shape)}")
        elif own[name].is_floating_point() != tensor.is_floating_point():
            problems.append(f"{name}: {tensor.dtype}; expected {own[name].dtype}")
    for path in saved:
        lacking = [f"{path}.{name}" for name in modules[path].state_dict() if f"{path}.{name}" not in others]
        if lacking:
            problems.append(f"{path} was trained whole, but the file lacks {_some(lacking)}")
    holding = {p for p, m in modules.items() if isinstance(m, QLoRALinear) and adapter_name in m.adapters}
    if holding - set(pairs):
        problems.append(f"nothing in the file for {_some(sorted(holding - set(pairs)))}, which have that adapter")
    if problems:
        raise ValueError(f"{directory} does not fit the model: " + "; ".join(problems[:5]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
