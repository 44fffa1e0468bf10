"""Merging a low-rank method into the base weights, with a report of what rounding took, and the way back."""

import dataclasses
from typing import Any

import torch
from torch import nn

from qlora_engine.models.merge import DTYPES, LayerMerge, MergeReport, plain_layer
from qlora_engine.models.merge import merge as merge_packed
from qlora_engine.models.merge import unmerge as unmerge_packed
from qlora_engine.models.prepare import own_parameters, replace_module, shared_places
from qlora_engine.nn import NF4Linear
from qlora_engine.peft.base import MethodError, applied, reapply
from qlora_engine.peft.layers import like_weight, shared_weights
from qlora_engine.peft.sites import tell_changed
from qlora_engine.quantization.weight import quantize


@dataclasses.dataclass
class _Before:
    """What `unmerge` brings back."""

    state: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)  # path -> tensor, NF4Weight or NF4Linear
    tied: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)
    tied_keys: dict[str, str] | None = None
    tie_word_embeddings: bool | None = None
    others: MergeReport | None = None
    cast: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None


class Mergeable:
    """`merge` and `unmerge` for a method whose `_sites` each have `layer`, `base()`, `merged()`.

    Attributes:
        merge_report: what the last `merge` did to each layer; None before.
    """

    merge_report: MergeReport | None = None
    _before: _Before | None = None

    def merge(self, into: str | None = None, safe: bool = True, keep_original: bool = True) -> nn.Module:
        """Puts what was learnt into the base weights, summed in float32, and removes the method.

        Args:
            into: None: each weight in its own format, 4-bit ones quantized again, which rounds away a part of the
                change: read `merge_report`. "bf16", "fp16" or "fp32": every 4-bit layer of the model becomes an
                ordinary layer of that dtype, other parameters are cast; the model then loads without this package.
            safe: refuse before anything is changed where a merged weight has NaN or infinity.
            keep_original: keep the old weights, so that `unmerge` can bring them back.

        Returns:
            The model. A weight that was shared with another layer is that layer's own no longer.

        Raises:
            MethodError: where the method is not on the model, `into` is unknown, a merged weight is not finite, or
                other adapters are on layers that would be replaced.
        """
        self._check_applied()
        if into is not None and into not in DTYPES:
            raise MethodError(f"into={into!r}; expected None or one of {', '.join(DTYPES)}")
        if into is not None and len(applied(self.model)) > 1:
            raise MethodError("other methods are on the model; merge or remove them first, then merge into " + into)
        self.enable()
        if safe:
            self._check_finite(into)
        before = _Before(self.state_dict(), self._values.former())
        report = MergeReport(into or "its own formats", (self.config.adapter_name,), [])
        self._untie(before)
        plain: dict[str, nn.Module] = {}
        for path, site in self._sites.items():
            report.layers.append(self._write(path, site, into, before, plain))
            tell_changed(site.layer)
        self._values.keep()
        self.remove()
        places = shared_places(self.model)
        for path, layer in plain.items():
            before.weights[path] = self.model.get_submodule(path)
            replace_module(self.model, path, layer, places)
        if into is not None:
            self._merge_others(into, before)
        self.merge_report, self._before = report, before if keep_original else None
        return self.model

    def unmerge(self) -> nn.Module:
        """Undoes `merge`: base weights are the bits they were, and the method is on the model with what it learnt.

        Raises:
            MethodError: where nothing was merged, or the old weights were not kept.
        """
        before = self._before
        if before is None:
            raise MethodError(f"{self.name} holds no weights to bring back: merge with keep_original=True, and once")
        if before.others is not None:
            unmerge_packed(self.model, before.others)
        if before.cast:
            parameters = dict(self.model.named_parameters())
            for name, data in before.cast.items():
                parameters[name].data = data
            if hasattr(self.model, "config"):
                self.model.config.dtype = before.dtype
        places = shared_places(self.model)
        for path, old in before.weights.items():
            layer = self.model.get_submodule(path)
            if isinstance(old, nn.Module):
                replace_module(self.model, path, old, places)
            elif isinstance(layer, NF4Linear):
                layer.set_nf4_weight(old)
            else:
                layer.weight.data = old
            tell_changed(self.model.get_submodule(path))
        for path, parameter in before.tied.items():
            self.model.get_submodule(path)._parameters["weight"] = parameter
        if before.tied_keys is not None:
            self.model.all_tied_weights_keys = before.tied_keys
        if before.tie_word_embeddings is not None:
            self.model.config.tie_word_embeddings = before.tie_word_embeddings
        self._values.write(before.values)
        self._before = self.merge_report = None
        reapply(self, before.state)
        return self.model

    def _check_finite(self, into: str | None) -> None:
        for path, site in self._sites.items():
            dtype = torch.float32 if isinstance(site.layer, NF4Linear) else site.layer.weight.dtype
            if not torch.isfinite(site.merged().to(DTYPES.get(into, dtype))).all():
                raise MethodError(f"the merged weight of {path} has NaN or infinity; nothing was changed")

    def _untie(self, before: _Before) -> None:
        """Weights that are shared with other layers become the layers' own."""
        paths = [path for path, site in self._sites.items() if not isinstance(site.layer, NF4Linear)]
        for path in shared_weights(self.model, paths):
            if before.tied_keys is None and getattr(self.model, "all_tied_weights_keys", None) is not None:
                before.tied_keys = dict(self.model.all_tied_weights_keys)
                before.tie_word_embeddings = getattr(self.model.config, "tie_word_embeddings", None)
            before.tied[path] = self.model.get_submodule(path).weight
            own_parameters(self.model, [path])

    def _write(self, path, site, into: str | None, before: _Before, plain: dict[str, nn.Module]) -> LayerMerge:
        layer, weight, merged = site.layer, site.base(), site.merged()
        size = sum(t.nbytes for t in site.named_tensors().values())
        if isinstance(layer, NF4Linear):
            size += layer.nf4_weight.nbytes
            if into is not None:
                plain[path] = plain_layer(layer, merged.to(DTYPES[into]))
                stored, after = plain[path].weight.detach().float(), plain[path].weight.nbytes
                stored = stored.T if layer.fan_in_fan_out else stored
            else:
                before.weights[path] = site.original_base()
                w4 = quantize(merged, layer.blocksize, layer.double_quant)
                layer.set_nf4_weight(dataclasses.replace(w4, dtype=layer.weight_dtype))
                stored, after = layer.dequantize(torch.float32), w4.nbytes
                site.keep_base()
        else:
            size += layer.weight.nbytes
            before.weights[path] = layer.weight.data
            layer.weight.data = like_weight(layer, merged).to(layer.weight.dtype)
            stored, after = site.base(), layer.weight.nbytes
        return _entry(path, weight, merged, stored, size, after)

    def _merge_others(self, into: str, before: _Before) -> None:
        """4-bit layers that were not adapted, and the rest of the parameters."""
        if any(isinstance(m, NF4Linear) for m in self.model.modules()):
            before.others = merge_packed(self.model, into)
            return
        config = getattr(self.model, "config", None)
        before.cast = {n: p.data for n, p in self.model.named_parameters() if p.is_floating_point()}
        before.dtype = getattr(config, "dtype", None)
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[into])
        if config is not None:
            config.dtype = DTYPES[into]


def _entry(path: str, weight, merged, stored, size: int, after: int) -> LayerMerge:
    delta = merged - weight
    norm = float(weight.norm()) or 1.0
    square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    share = float(((stored - weight) * delta).sum(dtype=torch.float64))
    kept = share / square if square else 1.0
    return LayerMerge(path, float(delta.norm()) / norm, kept, float((stored - merged).norm()) / norm, size, after)
