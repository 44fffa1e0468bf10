"""Which modules of a model a pattern means."""

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from qlora_engine.models.config import ALL_LINEAR, QLoRAConfig, TargetError
from qlora_engine.nn.nf4_embedding import NF4Embedding, TiedNF4Linear, why_not_quantizable
from qlora_engine.nn.nf4_experts import NF4Experts, expert_projections
from qlora_engine.nn.nf4_linear import NF4Linear, is_transposed_linear

# Parts of the paths of output heads, for models that do not name theirs through get_output_embeddings()
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "output_projection")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be quantized, or has been.

    `nn.MultiheadAttention` reads the weight of its output projection itself, so that one is not.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of all linear layers, quantized ones included."""
    return {path: module for path, module in model.named_modules() if is_linear(module)}


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of stacked experts, in 16 bits (see `nn.nf4_experts`) or 4."""
    modules = {p: m for p, m in model.named_modules() if isinstance(m, NF4Experts) or expert_projections(m)}
    inside = {f"{path}.gating" for path, module in modules.items() if isinstance(module, NF4Experts)}
    return {path: module for path, module in modules.items() if path not in inside}


def find_experts(model: nn.Module, config: QLoRAConfig) -> list[str]:
    """Paths of the stacked experts in 16 bits that a configuration wants in 4.

    None in a model that has been prepared before: what was left then stays.
    """
    if not config.experts or getattr(model, "qlora_config", None) is not None:
        return []
    patterns = (*(config.skip_modules or ()), *config.modules_to_save)
    return [
        path
        for path, module in expert_modules(model).items()
        if not isinstance(module, NF4Experts) and not any(matches_any(patterns, parent) for parent in _parents(path))
    ]


def _parents(path: str) -> list[str]:
    """A module's path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means the module at a path; see `QLoRAConfig`.

    >>> matches("q_proj", "layers.0.q_proj"), matches("proj", "layers.0.q_proj"), matches("re:.*_proj", "a.q_proj")
    (True, False, True)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return path == pattern or path.endswith("." + pattern)


def matches_any(patterns: Iterable[str], path: str) -> bool:
    """Whether one of several patterns means the module at a path."""
    return any(matches(pattern, path) for pattern in patterns)


def check_patterns(patterns: Iterable[str], paths: Sequence[str], what: str) -> None:
    """Every pattern must mean something.

    Raises:
        TargetError: names the pattern, and the names that come near.
    """
    for pattern in patterns:
        try:
            found = any(matches(pattern, path) for path in paths)
        except re.error as error:
            raise TargetError(f"{what}: {pattern!r} is not a regular expression: {error}") from error
        if not found:
            raise TargetError(f"{what}: {pattern!r} matches no module. {_near_matches(pattern, paths)}")


def _near_matches(pattern: str, paths: Sequence[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    wanted = pattern.removeprefix("re:")
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4)
    near += [path for path in difflib.get_close_matches(wanted, paths, n=3, cutoff=0.6) if path not in near]
    if near:
        return f"Near matches: {', '.join(near)}."
    return f"This model's candidates: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."


def left_by_default(model: nn.Module) -> set[str]:
    """Paths of linear layers that are left in 16 bits by default.

    Output heads, with the layers inside them; layers with a shared weight; and those that transformers keeps in
    float32 (`_keep_in_fp32_modules`): T5 casts its activations to the dtype of such a weight, which must not be that
    of packed bytes. In a model that has been prepared before, all that was left then, and its output head, which gets
    an adapter by name alone.
    """
    linears, head = linear_modules(model), output_head(model)
    left = {path for path, module in linears.items() if not isinstance(module, NF4Linear)}
    if getattr(model, "qlora_config", None) is not None and len(left) < len(linears):
        return left | {path for path, module in linears.items() if module is head}
    shared = {path for paths in _owners(model).values() if len(paths) > 1 for path in paths}
    return {
        path
        for path, module in linears.items()
        if module is head
        or path in shared
        or not set(path.split(".")).isdisjoint(HEAD_NAMES)
        or kept_in_float32(model, f"{path}.weight", torch.float16)
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that a transformers model names as its output head, or None."""
    return _named_layer(model, "get_output_embeddings")


def _named_layer(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        return get() if get else None
    except (NotImplementedError, AttributeError):
        return None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold a parameter `weight`, by its identity."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, torch.Tensor):
            owners.setdefault(id(weight), []).append(path)
    return owners


def _sharing(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules that share the weight of the one at `path`, or will once transformers ties the model."""
    owners = set(_owners(model)[id(model.get_submodule(path).weight)])
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(f"{path}.weight", f"{path}.weight")
    named = [name.removesuffix(".weight") for name in (source, *(n for n, s in tied.items() if s == source))]
    return [one for one, _ in model.named_modules() if one in owners or one in named]


def find_embedding(model: nn.Module, config: QLoRAConfig) -> tuple[str | None, str | None]:
    """The table that a configuration wants in 4 bits, and the head that is to go on sharing its weight.

    Returns:
        embedding: path of the input embeddings where they are still to be quantized, else None.
        head: path of the output head where it is tied to them and quantized with them, else None.

    Raises:
        TargetError: where the model has no such table, it cannot be quantized, or another module shares its weight.
    """
    embedding = _named_layer(model, "get_input_embeddings") if config.quantize_embeddings else None
    if config.quantize_embeddings and embedding is None:
        raise TargetError(f"quantize_embeddings: {type(model).__name__} names no input embeddings")
    if embedding is None or isinstance(embedding, NF4Embedding):
        return None, None
    reason = why_not_quantizable(embedding)
    if reason:
        raise TargetError(f"quantize_embeddings: {reason}")
    path = next(path for path, module in model.named_modules() if module is embedding)
    if any(matches_any(config.modules_to_save, parent) for parent in _parents(path)):
        raise TargetError(f"quantize_embeddings: modules_to_save asks to train {path} whole; leave one of them out")
    head = output_head(model)
    others = [one for one in _sharing(model, path) if one != path]
    heads = [one for one in others if model.get_submodule(one) is head]
    if others != heads:
        raise TargetError(
            f"quantize_embeddings: {path} shares its weight with {', '.join(p for p in others if p not in heads)}, "
            "which cannot read a table in 4 bits"
        )
    if heads and not config.quantize_head:
        raise TargetError(
            f"quantize_embeddings: {path} shares its weight with the head {heads[0]}, which would have to keep it in "
            "16 bits beside the table; quantize both (quantize_head=True), or neither"
        )
    return path, heads[0] if heads else None


def _quantized_head(model: nn.Module, config: QLoRAConfig) -> set[str]:
    """Path of the head that `quantize_head` means; an empty set where it is not asked for.

    Raises:
        TargetError: where there is none, or another option keeps it in 16 bits.
    """
    if not config.quantize_head:
        return set()
    head = output_head(model)
    path = next((path for path, module in linear_modules(model).items() if module is head), None)
    if path is None:
        raise TargetError(f"quantize_head: {type(model).__name__} names no linear output head")
    for name in ("skip_modules", "modules_to_save"):
        if any(matches_any(getattr(config, name) or (), parent) for parent in _parents(path)):
            raise TargetError(f"quantize_head: {name} keeps {path} in 16 bits; leave one of them out")
    return {path}


def kept_in_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps a parameter in float32 where the model is loaded in `dtype`."""
    patterns = set()
    if dtype in (torch.float16, torch.bfloat16):
        patterns.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(re.search(rf"(^|\.)({pattern})(\.|$)", name) for pattern in patterns)


def find_targets(model: nn.Module, config: QLoRAConfig) -> tuple[list[str], list[str], list[str]]:
    """What a configuration means for a model.

    Returns:
        quantized: paths of the linear layers that are, or are to be, stored in 4 bits with a weight of their own.
        adapted: those of them that get an adapter.
        saved: paths of the modules that are trained whole.

    Raises:
        TargetError: where a pattern matches nothing, or an adapter is wanted on a layer that stays in 16 bits.
    """
    linears = linear_modules(model)
    paths = [path for path, _ in model.named_modules() if path]
    check_patterns(config.modules_to_save, paths, "modules_to_save")
    saved = [path for path in paths if matches_any(config.modules_to_save, path)]
    inside_saved = {p for p in linears if any(p == s or p.startswith(s + ".") for s in saved)}
    packed = sorted(p for p in inside_saved if isinstance(linears[p], NF4Linear))
    if packed:
        raise TargetError(
            f"modules_to_save asks to train {', '.join(packed[:5])} whole, already in 4 bits; name it there when the "
            "model is quantized, or give it an adapter"
        )
    named = [pattern for pattern in config.target_modules if pattern != ALL_LINEAR] if config.r else []
    check_patterns(named, list(linears), "target_modules")
    head, (_, tied) = _quantized_head(model, config), find_embedding(model, config)
    apart: set[str] = set()  # what "all-linear" does not mean
    if config.skip_modules is None:
        apart = left_by_default(model) - {path for path in linears if matches_any(named, path)}
        skipped = (apart - head) | inside_saved
    else:
        check_patterns(config.skip_modules, [*linears, *expert_modules(model)], "skip_modules")
        skipped = {path for path in linears if matches_any(config.skip_modules, path)} | inside_saved
    quantized = [p for p, m in linears.items() if (p not in skipped and p != tied) or isinstance(m, NF4Linear)]
    if not quantized:
        raise TargetError(
            f"{type(model).__name__} has no linear layer to quantize; linear layers found: "
            f"{', '.join(linears) or 'none'}"
        )
    if config.r == 0:
        return quantized, [], saved
    check_patterns(config.exclude_modules, list(linears), "exclude_modules")
    adapted = [
        path
        for path in (quantized if ALL_LINEAR in config.target_modules else linears)
        if ((ALL_LINEAR in config.target_modules and path not in apart) or matches_any(named, path))
        and not matches_any(config.exclude_modules, path)
    ]
    shared = [path for path in adapted if path == tied or isinstance(linears[path], TiedNF4Linear)]
    if shared:
        raise TargetError(
            f"target_modules asks for an adapter on {shared[0]}, whose 4-bit weight is that of the embeddings; leave "
            "it out (exclude_modules), or the embeddings in 16 bits"
        )
    stay = sorted(set(adapted) - set(quantized))
    if stay:
        raise TargetError(
            f"target_modules asks for adapters on {', '.join(stay[:5])}, which skip_modules or modules_to_save "
            "keeps in 16 bits; take it out of one of the two"
        )
    if not adapted:
        raise TargetError("no layer is left to adapt: exclude_modules excludes all that target_modules matches")
    return quantized, adapted, saved
