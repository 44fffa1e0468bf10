"""Whole models as files: 4-bit ones saved, 4-bit or 16-bit ones loaded without the 16-bit model ever existing."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from qlora_engine.models import bnb_checkpoint
from qlora_engine.models.adapter import CONFIG_FILE, load_adapter
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.files import atomic_directory
from qlora_engine.models.prepare import prepare, quantize_model, tied_heads, untie
from qlora_engine.models.sharding import check_whole
from qlora_engine.models.shards import Shards, find_shards, resolve_folder
from qlora_engine.models.skeleton import empty_modules, modules_to_quantize, quantizable
from qlora_engine.models.streaming import checksums_of, stream
from qlora_engine.models.targets import find_targets, kept_in_float32
from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.quantization.weight import quantize

QUANT_METHOD = "qlora_engine"
PACKED = (NF4Linear, NF4Embedding, NF4Experts)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
MAX_SHARD_SIZE = "4GB"


def save_quantized(
    model: nn.Module, directory: str | os.PathLike, tokenizer=None, file_format: str = QUANT_METHOD
) -> Path:
    """Saves the 4-bit base of a model, without adapters: safetensors and a configuration, whole or not at all.

    Args:
        model: a transformers model with 4-bit layers.
        directory: folder; older weights in it are replaced, other files stay.
        tokenizer: saved beside the model if given.
        file_format: "qlora_engine", or "bitsandbytes", whose files transformers loads with bitsandbytes, and servers
            such as vLLM load as well.

    Returns:
        The folder; `load_quantized` reads it.

    Raises:
        ValueError: where the model has no 4-bit layers, is sharded over processes, the format is unknown, or it
            cannot hold the model.
        TypeError: where it has no transformers configuration.
        FileExistsError: where the folder holds an adapter.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper has other names
    check_whole(model, "saved in 4 bits")
    if not any(isinstance(module, PACKED) for module in model.modules()):
        raise ValueError("the model has no 4-bit layers; call qlora_engine.quantize_model on it first")
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no transformers configuration; save its state_dict instead")
    check_no_adapter(directory)
    settings = quantization_settings(model, file_format)
    tensors = _base_tensors(model)
    if file_format == bnb_checkpoint.BNB_METHOD:
        tensors = bnb_checkpoint.bitsandbytes_tensors(model, tensors)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    with atomic_directory(directory, replaces=WEIGHT_FILES) as folder:
        for file, names in plan.filename_to_tensors.items():
            shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt", **checksums_of(shard)})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        config["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def quantization_settings(model: nn.Module, file_format: str = QUANT_METHOD) -> dict:
    """`quantization_config` of a model's file: which layers are in 4 bits, and how.

    Raises:
        ValueError: where the format is unknown.
    """
    if file_format == bnb_checkpoint.BNB_METHOD:
        return bnb_checkpoint.bitsandbytes_settings(model)
    if file_format != QUANT_METHOD:
        raise ValueError(
            f"file_format is {file_format!r}; expected {QUANT_METHOD!r} or {bnb_checkpoint.BNB_METHOD!r}"
        )
    modules = {
        path: {"blocksize": layer.blocksize, "double_quant": layer.double_quant}
        for path, layer in model.named_modules()
        if isinstance(layer, PACKED)
    }
    for head, table in tied_heads(model).items():
        modules[head]["tied_to"] = table
    return {"quant_method": QUANT_METHOD, "format": "nf4", "modules": modules}


def check_no_adapter(directory: str | os.PathLike) -> None:
    """A model's weights would replace an adapter's; and transformers adds an adapter beside a model to it again.

    Raises:
        FileExistsError: where the folder holds an adapter.
    """
    if (Path(directory) / CONFIG_FILE).exists():
        raise FileExistsError(f"{directory} holds an adapter ({CONFIG_FILE}); save the model to another folder")


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state without adapters; a tensor that two names share is kept under the first."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        identity = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor
    return kept


def load_quantized(
    path_or_hub_id: str | os.PathLike,
    config: QLoRAConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike | None = None,
    progress: bool = True,
    on_host: bool = False,
) -> nn.Module:
    """Loads a model into 4 bits, tensor by tensor: the 16-bit model never exists as a whole.

    Reads a folder that `save_quantized` wrote, one in bitsandbytes' NF4 format, or an ordinary one with `config.json`
    and safetensors, whose linear layers are quantized on `device` as they arrive: several threads read ahead through
    page-locked memory, and beside the 4-bit model the device holds two tensors of the files at most. Where
    `save_quantized` wrote the files their checksums are verified. Pickled weights are refused: reading them can run
    code.

    Args:
        path_or_hub_id: a folder, or a model's name on the Hugging Face hub, which is downloaded.
        config: what to quantize and adapt; default: all linear layers, no adapters.
        device: where the model is to live; default: the CPU.
        dtype: of what is not quantized, and of the computation; default: the model's own.
        adapter: folder of a saved adapter to load on top.
        progress: show a progress bar.
        on_host: quantize on `device`, and keep the model in host memory: for one that is too large for a device, and
            that `qlora_engine.distributed.shard` moves block by block.

    Returns:
        The model, frozen but for its adapters, in evaluation mode.

    Raises:
        FileNotFoundError: where the folder or a file in it is missing.
        ValueError: where a file cannot be read, or its tensors do not fit the model.
        TargetError: where a pattern of `config` matches nothing.
    """
    folder = resolve_folder(path_or_hub_id)
    shards = find_shards(folder)
    settings = read_config(folder)
    quantization = settings.get("quantization_config")
    method = (quantization or {}).get("quant_method")
    if quantization and method not in (QUANT_METHOD, bnb_checkpoint.BNB_METHOD):
        raise ValueError(
            f"{folder} is already quantized ({method}), a format that cannot be read here; load the 16-bit model"
        )
    config = config or QLoRAConfig(r=0)
    model = empty_model(folder, settings)
    model.config._name_or_path = str(path_or_hub_id)  # an adapter's file names its base model by this
    weights = None
    if quantization:
        if method == bnb_checkpoint.BNB_METHOD:
            quantization["modules"], weights = bnb_checkpoint.read_layers(shards.paths)
            quantization["format"] = "nf4"
        modules = _read_modules(folder, model, quantization)
        model.qlora_config = QLoRAConfig(r=0)  # what was saved in 16 bits stays so: see left_by_default
    else:
        modules = modules_to_quantize(model, config, find_targets(model, config)[0])
    sources = {path: untie(model, path) for path in modules}
    empty_modules(model, modules)
    home = torch.device("cpu") if on_host else device
    with torch.no_grad():
        _fill(model, shards, sources, weights, device, home, dtype, config.scales, progress)
    if home is not None:
        model.to(home)  # the buffers that no file holds
    target_dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for layer in model.modules():
        if isinstance(layer, (NF4Linear, NF4Embedding)) and not isinstance(layer, TiedNF4Linear):
            layer.weight_dtype = target_dtype or layer.weight_dtype
    model.config.dtype = target_dtype
    (prepare if config.r else quantize_model)(model, config)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model: there is no config.json in it")
    try:
        settings = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    for name, value, kind in (
        ("it", settings, dict),
        ("model_type", isinstance(settings, dict) and settings.get("model_type"), str),
        ("architectures", isinstance(settings, dict) and (settings.get("architectures") or []), list),
        ("quantization_config", isinstance(settings, dict) and (settings.get("quantization_config") or {}), dict),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{path} is not a model's configuration: {name} is {value!r}; expected a {kind.__name__}"
            )
    return settings


def _read_modules(folder: Path, model: nn.Module, quantization: dict) -> dict[str, dict]:
    """The 4-bit layers that `save_quantized` listed: path -> blocksize, double_quant, and `tied_to` where tied."""
    modules, linears = quantization.get("modules"), quantizable(model)
    if quantization.get("format") != "nf4" or not isinstance(modules, dict):
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config has format {quantization.get('format')!r} and "
            f"{'no' if modules is None else type(modules).__name__} modules; expected what save_quantized writes"
        )
    for path, options in modules.items():
        if path not in linears:
            raise ValueError(
                f"{folder / 'config.json'} names a 4-bit layer {path!r}; this {type(model).__name__} has no linear "
                "layer there"
            )
        try:
            rest = {key: value for key, value in options.items() if key != "tied_to"}
            QLoRAConfig(**rest)
            complete = rest.keys() == {"blocksize", "double_quant"}
            complete &= "tied_to" not in options or options["tied_to"] in modules
        except (TypeError, ValueError):
            complete = False
        if not complete:
            raise ValueError(
                f"{folder / 'config.json'}: the 4-bit layer {path!r} has {options!r}; expected a blocksize, which is "
                "a power of two from 32 to 4096, double_quant, and for a head that is tied to a table its path"
            )
    return modules


def empty_model(folder: Path, settings: dict) -> nn.Module:
    """The model with its parameters on the meta device and its buffers, such as rotary frequencies, computed."""
    import transformers
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    names = [name for name in settings.get("architectures") or [] if isinstance(name, str)]
    settings = {key: value for key, value in settings.items() if key != "quantization_config"}
    settings["architectures"] = names
    try:
        config = transformers.AutoConfig.for_model(**settings)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: model_type {settings.get('model_type')!r} is not known to this transformers "
            f"({transformers.__version__}); update it, or name another model"
        ) from error
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a model's configuration: {error}") from error
    named = [getattr(transformers, name, None) for name in names]
    kind = next((c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
    with init_empty_weights(include_buffers=False):
        model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _fill(
    model: nn.Module,
    shards: Shards,
    sources: Mapping[str, str | None],
    weights: Mapping[str, set[str]] | None,
    device: torch.device | str | None,
    home: torch.device | str | None,
    dtype: torch.dtype | None,
    scales: str,
    progress: bool,
) -> None:
    """Puts every tensor of the files into the model; quantizes where a 4-bit layer gets a floating weight.

    Tensors are converted on `device`, and stay on `home`.

    A layer that was tied to another (`sources`) may have no tensor of its own in the files: it gets the other's.
    `weights`: the 4-bit weights of files in bitsandbytes' format, whose tensors are renamed.
    """
    from tqdm import tqdm

    expected = set(model.state_dict())
    heads = {f"{path}.weight" for path in tied_heads(model)}  # files may hold the shared weight once more
    own_name = _own_names(model, expected | heads)
    filled = set()
    parts = {f"{weight}.{suffix}" for weight, suffixes in (weights or {}).items() for suffix in suffixes}
    stored = shards.tensors()
    wanted = [tensor for tensor in stored if tensor.name in parts or own_name(tensor.name) in expected]
    unexpected = {tensor.name for tensor in stored} - {tensor.name for tensor in wanted}
    unexpected = sorted(name for name in unexpected if own_name(name) not in heads)
    nbytes = sum(tensor.nbytes for tensor in wanted)
    with tqdm(total=nbytes, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        tensors = stream(wanted, device)
        for name, tensor in bnb_checkpoint.from_bitsandbytes_names(tensors, weights) if weights else tensors:
            own = own_name(name)
            _assign(model, own, tensor, device, home, dtype, scales)
            filled.add(own)
            bar.update(tensor.nbytes)
            del tensor  # its memory is the next one's
    model.tie_weights()
    for path, source in sources.items():
        if source in filled and f"{path}.weight" not in filled | heads:
            _assign(model, f"{path}.weight", model.get_parameter(source), device, home, dtype, scales)
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unexpected = [n for n in unexpected if not _is_ignored(n, ignored)]
    if empty or unexpected:
        raise ValueError(
            f"the files of {shards.folder} do not fit {type(model).__name__}: "
            + "; ".join(
                f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
                for what, names in (("missing", empty), ("not in the model:", unexpected))
                if names
            )
            + ". Load it with transformers' from_pretrained(..., quantization_config=qlora_engine.NF4Config())"
        )


def _own_names(model: nn.Module, expected: set[str]) -> Callable[[str], str]:
    """Names of tensors in files -> names in the model, by transformers' own table of renamings.

    Files keep the names of the day they were written: GPT-NeoX's head is `embed_out` there, and `lm_head` in the
    model. Tensors whose layout has changed as well, as those of experts have, keep their names and are reported.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    prefix = getattr(model, "base_model_prefix", "")
    changes = get_model_conversion_mapping(model)

    def own_name(name: str) -> str:
        renamed = name
        for change in changes:
            if isinstance(change, WeightRenaming):
                renamed, _ = change.rename_source_key(renamed)
        candidates = (name, f"{prefix}.{name}", renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}."))
        return next((candidate for candidate in candidates if candidate in expected), name)

    return own_name


def _is_ignored(name: str, patterns) -> bool:
    # rotary frequencies and causal masks were saved by old versions of transformers; the model computes them
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.masked_bias")) or any(
        re.search(pattern, name) for pattern in patterns
    )


def _assign(
    model: nn.Module, name: str, tensor: torch.Tensor, device, home, dtype: torch.dtype | None, scales: str
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = tensor if device is None else tensor.to(device)
    if isinstance(module, (NF4Linear, NF4Embedding)) and leaf == "weight" and tensor.is_floating_point():
        tensor = tensor.T.contiguous() if getattr(module, "fan_in_fan_out", False) else tensor
        _check_shape(name, tensor, module.nf4_weight.shape)
        w4 = quantize(tensor, module.blocksize, module.double_quant, scales)
        module.set_nf4_weight(w4 if home is None else w4.to(home))
        return
    target = module._parameters.get(leaf)
    is_parameter = target is not None
    target = target if is_parameter else module._buffers[leaf]
    _check_shape(name, tensor, tuple(target.shape))
    is_scale = isinstance(module, PACKED) and not leaf.endswith("bias")
    if tensor.is_floating_point() != target.is_floating_point() or (is_scale and tensor.dtype != target.dtype):
        raise ValueError(f"{name} is {tensor.dtype}; expected {target.dtype}")
    if tensor.is_floating_point() and not is_scale:
        wanted = dtype or tensor.dtype
        tensor = tensor.to(torch.float32 if kept_in_float32(model, name, wanted) else wanted)
    tensor = tensor if home is None else tensor.to(home)
    if is_parameter:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; the model expects {list(expected)} "
            f"({math.prod(expected)} elements)"
        )
