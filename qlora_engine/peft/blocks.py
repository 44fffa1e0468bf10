"""The blocks of a transformer and the linear layers in them, found by the names that models give them."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from qlora_engine.models.targets import check_patterns, is_linear, left_by_default, linear_modules, matches_any
from qlora_engine.peft.base import MethodError

KEY_VALUE = ("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "key_proj", "value_proj")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj")
ATTENTION_OUT = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "to_out")
FEEDFORWARD_OUT = ("down_proj", "fc2", "dense_4h_to_h", "wo", "fc_out", "lin2", "w2", "c_proj")


@dataclasses.dataclass
class Block:
    """One of a transformer's stacked blocks.

    Attributes:
        path: where it is.
        stack: path of the list that holds it.
        keys_values: linear layers that make attention's keys and values; where those are made together with the
            queries, the layer of all three.
        attention: (input, output) layer of each attention: the first that reads the hidden states and the one that
            writes them.
        feedforward: the same of each feed-forward part.
    """

    path: str
    stack: str
    keys_values: list[str] = dataclasses.field(default_factory=list)
    attention: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    feedforward: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def find_blocks(model: nn.Module) -> list[Block]:
    """Blocks in the order in which the model holds them.

    Raises:
        MethodError: where the model has no list of blocks with linear layers.
    """
    blocks: list[Block] = []
    for stack, modules in model.named_modules():
        inside = any(stack.startswith(block.path + ".") for block in blocks)
        if isinstance(modules, nn.ModuleList) and not inside:
            for name, module in modules.named_children():
                linears = [path for path, m in module.named_modules() if path and is_linear(m)]
                if linears:
                    blocks.append(_sort(Block(f"{stack}.{name}", stack), module, linears))
    if not blocks:
        raise MethodError(
            f"{type(model).__name__} has no list of blocks with linear layers; name its layers: target_modules=[...]"
        )
    return blocks


def linear_targets(model: nn.Module, patterns: Sequence[str] | str) -> list[str]:
    """Paths of the linear layers that patterns mean; without patterns, of all but output heads.

    Raises:
        TargetError: where a pattern matches none.
        MethodError: where the model has none.
    """
    patterns = as_list(patterns)
    paths = list(linear_modules(model))
    check_patterns(patterns, paths, "target_modules")
    if patterns:
        return [path for path in paths if matches_any(patterns, path)]
    left = left_by_default(model)
    found = [path for path in paths if path not in left]
    if not found:
        raise MethodError(f"{type(model).__name__} has no linear layer beside its output head")
    return found


def as_list(patterns: Sequence[str] | str) -> list[str]:
    """Patterns as a list, where one may be given by itself."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _sort(block: Block, module: nn.Module, linears: list[str]) -> Block:
    attention, feedforward = [], []
    for path in linears:
        (attention if any("att" in part.lower() for part in path.split(".")) else feedforward).append(path)
    fused = [path for path in attention if _last(path) in FUSED]
    chosen = [path for path in attention if _last(path) in KEY_VALUE] or fused
    block.keys_values = [f"{block.path}.{path}" for path in chosen]
    ends = [path for path in attention if _last(path) in ATTENTION_OUT]
    block.attention = _pairs(block, module, attention, ends)
    ends = [path for path in feedforward if _last(path) in FEEDFORWARD_OUT or path.endswith("output.dense")]
    block.feedforward = _pairs(block, module, feedforward, ends)
    return block


def _pairs(block: Block, module: nn.Module, linears: list[str], ends: list[str]) -> list[tuple[str, str]]:
    """Each output layer with the nearest layer before it that reads what it writes."""
    found = []
    for end in ends:
        width = features(module.get_submodule(end))[1]
        starts = [path for path in linears if path not in ends and features(module.get_submodule(path))[0] == width]
        # keys and values of attention to an encoder read another model's states
        starts = [path for path in starts if _last(path) not in KEY_VALUE] or starts
        if starts:
            near = max(starts, key=lambda path: _common(path, end))  # the first of those that are nearest
            found.append((f"{block.path}.{near}", f"{block.path}.{end}"))
    return found


def features(layer: nn.Module) -> tuple[int, int]:
    """Sizes of a linear layer's input and output."""
    if hasattr(layer, "nf"):  # transformers' Conv1D
        return tuple(layer.weight.shape)
    return layer.in_features, layer.out_features


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _common(one: str, other: str) -> int:
    count = 0
    for mine, theirs in zip(one.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
