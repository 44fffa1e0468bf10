"""PEFT's file format of LoRA adapters: what its two files say, read as untrusted input."""

import collections
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from qlora_engine.models.targets import matches_any
from qlora_engine.nn.qlora_linear import LoRASettings

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
# Ends of the paths of modules that PEFT trains and loads whole for a task, asked or not
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
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
# Initialisations after which PEFT subtracts the new adapter from the base weight: such an adapter is for that base.
# PEFT saves an equivalent one for the original base with path_initial_model_for_weight_conversion, as True.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter_config(directory: str | os.PathLike) -> dict:
    """The configuration of a saved adapter, checked for what can be loaded here.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is not readable, or asks for what is not supported.
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
    check_adapter_config(config, str(path))
    return config


def check_adapter_config(config: Mapping, path: str, carried: Iterable[str] = ()) -> None:
    """Refuses a configuration of PEFT's LoRA that asks for what is not computed here.

    Args:
        config: the configuration.
        path: the file, for messages.
        carried: fields of `UNSUPPORTED`, or "bias", that the caller does compute.

    Raises:
        ValueError: names what it asks for.
    """
    asked = [field for field in UNSUPPORTED if config.get(field) and field not in carried]
    if config.get("bias", "none") != "none" and "bias" not in carried:
        asked.append("bias")
    if asked:
        raise ValueError(f"{path} asks for {', '.join(asked)}, which is not supported; load it in PEFT instead")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, so the adapter belongs to a base weight that PEFT changed; "
            "save it in PEFT with path_initial_model_for_weight_conversion, which converts it to the original base"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(config.get(field), field, path)
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ValueError(f"{path}: modules_to_save is {saved!r}; expected a list of names")


def _check_patterns(patterns, field: str, path: str) -> None:
    if patterns is not None and not isinstance(patterns, dict):
        raise ValueError(f"{path}: {field} holds a {type(patterns).__name__}; expected an object of patterns")
    for pattern in patterns or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path}: {field}: {pattern!r} is not a regular expression: {error}") from error


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved adapter, on the CPU, by their names in the file.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: where the file is damaged, or a pickle.
    """
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


def settings_of(config: Mapping, path: str, rank: int, directory: Path) -> LoRASettings:
    """An adapter layer's settings, by PEFT's rules for patterns.

    Raises:
        ValueError: where the rank is another than the tensors', or a setting is out of range.
    """

    def of_pattern(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    expected = of_pattern(config.get("rank_pattern"), config.get("r"))
    if expected != rank:
        raise ValueError(f"{directory}: the configuration says rank {expected} for {path}; its lora_A has {rank}")
    alpha = of_pattern(config.get("alpha_pattern"), config.get("lora_alpha"))
    dropout = config.get("lora_dropout", 0.0)
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{directory / CONFIG_FILE}: {name} is {value!r} for {path}; expected a number")
    try:
        return LoRASettings(rank, alpha, dropout, bool(config.get("use_rslora")))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error


def adapter_config(
    settings: Mapping[str, LoRASettings],
    *,
    module_paths: list[str],
    modules_to_save: list[str],
    fan_in_fan_out: bool,
    base_model: str | None,
    class_name: str,
    auto_mapping: dict | None,
) -> dict:
    """What `adapter_config.json` must say for PEFT to adapt the same layers with the same scaling.

    Args:
        settings: path of each adapted layer -> its settings.
        module_paths: paths of all the model's modules, among which the layers' names must mean just these layers.
        modules_to_save: paths of the modules that are trained whole.
        fan_in_fan_out: whether the base layers' weights are `[in, out]`.
        base_model: name or path of the base model.
        class_name: the model's class, which says the task.
        auto_mapping: what PEFT needs to know about a class that is not transformers'.
    """
    r = _most_common(s.r for s in settings.values())
    mixed = len({s.rslora for s in settings.values()}) > 1
    # PEFT has one use_rslora for all layers; where they differ, alpha carries the whole scaling
    alphas = {path: _whole(s.scaling * s.r if mixed else s.alpha) for path, s in settings.items()}
    alpha = _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": _task(class_name, module_paths, modules_to_save),
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": auto_mapping,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": _most_common(s.dropout for s in settings.values()),
        "target_modules": _target_modules(module_paths, list(settings)),
        "exclude_modules": None,
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": not mixed and next(iter(settings.values())).rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {_pattern(p, settings): s.r for p, s in settings.items() if s.r != r},
        "alpha_pattern": {_pattern(p, settings): a for p, a in alphas.items() if a != alpha},
    }


def write_adapter_config(path: Path, settings: Mapping[str, LoRASettings], **options) -> None:
    """Writes what `adapter_config` says to a file."""
    path.write_text(json.dumps(adapter_config(settings, **options), indent=2, sort_keys=True) + "\n")


def _task(class_name: str, module_paths: list[str], modules_to_save: list[str]) -> str | None:
    """PEFT's name of the task, or None where PEFT would then look in the file for a head that was not trained."""
    task = next((task for ending, task in TASKS.items() if class_name.endswith(ending)), None)
    heads = [path for path in module_paths if path.endswith(HEADS.get(task, ()))]
    return task if set(heads) <= set(modules_to_save) else None


def _most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value  # servers expect lora_alpha to be an integer


def _pattern(path: str, paths: Iterable[str]) -> str:
    """A layer's path as a key of PEFT's patterns, anchored where it would match the end of another's as well."""
    if any(other != path and re.match(rf"(.*\.)?({path})$", other) for other in paths):
        return "^" + re.escape(path)
    return path


def _target_modules(module_paths: list[str], paths: list[str]) -> list[str] | str:
    """The layers' last names where those mean exactly these layers, as servers expect; else their paths.

    Where even a whole path is the end of another module's, one regular expression.
    """
    for names in (sorted({path.rsplit(".", 1)[-1] for path in paths}), sorted(paths)):
        if sorted(p for p in module_paths if matches_any(names, p)) == sorted(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))
