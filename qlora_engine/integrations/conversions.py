"""Steps of transformers' loading that end in 4-bit modules: a tensor is placed as soon as it is quantized or read."""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_engine.nn import NF4Embedding, NF4Experts, NF4Linear
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.quantization.bnb_format import decode_fp4, from_bitsandbytes
from qlora_engine.quantization.weight import quantize

SCALES = ("absmax", "nested_absmax", "nested_offset")


class _Placing(ConversionOps):
    """A step that puts weights into their modules itself, and cannot be undone when the model is saved.

    Args:
        quantizer: the `NF4Quantizer`; transformers looks for it, and leaves the dtype of what it reads alone.
    """

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer


class Quantize(_Placing):
    """Quantizes weights of linear layers and stacked experts; other tensors go on."""

    @torch.no_grad()
    def convert(self, input_dict, *, model: nn.Module, missing_keys=None, **options) -> dict:
        rest, scales = {}, self.hf_quantizer.quantization_config.scales
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                rest[name] = value
                continue
            module, leaf = get_module_from_name(model, name)
            if isinstance(module, NF4Experts):
                module.set_weights(leaf, value, scales)
            else:
                value = value.T.contiguous() if getattr(module, "fan_in_fan_out", False) else value
                module.set_nf4_weight(quantize(value, module.blocksize, module.double_quant, scales))
            _mark_loaded(module, name, missing_keys)
        return rest


class LoadBitsandbytes(_Placing):
    """Puts the parts of a weight in bitsandbytes' format together.

    NF4 goes into its 4-bit layer as it is; FP4 is decoded; a weight that was not quantized goes on. The latter two
    have the model's dtype then.
    """

    @torch.no_grad()
    def convert(self, input_dict, *, full_layer_name: str, model: nn.Module, missing_keys=None, **options) -> dict:
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        weight = parts.pop("weight", None)
        if weight is None:
            raise ValueError(f"the files lack the packed weight {full_layer_name}")
        rest = {key.removeprefix("weight."): value for key, value in parts.items()}
        module, leaf = get_module_from_name(model, full_layer_name)
        if isinstance(module, (NF4Linear, NF4Embedding)) and leaf == "weight":
            module.set_nf4_weight(from_bitsandbytes(full_layer_name, weight, rest))
            _mark_loaded(module, full_layer_name, missing_keys)
            return {}
        if parts:
            weight = decode_fp4(full_layer_name, weight, rest)
            weight = weight.T.contiguous() if is_transposed_linear(module) else weight
        return {full_layer_name: weight.to(getattr(module, leaf).dtype)}


def _mark_loaded(module: nn.Module, name: str, missing_keys: set | None) -> None:
    """Tells transformers that a weight and its scales are there and need no initialisation."""
    path, _, leaf = name.rpartition(".")
    names = [f"{leaf}_{scale}" for scale in SCALES] if isinstance(module, NF4Experts) else list(SCALES)
    for tensor_name in (leaf, *names):
        tensor = getattr(module, tensor_name)
        if tensor is not None:
            tensor._is_hf_initialized = True
        if missing_keys is not None:
            missing_keys.discard(f"{path}.{tensor_name}")
