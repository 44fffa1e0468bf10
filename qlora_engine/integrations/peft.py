"""PEFT over 4-bit layers: its LoRA layer with this package's fused product, and merging that decodes first.

    import qlora_engine as qe
    from peft import LoraConfig, get_peft_model

    qe.integrations.peft.enable()                     # once; or give each configuration to register()
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

Without either, PEFT wraps a 4-bit layer in its layer for ordinary ones: that trains and saves the same adapters,
slower, and cannot merge them.
"""

import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from qlora_engine import functional
from qlora_engine.integrations.peft_experts import ParamWrapper as FusedExpertsLora
from qlora_engine.integrations.peft_experts import merged_experts
from qlora_engine.models.merge import DTYPES, plain_layer
from qlora_engine.models.prepare import replace_module, shared_places
from qlora_engine.models.skeleton import decode_modules
from qlora_engine.nn import NF4Experts, NF4Linear
from qlora_engine.quantization.weight import NF4Weight, quantize

# Initialisations in which PEFT changes the base weight, or needs it in 16 bits
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal", "mica")


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA layer over an `NF4Linear`: `qlora_engine.functional.qlora_linear` where one plain adapter acts.

    Where several act, a row of the batch has its own (`adapter_names`), an adapter is a variant such as DoRA, or
    something listens to the inner layers, PEFT's own forward runs on the 4-bit product. Adapters are named and saved
    as PEFT's. Made by PEFT, which calls it as its own layers; see `register`.

    Raises:
        ValueError: where the adapter is to be initialised from the base weight in a way that changes it.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **options
    ):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer, **options)
        self.fan_in_fan_out = False  # a 4-bit weight is [out, in], whatever the layer before it had
        self.is_target_conv_1d_layer = False
        self._before_merge: NF4Weight | None = None
        self._bias_before_merge: torch.Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options) -> None:
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
            raise ValueError(
                f"init_lora_weights={start!r} changes the base weight, which is packed in 4 bits; initialise the "
                "adapter with qlora_engine.peft.LoRA(init=...), or use True or 'gaussian'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """`[..., in]` to `[..., out]`; keyword arguments are PEFT's."""
        name = None if args or options else self._only_adapter()
        if name is None:
            return super().forward(x, *args, **options)
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        return functional.qlora_linear(
            x,
            base.nf4_weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            base.bias,
            dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _only_adapter(self) -> str | None:
        """The adapter that acts, where the fused product computes what PEFT's forward would."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or not self.cast_input_dtype_enabled:
            return None
        (name,) = names
        if name in self.lora_variant or self.lora_bias[name]:
            return None
        inner = (self.get_base_layer(), self.lora_A[name], self.lora_B[name], self.lora_dropout[name])
        if type(inner[0]) is not NF4Linear or any(_is_listened_to(module) for module in inner):
            return None
        return name

    def merged_weight(self, names: list[str] | None = None) -> torch.Tensor:
        """The decoded weight with adapters in it: float32 `[out, in]`, summed in float32.

        Args:
            names: which adapters; default: the active ones.

        Raises:
            NotImplementedError: for a variant of LoRA other than DoRA.
        """
        original = self._before_merge or self.get_base_layer().nf4_weight
        base = original.dequantize(torch.float32)
        weight = base.clone()
        for name in self.active_adapters if names is None else names:
            if name not in self.lora_A:
                continue
            A, B = (m[name].weight.detach().float() for m in (self.lora_A, self.lora_B))
            delta = (B @ A) * self.scaling[name]
            weight += delta
            if name in self.lora_variant:
                if not isinstance(self.lora_variant[name], lora.variants.DoraLinearVariant):
                    raise NotImplementedError(
                        f"{type(self.lora_variant[name]).__name__} cannot be merged into 4 bits"
                    )
                # Liu et al. 2024, "DoRA", equation 5: the norm is the unmerged weight's, as in the forward
                magnitude = self.lora_magnitude_vector[name].weight.detach().float()
                weight *= (magnitude / torch.linalg.norm(base + delta, dim=1))[:, None]
        return weight

    def merged_bias(self, names: list[str] | None = None) -> torch.Tensor | None:
        """The bias with those of adapters (`lora_bias`) in it.

        Raises:
            RuntimeError: where an adapter has a bias, and the layer none.
        """
        bias = self._bias_before_merge if self.merged else self.get_base_layer().bias
        for name in self.active_adapters if names is None else names:
            if self.lora_bias.get(name):
                if bias is None:
                    raise RuntimeError(f"the adapter {name!r} has a bias, and the layer none to merge it into")
                bias = bias.detach() + self.lora_B[name].bias.detach().to(bias.dtype) * self.scaling[name]
        return bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Decodes the weight, adds the adapters, and quantizes again, which rounds a part of them away.

        `merge_and_unload` of this module merges into 16 bits instead. `unmerge` restores the very bytes.

        Args:
            safe_merge: refuse a weight that is not finite, before anything is changed.
            adapter_names: which adapters; default: the active ones.

        Raises:
            ValueError: where a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        layer = self.get_base_layer()
        everything = [*self.merged_adapters, *names]
        weight, bias = self.merged_weight(everything), self.merged_bias(everything)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        warnings.warn(
            "adapters are merged into 4-bit weights, which rounds a part of what they learnt away; "
            "qlora_engine.integrations.peft.merge_and_unload merges into 16 bits",
            stacklevel=2,
        )
        if self._before_merge is None:
            self._before_merge, self._bias_before_merge = layer.nf4_weight, layer.bias
        w4 = quantize(weight.to(self._before_merge.dtype), layer.blocksize, layer.double_quant)
        layer.set_nf4_weight(w4)
        if bias is not layer.bias:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        self.merged_adapters = everything

    def unmerge(self) -> None:
        """Restores the weight and bias that were there before, byte for byte."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.get_base_layer()
        layer.set_nf4_weight(self._before_merge)
        layer.bias = self._bias_before_merge
        self._before_merge = self._bias_before_merge = None
        self.merged_adapters = []


def _is_listened_to(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in module.__dict__ or any(len(hook) for hook in hooks)


def register(config: PeftConfig) -> PeftConfig:
    """Lets PEFT use `FusedLoraLinear` for 4-bit layers with this configuration, and returns it.

    For stacked experts that `target_parameters` names, its kin in `peft_experts`. PEFT does not save that: register a
    configuration that was loaded again, or call `enable`.

    >>> config = register(LoraConfig(r=8, target_modules=["q_proj"]))
    """
    if isinstance(config, LoraConfig):
        config._register_custom_module({NF4Linear: FusedLoraLinear, NF4Experts: FusedExpertsLora})
    return config


_original_post_init = LoraConfig.__post_init__


def enable() -> None:
    """Registers every `LoraConfig` that is made from now on, by libraries on top of PEFT and on loading as well.

    Replaces `LoraConfig.__post_init__`, which `disable` puts back. Calling it again changes nothing.
    """

    def post_init(config: LoraConfig) -> None:
        _original_post_init(config)
        register(config)

    if LoraConfig.__post_init__ is _original_post_init:
        LoraConfig.__post_init__ = post_init


def disable() -> None:
    """Undoes `enable`; models that exist keep their layers."""
    LoraConfig.__post_init__ = _original_post_init


def load(model: nn.Module, name_or_path: str | os.PathLike, **options) -> PeftModel:
    """`PeftModel.from_pretrained` with the configuration registered.

    Args:
        model: the base model.
        name_or_path: folder of an adapter, or its name on the hub.
        options: for `PeftModel.from_pretrained`, such as `is_trainable`.
    """
    return PeftModel.from_pretrained(
        model, name_or_path, config=register(PeftConfig.from_pretrained(name_or_path)), **options
    )


def merge_and_unload(
    model: PeftModel, into: str = "bf16", adapter_names: list[str] | None = None, safe_merge: bool = True
) -> nn.Module:
    """Merges adapters into decoded weights, and returns the base model, with ordinary layers only.

    Its `save_pretrained` writes an ordinary checkpoint, which transformers and servers load without this package.

    Args:
        model: PEFT's model over 4-bit layers; not to be used afterwards.
        into: "bf16", "fp16" or "fp32".
        adapter_names: which adapters; default: the active ones.
        safe_merge: refuse weights that are not finite, before anything is changed.

    Raises:
        ValueError: where `into` is unknown, or a merged weight is not finite.
    """
    if into not in DTYPES:
        raise ValueError(f"into={into!r}; expected one of {', '.join(DTYPES)}")
    base = model.get_base_model()
    layers = {path: m for path, m in base.named_modules() if isinstance(m, FusedLoraLinear)}
    if safe_merge:
        for path, layer in layers.items():
            if not torch.isfinite(layer.merged_weight(adapter_names).to(DTYPES[into])).all():
                raise ValueError(f"the merged weight of {path} has NaN or infinity in {into}; nothing was changed")
    places = shared_places(base)
    _unload_experts(base, DTYPES[into], adapter_names)
    for path, layer in layers.items():
        new = plain_layer(layer.get_base_layer(), layer.merged_weight(adapter_names).to(DTYPES[into]))
        bias = layer.merged_bias(adapter_names)
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().to(DTYPES[into]), requires_grad=False)
        replace_module(base, path, new, places)
    merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    quantizer = getattr(merged, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.dequantize(merged, DTYPES[into])
    else:
        decode_modules(merged, DTYPES[into])
    return merged.to(DTYPES[into])


def _unload_experts(model: nn.Module, dtype: torch.dtype, names: list[str] | None) -> None:
    for path, wrapper in [(p, m) for p, m in model.named_modules() if isinstance(m, FusedExpertsLora)]:
        if not path.endswith(".base_layer"):  # the outermost of nested ones
            replace_module(model, path, merged_experts(wrapper, dtype, names))
