"""The layers of whole models: 4-bit ones without weights, for files to be loaded into, and ordinary ones again."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.merge import plain_layer
from qlora_engine.models.prepare import replace_module, retie, shared_places, tied_heads
from qlora_engine.models.targets import expert_modules, find_embedding, linear_modules
from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear
from qlora_engine.nn.nf4_experts import NF4Experts, expert_projections
from qlora_engine.nn.nf4_linear import NF4Linear, is_transposed_linear


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of all linear layers, stacked experts and plain tables, quantized ones included."""
    tables = {p: m for p, m in model.named_modules() if type(m) is nn.Embedding or isinstance(m, NF4Embedding)}
    return linear_modules(model) | expert_modules(model) | tables


def empty_module(
    model: nn.Module, path: str, blocksize: int, double_quant: bool, tied_to: str | None = None
) -> nn.Module:
    """A 4-bit module without weights for the one at a path, which loses its own.

    Args:
        model: the model.
        path: of a linear layer, stacked experts or a table.
        blocksize, double_quant: of the weight.
        tied_to: path of the 4-bit table whose weight a head shares.
    """
    old = model.get_submodule(path)
    if tied_to is not None:
        return TiedNF4Linear(model.get_submodule(tied_to), old.bias).train(old.training)
    if isinstance(old, nn.Embedding):
        new = NF4Embedding(
            old.num_embeddings,
            old.embedding_dim,
            old.padding_idx,
            blocksize=blocksize,
            double_quant=double_quant,
            device="meta",
            dtype=old.weight.dtype,
        )
        return new.train(old.training)
    if expert_projections(old):
        return NF4Experts(old, blocksize=blocksize, double_quant=double_quant)
    transposed = is_transposed_linear(old)
    in_features, out_features = old.weight.shape if transposed else old.weight.shape[::-1]
    new = NF4Linear(
        in_features,
        out_features,
        old.bias is not None,
        blocksize=blocksize,
        double_quant=double_quant,
        device="meta",
        dtype=old.weight.dtype,
    )
    new.fan_in_fan_out = transposed
    return new.train(old.training)


def modules_to_quantize(model: nn.Module, config: QLoRAConfig, paths: Iterable[str]) -> dict[str, dict]:
    """What `empty_modules` takes: layers at `paths`, and the embeddings with their head as `config` asks for them."""
    options = {"blocksize": config.blocksize, "double_quant": config.double_quant}
    embedding, head = find_embedding(model, config)
    modules = {path: dict(options) for path in paths}
    if embedding is not None:
        modules[embedding] = dict(options)
    if head is not None:
        modules[head] = {**options, "tied_to": embedding}
    return modules


def empty_modules(model: nn.Module, modules: Mapping[str, dict]) -> None:
    """Puts 4-bit modules without weights into a model, in place.

    Args:
        model: the model, whose weights are on the meta device.
        modules: path -> blocksize, double_quant, and for a head tied to a table `tied_to`.
    """
    places = shared_places(model)
    for path, options in sorted(modules.items(), key=lambda item: "tied_to" in item[1]):  # tables before their heads
        replace_module(model, path, empty_module(model, path, **options), places)


def decode_modules(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts ordinary layers, tables and experts with the decoded weights in the place of all 4-bit ones, in place.

    Args:
        model: the model.
        dtype: of their weights and biases; default: each layer's before it was quantized.
    """
    places, tied = shared_places(model), tied_heads(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, TiedNF4Linear):
            replace_module(model, path, plain_layer(module, None).train(module.training), places)
        elif isinstance(module, NF4Experts):
            replace_module(model, path, module.to_experts(dtype), places)
        elif isinstance(module, (NF4Linear, NF4Embedding)):
            replace_module(model, path, plain_layer(module, module.dequantize(dtype)).train(module.training), places)
    retie(model, tied)
