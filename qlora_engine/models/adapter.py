"""Adapters as files, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

import collections
import json
import os
import re
from pathlib import Path

import torch
from torch import nn

from qlora_engine.models.adapters import adapter_layers, adapter_names
from qlora_engine.models.files import atomic_files
from qlora_engine.models.prepare import adapter_layer
from qlora_engine.models.targets import matches_any
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.nn.qlora_linear import DEFAULT_ADAPTER, LoRASettings, QLoRALinear

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Features of PEFT's LoRA that change what an adapter computes and that a layer here does not compute.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    base_model: str | None = None,
) -> Path:
    """Saves an adapter in PEFT's file format, which PEFT and servers such as vLLM load.

    Modules that are trained whole (`QLoRAConfig.modules_to_save`) are saved with it. The files take the place of
    older ones when both are complete; other files in the folder stay.

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
    from safetensors.torch import save_file

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
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    config = _peft_config(model, layers, adapter_name, base_model)
    with atomic_files(directory) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(directory)


def saved_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that are trained whole beside the adapters."""
    config = getattr(model, "qlora_config", None)
    patterns = config.modules_to_save if config else ()
    return [path for path, _ in model.named_modules() if path and matches_any(patterns, path)]


def _peft_config(model: nn.Module, layers: dict[str, QLoRALinear], name: str, base_model: str | None) -> dict:
    settings = {path: layer.adapters[name] for path, layer in layers.items()}
    r = _most_common(s.r for s in settings.values())
    alpha = _most_common(s.alpha for s in settings.values())
    dropout = _most_common(s.dropout for s in settings.values())
    class_name = type(model).__name__
    task = next((task for ending, task in TASKS.items() if class_name.endswith(ending)), None)
    base = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_modules(model, list(layers)),
        "exclude_modules": None,
        "modules_to_save": saved_modules(model) or None,
        "bias": "none",
        "fan_in_fan_out": all(layer.fan_in_fan_out for layer in layers.values()),
        "use_rslora": next(iter(settings.values())).rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {path: s.r for path, s in settings.items() if s.r != r},
        "alpha_pattern": {path: s.alpha for path, s in settings.items() if s.alpha != alpha},
    }
    if not hasattr(model, "config"):  # PEFT then needs to know which class to wrap
        config["auto_mapping"] = {"base_model_class": class_name, "parent_library": type(model).__module__}
    return config


def _most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def _target_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """The layers' last names where those mean exactly these layers, as servers expect; else the whole paths."""
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    meant = [path for path, _ in model.named_modules() if matches_any(names, path)]
    return names if sorted(meant) == sorted(paths) else sorted(paths)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    trainable: bool = True,
) -> nn.Module:
    """Loads an adapter in PEFT's file format, and makes it the active one.

    Every tensor is checked before the model is changed. An adapter of that name that is already there gets the new
    values; its layers, ranks and settings must be the file's.

    Args:
        model: a model with 4-bit layers (`prepare`, `quantize_model` or `load_quantized`).
        directory: folder with `adapter_config.json` and `adapter_model.safetensors`. Nothing in it is executed:
            pickled weights are refused.
        adapter_name: name of the adapter in the model.
        trainable: whether the adapter's parameters require gradients.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file cannot be read, asks for what is not supported, or does not fit the model.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    tensors = _read_tensors(directory)
    pairs, others = _sort_tensors(model, tensors, directory)
    settings = {path: _settings_of(config, path, A.shape[0], directory) for path, (A, B) in pairs.items()}
    _check_fit(model, pairs, others, settings, adapter_name, directory)
    for path, (A, B) in pairs.items():
        layer = adapter_layer(model, path)
        s = settings[path]
        if adapter_name not in layer.adapters:
            layer.add_adapter(adapter_name, r=s.r, alpha=s.alpha, dropout=s.dropout, rslora=s.rslora)
        with torch.no_grad():
            layer.lora_A[adapter_name].copy_(A)
            layer.lora_B[adapter_name].copy_(B)
        layer.lora_A[adapter_name].requires_grad_(trainable)
        layer.lora_B[adapter_name].requires_grad_(trainable)
        layer.set_adapters(adapter_name)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in others.items():
        with torch.no_grad():
            own[name].copy_(tensor)
    return model


def read_adapter_config(directory: str | os.PathLike) -> dict:
    """The configuration of a saved adapter, checked for what can be loaded here.

    Raises:
        FileNotFoundError, ValueError: as in `load_adapter`.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not an adapter: there is no {CONFIG_FILE} in it")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object of settings")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be loaded here")
    asked = [field for field in UNSUPPORTED if config.get(field)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if asked:
        raise ValueError(f"{path} asks for {', '.join(asked)}, which is not supported; load it in PEFT instead")
    return config


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / PICKLED_FILE).exists():
            raise ValueError(
                f"{directory / PICKLED_FILE} is a pickle, which can run code when it is read; save the adapter as "
                f"{WEIGHTS_FILE} (PEFT: save_pretrained(..., safe_serialization=True))"
            )
        raise FileNotFoundError(f"{directory} is not an adapter: there is no {WEIGHTS_FILE} in it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read (damaged or cut short): {error}") from error


def _sort_tensors(model, tensors, directory):
    """The file's tensors as {path: (A, B)}, and the rest by its name in the model."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    others, unexpected = {}, []
    own = set(model.state_dict())
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match and key.startswith(PREFIX):
            halves.setdefault(match[1], {})[match[2]] = tensor
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


def _settings_of(config: dict, path: str, rank: int, directory: Path) -> LoRASettings:
    """An adapter layer's settings, by PEFT's rules for patterns."""

    def of_pattern(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    expected = of_pattern(config.get("rank_pattern"), config.get("r"))
    if expected != rank:
        raise ValueError(f"{directory}: the configuration says rank {expected} for {path}; its lora_A has {rank}")
    alpha = of_pattern(config.get("alpha_pattern"), config.get("lora_alpha", rank))
    try:
        return LoRASettings(rank, alpha, config.get("lora_dropout", 0.0), bool(config.get("use_rslora")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error


def _check_fit(model, pairs, others, settings, adapter_name, directory) -> None:
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
        known = layer.adapters.get(adapter_name) if isinstance(layer, QLoRALinear) else None
        if known is not None and known != settings[path]:
            problems.append(f"{path}: the model's adapter {adapter_name!r} has {known}, the file {settings[path]}")
    own = model.state_dict()
    for name, tensor in others.items():
        if own[name].shape != tensor.shape:
            problems.append(f"{name}: {list(tensor.shape)}; expected {list(own[name].shape)}")
    holding = {p for p, m in modules.items() if isinstance(m, QLoRALinear) and adapter_name in m.adapters}
    if holding - set(pairs):
        problems.append(f"nothing in the file for {_some(sorted(holding - set(pairs)))}, which have that adapter")
    if problems:
        raise ValueError(f"{directory} does not fit the model: " + "; ".join(problems[:5]))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
