"""Merging: adapters become part of the weights, with a report of what that cost, and the way back."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from qlora_engine.models.prepare import replace_module, retie, shared_places, tied_heads, untie
from qlora_engine.models.sharding import check_whole
from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.nn.qlora_linear import QLoRALinear
from qlora_engine.quantization.weight import quantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer. Norms are Frobenius norms, computed in float32.

    Attributes:
        name: the layer's path.
        delta_norm: ||dW|| / ||W||, the adapter's change beside the decoded 4-bit weight; 0 without an adapter.
        kept: share of the change that the merged weight has: <W' - W, dW> / ||dW||^2; None without an adapter.
            1 is all of it; 0 means that rounding erased it.
        error: ||W' - (W + dW)|| / ||W||, what rounding the merged weight added.
        bytes_before: the layer's weight and adapters.
        bytes_after: the merged weight.
    """

    name: str
    delta_norm: float
    kept: float | None
    error: float
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass
class MergeReport:
    """What `merge` did, layer by layer, and what `unmerge` needs.

    Attributes:
        into: "bf16", "fp16", "fp32" or "nf4".
        adapters: names of the adapters that were merged.
        layers: one entry for each layer that was replaced.
    """

    into: str
    adapters: tuple[str, ...]
    layers: list[LayerMerge]
    _originals: dict[str, nn.Module] = dataclasses.field(default_factory=dict, repr=False)
    _tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False)
    _config_dtype: torch.dtype | None = dataclasses.field(default=None, repr=False)

    @property
    def reversible(self) -> bool:
        """Whether `unmerge` can restore the model: the report still holds the layers that were replaced."""
        return bool(self._originals)

    @property
    def kept(self) -> float | None:
        """Smallest share of a layer's change that was kept; None where nothing was adapted."""
        return min((layer.kept for layer in self.layers if layer.kept is not None), default=None)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def to_json(self) -> str:
        """The report as a JSON object."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return json.dumps({"into": self.into, "adapters": self.adapters, "layers": layers}, indent=1)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  |dW|/|W|   kept of dW  rounding/|W|"]
        for layer in self.layers:
            kept = "-" if layer.kept is None else f"{layer.kept:.4f}"
            lines.append(f"{layer.name:<{width}}  {layer.delta_norm:8.2e}  {kept:>10}  {layer.error:12.2e}")
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """What was merged, and what was lost, in a line or two."""
        names = ", ".join(self.adapters) or "none"
        text = (
            f"merged into {self.into}; adapters: {names}; {len(self.layers)} layers, "
            f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        )
        if self.kept is not None:
            error = max(layer.error for layer in self.layers)
            text += (
                f"\nevery layer kept at least {self.kept:.1%} of the adapter's change; rounding moved a weight "
                f"matrix by at most {error:.2%} of its norm"
            )
        return text


def merge(
    model: nn.Module,
    into: str = "bf16",
    adapter_names: str | Iterable[str] | None = None,
    safe: bool = True,
    keep_original: bool = True,
) -> MergeReport:
    """Makes adapters part of the weights, in place: W' = round(W + scaling * B A), summed in float32.

    Into 16 or 32 bits every 4-bit layer becomes an ordinary `nn.Linear` (or transformers' `Conv1D`) of that dtype,
    and the other parameters are cast, so that the model can be saved and loaded without this package. Into "nf4" the
    merged weight is quantized again, which rounds away a part of the change: read the report.

    Args:
        model: a model with 4-bit layers.
        into: "bf16", "fp16", "fp32" or "nf4".
        adapter_names: which adapters; default: the active ones of each layer. The others are dropped.
        safe: refuse before anything is changed where a merged weight, or a parameter that is cast, has NaN or
            infinity, naming it. Costs a second pass.
        keep_original: keep the replaced layers in the report, so that `unmerge` can restore them exactly. Costs
            their memory (about 0.52 bytes a weight) for as long as the report lives.

    Returns:
        The report.

    Raises:
        ValueError: where there is nothing to merge, `into` is unknown, a merged weight is not finite, or the model is
            sharded over processes.
        KeyError: where no layer has an adapter of a name.
    """
    if into not in (*DTYPES, "nf4"):
        raise ValueError(f"into={into!r}; expected one of {', '.join((*DTYPES, 'nf4'))}")
    check_whole(model, "merged")
    tied = {} if into == "nf4" else tied_heads(model)
    kinds = NF4Linear if into == "nf4" else (NF4Linear, NF4Embedding)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, kinds) and path not in tied}
    if not layers:
        raise ValueError("there is nothing to merge: the model has no 4-bit layers")
    chosen = _choose(layers, adapter_names)
    if into == "nf4":
        layers = {path: layer for path, layer in layers.items() if isinstance(layer, QLoRALinear)}
        if not any(chosen.values()):
            raise ValueError("there is nothing to merge: no layer has an active adapter")
    if safe:
        for path, layer in layers.items():
            merged = _merged_weight(layer, chosen[path])[1]
            if not torch.isfinite(merged if into == "nf4" else merged.to(DTYPES[into])).all():
                raise ValueError(f"the merged weight of {path} has NaN or infinity in {into}; nothing was changed")
        _check_cast(model, into)
    report = MergeReport(into, tuple(dict.fromkeys(n for names in chosen.values() for n in names)), [])
    if keep_original:
        report._originals = dict(layers) | {path: model.get_submodule(path) for path in tied}
        if into != "nf4":
            report._tensors = {name: p.data for name, p in _plain_tensors(model).items()}
            report._config_dtype = getattr(getattr(model, "config", None), "dtype", None)
    places = shared_places(model)
    for path, layer in layers.items():
        new, entry = _merge_layer(path, layer, chosen[path], into)
        replace_module(model, path, new, places)
        report.layers.append(entry)
    for path in tied:
        head = model.get_submodule(path)
        replace_module(model, path, plain_layer(head, None, DTYPES[into]).train(head.training), places)
    retie(model, tied)
    if into != "nf4":
        _decode_experts(model, DTYPES[into], report if keep_original else None)
        _cast(model, DTYPES[into])
    return report


def unmerge(model: nn.Module, report: MergeReport) -> nn.Module:
    """Undoes a merge exactly: the layers, packed bytes and adapters, are the very ones that were replaced.

    Args:
        model: the model that was merged.
        report: what `merge` returned for it; it gives the layers back and cannot be used again.

    Raises:
        ValueError: where the report has no layers (any more), or is of another model, which is left as it is.
    """
    if not report.reversible:
        raise ValueError("this report holds no layers: merge with keep_original=True, and unmerge only once")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    strange = [path for path in report._originals if path not in modules]
    strange += [n for n, t in report._tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if strange:
        raise ValueError(f"this report is of another model: here, {strange[0]} is not what was merged")
    places = shared_places(model)
    for path, layer in report._originals.items():
        replace_module(model, path, layer, places)
        if isinstance(layer, TiedNF4Linear):
            untie(model, path)
    tensors = _plain_tensors(model)
    for name, data in report._tensors.items():
        tensors[name].data = data
    if report._tensors and hasattr(model, "config"):
        model.config.dtype = report._config_dtype
    report._originals, report._tensors = {}, {}
    return model


def save_merged(model: nn.Module, directory: str | os.PathLike, tokenizer=None) -> Path:
    """Saves a merged model, whole or not at all.

    A model without 4-bit layers is written by its own `save_pretrained` and loads with transformers alone; one that
    was merged into NF4 is written by `save_quantized`.

    Args:
        model: a transformers model.
        directory: folder; older weights in it are replaced, other files stay.
        tokenizer: saved beside the model if given.

    Returns:
        The folder.

    Raises:
        TypeError: where the model has no `save_pretrained`.
        FileExistsError: where the folder holds an adapter.
    """
    from qlora_engine.models.checkpoint import WEIGHT_FILES, check_no_adapter, save_quantized
    from qlora_engine.models.files import atomic_directory

    if any(isinstance(m, NF4Linear) for m in model.modules()):
        return save_quantized(model, directory, tokenizer)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no save_pretrained; save its state_dict instead")
    check_no_adapter(directory)
    with atomic_directory(directory, replaces=WEIGHT_FILES) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def _choose(layers: dict[str, nn.Module], names: str | Iterable[str] | None) -> dict[str, tuple[str, ...]]:
    held = {path: getattr(layer, "adapters", {}) for path, layer in layers.items()}
    if names is None:
        return {path: getattr(layer, "active_adapters", ()) for path, layer in layers.items()}
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if not any(name in adapters for adapters in held.values()):
            known = sorted({n for adapters in held.values() for n in adapters})
            raise KeyError(f"there is no adapter {name!r} to merge; the model has {known or 'none'}")
    return {path: tuple(n for n in names if n in adapters) for path, adapters in held.items()}


def _merged_weight(
    layer: NF4Linear | NF4Embedding, names: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """float32: the decoded weight, the merged one, and the change (None without an adapter)."""
    weight = layer.dequantize(torch.float32)
    if not names:
        return weight, weight, None
    delta = layer.delta_weight(names)
    return weight, weight + delta, delta


def _merge_layer(path: str, layer: NF4Linear, names: tuple[str, ...], into: str) -> tuple[nn.Module, LayerMerge]:
    weight, merged, delta = _merged_weight(layer, names)
    before = layer.nf4_weight.nbytes
    if isinstance(layer, QLoRALinear):
        before += sum(p.nbytes for p in (*layer.lora_A.values(), *layer.lora_B.values()))
    if into == "nf4":
        w4 = quantize(merged, layer.blocksize, layer.double_quant) if names else layer.nf4_weight
        w4 = dataclasses.replace(w4, dtype=layer.weight_dtype)
        new = NF4Linear.from_weight(w4, layer.bias, fan_in_fan_out=layer.fan_in_fan_out)
        stored, after = new.dequantize(torch.float32), w4.nbytes
    else:
        new = plain_layer(layer, merged.to(DTYPES[into]))
        stored, after = merged.to(DTYPES[into]).float(), new.weight.nbytes
    new.train(layer.training)
    norm = float(weight.norm()) or 1.0
    kept = None
    if delta is not None:
        square = float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        share = (stored - weight).mul_(delta).sum(dtype=torch.float64)
        kept = float(share) / square if square else 1.0
    delta_norm = float(delta.norm()) / norm if delta is not None else 0.0
    error = float((stored - merged).norm()) / norm
    return new, LayerMerge(path, delta_norm, kept, error, before, after)


def _decode_experts(model: nn.Module, dtype: torch.dtype, report: MergeReport | None) -> None:
    """Experts, which have no adapters, become transformers' own again; the report keeps those in 4 bits."""
    for path, experts in [(p, m) for p, m in model.named_modules() if isinstance(m, NF4Experts)]:
        replace_module(model, path, experts.to_experts(dtype))
        if report is not None:
            report._originals[path] = experts


def plain_layer(
    layer: NF4Linear | NF4Embedding, weight: torch.Tensor | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """An ordinary layer in the place of a 4-bit one: `nn.Linear`, transformers' `Conv1D`, or `nn.Embedding`.

    Args:
        layer: whose bias is taken over.
        weight: `[out_features, in_features]`, or a table, not copied; None: one that is still to be put there.
        dtype: of the bias; default: that of `weight`, or the bias's own.
    """
    if weight is not None:
        dtype = weight.dtype
    if isinstance(layer, NF4Embedding):
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        return new
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        new = Conv1D(1, 1)
        new.nf, new.nx = layer.out_features, layer.in_features
        new.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        new.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().to(dtype or layer.bias.dtype), requires_grad=False)
    elif layer.fan_in_fan_out:  # Conv1D adds its bias always
        new.bias = nn.Parameter(weight.new_zeros(layer.out_features), requires_grad=False)
    return new


def _plain_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating parameters outside 4-bit layers, each once."""
    inside = {id(p) for m in model.modules() if isinstance(m, NF4Linear) for p in m.parameters()}
    return {n: p for n, p in model.named_parameters() if p.is_floating_point() and id(p) not in inside}


def _check_cast(model: nn.Module, into: str) -> None:
    """Refuses where a parameter that is not merged but only cast would not be finite, such as a norm in fp16."""
    if into == "nf4":
        return
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias") and p.is_floating_point()}
    for name, parameter in (_plain_tensors(model) | biases).items():
        if not torch.isfinite(parameter.detach().to(DTYPES[into])).all():
            raise ValueError(f"{name} has NaN or infinity in {into}; nothing was changed")


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in _plain_tensors(model).values():
        parameter.data = parameter.data.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype
