"""PEFT's LoRA on the stacked weights of experts in 4 bits (`target_parameters`), in PEFT's own form and files."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from peft.tuners.lora import layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from qlora_engine.nn.nf4_experts import SCALES, NF4Experts


class ParamWrapper(layer.ParamWrapper):
    """PEFT's wrapper of one stacked weight of `NF4Experts`: every expert's product is one fused one with its adapter.

    PEFT adds the product of the factors to the whole stack at each call, which packed bytes do not allow; here each
    expert that is chosen multiplies with its own factors. Wrappers of two weights lie in one another, as in PEFT.
    Made by PEFT: `LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])`, registered.
    It has the name of PEFT's class because that is what PEFT knows wrappers by.
    """

    _before_merge: list[torch.Tensor | None] | None = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts = self.get_base_layer()
        self.num_experts, self._param_ndim = experts.num_experts, 3
        out_features, in_features = experts.shapes[self.parameter_name]
        # in the order in which the replaced module keeps the weight, from which PEFT goes on
        return (in_features, out_features) if experts.is_transposed else (out_features, in_features)

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        if not names:
            yield
            return
        A, B = zip(*(self._factors(name) for name in names), strict=True)
        scaling = self.scaling[names[0]]
        if len(names) > 1:
            scaled = [factor * self.scaling[name] for factor, name in zip(B, names, strict=True)]
            A, B, scaling = (torch.cat(A, dim=1),), (torch.cat(scaled, dim=2),), 1.0
        with self.get_base_layer().adapted(self.parameter_name, A[0], B[0].contiguous(), scaling):
            yield

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[experts, r, in]` and B `[experts, out, r]`; PEFT's B has the experts last."""
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        A = A.reshape(self.num_experts, -1, A.shape[-1])
        return A, B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def merged_weight(self, names: list[str] | None = None) -> torch.Tensor:
        """The decoded stack with adapters in it, float32, in the order of the replaced module.

        Args:
            names: which adapters; default: the active ones.
        """
        experts = self.get_base_layer()
        stored = self._stored(experts)
        self._restore(experts, self._before_merge or stored)
        weight = experts.dequantize(self.parameter_name, torch.float32)
        self._restore(experts, stored)
        for name in self.active_adapters if names is None else names:
            if name in self.lora_A:
                weight += self.get_delta_weight(name).detach().float()
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As `FusedLoraLinear.merge`: decodes, adds, quantizes again; `unmerge` restores the very bytes.

        Raises:
            ValueError: with `safe_merge`, where a merged weight is not finite; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        experts, everything = self.get_base_layer(), [*self.merged_adapters, *names]
        weight = self.merged_weight(everything)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        warnings.warn(
            "adapters are merged into 4-bit experts, which rounds a part of what they learnt away", stacklevel=2
        )
        self._before_merge = self._before_merge or self._stored(experts)
        experts.set_weights(self.parameter_name, weight.to(experts.weight_dtype))
        self.merged_adapters = everything

    def unmerge(self) -> None:
        """Restores the weight that was there before, byte for byte."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore(self.get_base_layer(), self._before_merge)
        self._before_merge = None
        self.merged_adapters = []

    def _stored(self, experts: NF4Experts) -> list[torch.Tensor | None]:
        scales = [experts._buffers[f"{self.parameter_name}_{scale}"] for scale in SCALES]
        return [experts._parameters[self.parameter_name], *scales]

    def _restore(self, experts: NF4Experts, stored: list[torch.Tensor | None]) -> None:
        experts._parameters[self.parameter_name] = stored[0]
        for scale, tensor in zip(SCALES, stored[1:], strict=True):
            experts._buffers[f"{self.parameter_name}_{scale}"] = tensor


def merged_experts(wrapper: ParamWrapper, dtype: torch.dtype, names: list[str] | None = None) -> nn.Module:
    """The module that the experts replaced, with the adapters of nested wrappers in its weights.

    Args:
        wrapper: the outermost.
        dtype: of the weights.
        names: which adapters; default: the active ones.
    """
    experts = wrapper.get_base_layer().to_experts(dtype)
    while isinstance(wrapper, ParamWrapper):
        weight = wrapper.merged_weight(names).to(dtype)
        experts._parameters[wrapper.parameter_name] = nn.Parameter(weight, requires_grad=False)
        wrapper = wrapper.base_layer
    return experts
