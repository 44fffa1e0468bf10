"""Whole models in bitsandbytes' 4-bit format, as transformers saves them: which layers, names and settings."""

import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from qlora_engine.models.targets import linear_modules
from qlora_engine.nn.nf4_embedding import NF4Embedding
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.quantization.bnb_format import STATE_KEY, SUFFIXES, from_bitsandbytes, read_state, to_bitsandbytes

BNB_METHOD = "bitsandbytes"
SCALE_NAMES = ("absmax", "nested_absmax", "nested_offset")


def bitsandbytes_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state under bitsandbytes' names.

    Args:
        model: the model.
        tensors: its state, or a part of it, by its own names.

    Raises:
        ValueError: where the model has stacked experts or embeddings in 4 bits, which bitsandbytes does not read.
    """
    result = dict(tensors)
    for path, module in model.named_modules():
        if isinstance(module, (NF4Experts, NF4Embedding)):
            kind = "experts" if isinstance(module, NF4Experts) else "embeddings"
            raise ValueError(f"{path} are {kind} in 4 bits, for which bitsandbytes has no format; use this package's")
        if isinstance(module, NF4Linear) and f"{path}.weight" in result:
            for scale in SCALE_NAMES:
                result.pop(f"{path}.{scale}", None)
            for suffix, tensor in to_bitsandbytes(module.nf4_weight).items():
                result[f"{path}.weight{suffix}"] = tensor
    return result


def bitsandbytes_settings(model: nn.Module) -> dict:
    """`quantization_config` of a model in bitsandbytes' format, as its `BitsAndBytesConfig` reads it."""
    linears = linear_modules(model)
    layers = [module for module in linears.values() if isinstance(module, NF4Linear)]
    return {
        "quant_method": BNB_METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": all(layer.double_quant for layer in layers),
        "bnb_4bit_compute_dtype": str(layers[0].weight_dtype).removeprefix("torch.") if layers else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [path for path, m in linears.items() if not isinstance(m, NF4Linear)],
    }


def read_layers(files: Iterable[str | os.PathLike]) -> tuple[dict[str, dict], dict[str, set[str]]]:
    """The 4-bit layers that files in bitsandbytes' format hold.

    Args:
        files: safetensors, all of a model.

    Returns:
        layers: path -> blocksize and double_quant, of NF4 layers.
        weights: name of each 4-bit weight -> what follows it in the names of its other parts.

    Raises:
        ValueError: where a file cannot be read, or a weight's settings in it.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    states = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 - a reader, not a dict
                    names.add(name)
                    weight, is_state, _ = name.partition(f".{STATE_KEY}")
                    if is_state:
                        states[weight] = read_state(
                            weight, {name.removeprefix(f"{weight}."): reader.get_tensor(name)}
                        )
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read (damaged, cut short, or no safetensors): {error}") from error
    if not states:
        raise ValueError("there are no 4-bit weights of bitsandbytes in the files; its 8-bit format is not read here")
    weights = {weight: {s for s in SUFFIXES if f"{weight}.{s}" in names} for weight in states}
    layers = {
        weight.removesuffix(".weight"): {
            "blocksize": int(state["blocksize"]),
            "double_quant": "nested_absmax" in weights[weight],
        }
        for weight, state in states.items()
        if state["quant_type"] == "nf4"
    }
    return layers, weights


def from_bitsandbytes_names(
    tensors: Iterable[tuple[str, torch.Tensor]], weights: Mapping[str, set[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of a file in bitsandbytes' format -> those of this package's 4-bit layers.

    The parts of a weight may come in any order, and with others between them.

    Args:
        tensors: what the files hold, in their order.
        weights: what `read_layers` found in them.

    Raises:
        ValueError: where a weight is not NF4, or its parts do not fit together.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    owners = {weight: weight for weight in weights}
    owners |= {f"{weight}.{suffix}": weight for weight, suffixes in weights.items() for suffix in suffixes}
    for name, tensor in tensors:
        weight = owners.get(name)
        if weight is None:
            yield name, tensor
            continue
        parts = waiting.setdefault(weight, {})
        parts[name.removeprefix(weight).removeprefix(".")] = tensor
        if parts.keys() == {"", *weights[weight]}:
            w4 = from_bitsandbytes(weight, parts.pop(""), waiting.pop(weight))
            path = weight.removesuffix("weight")
            yield weight, w4.packed
            for scale in SCALE_NAMES:
                if (found := getattr(w4, scale)) is not None:
                    yield f"{path}{scale}", found
    if waiting:
        weight, parts = next(iter(waiting.items()))
        lacking = {"", *weights[weight]} - parts.keys()
        raise ValueError(f"the files lack {', '.join(sorted(lacking)) or 'a part'} of the 4-bit weight {weight}")
