"""IA3 (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning ...", arXiv 2205.05638): trained factors."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.models.targets import check_patterns, is_linear, matches_any
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.peft.base import Method, MethodConfig, MethodError, register
from qlora_engine.peft.blocks import as_list, features, find_blocks
from qlora_engine.peft.parts import Attached, Part
from qlora_engine.peft.weights import change_weight, check_mergeable

PREFIX, SUFFIX = "base_model.model.", ".ia3_l"  # of the tensors in PEFT's files


@dataclasses.dataclass
class IA3(MethodConfig):
    """Trains one factor for each feature: `y = l * (W x + b)`, in feed-forward layers `y = W (l * x) + b`.

    Attributes:
        target_modules: patterns (see `QLoRAConfig`) of the linear layers and convolutions; default: those that make
            keys and values, and the last of each feed-forward part, as in the paper. Where keys, values and queries
            come out of one layer, all three are scaled, as PEFT does.
        feedforward_modules: patterns of those whose input is scaled instead of their output; default: the last
            layers of feed-forward parts; an empty list: none.

    >>> from qlora_engine.peft import apply
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> method = apply(model, IA3(target_modules=["0", "2"], feedforward_modules=["2"]))
    >>> {name: tuple(factors.shape) for name, factors in method.tensors().items()}
    {'0.ia3_l': (8,), '2.ia3_l': (8,)}
    """

    name: ClassVar[str] = "ia3"
    target_modules: Sequence[str] = ()
    feedforward_modules: Sequence[str] | None = None


class Scale(Part):
    """Factors `l` of float32 `[features]`, one at the start, along dimension `dim` of a tensor."""

    def __init__(self, size: int, dim: int, device: torch.device):
        super().__init__()
        self.dim = dim
        self.ia3_l = nn.Parameter(torch.ones(size, device=device))

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """The product in the factors' precision, in the dtype of `x`."""
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return (x * self.ia3_l.view(shape)).to(x.dtype)


class InputScale(Scale):
    """Scales a layer's input."""

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x)


class OutputScale(Scale):
    """Scales a layer's output, its bias included."""

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scaled(y)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


@register
class IA3Method(Method):
    """Factors on layers through hooks; PEFT reads and writes the same files."""

    config_class = IA3
    peft_type = "IA3"

    def _install(self) -> None:
        targets, inputs = self._choose()
        parts = {}
        for path in targets:
            layer = self.model.get_submodule(path)
            convolution = _is_convolution(layer)
            sizes = (layer.in_channels, layer.out_channels) if convolution else features(layer)
            dim = -1 - (layer.weight.dim() - 2 if convolution else 0)
            kind = InputScale if path in inputs else OutputScale
            parts[path] = kind(sizes[path not in inputs], dim, layer.weight.device)
        self._attached = Attached(self.model, parts, "ia3")

    def _choose(self) -> tuple[list[str], set[str]]:
        """Paths of the layers, and those of them whose input is scaled."""
        modules = dict(self.model.named_modules())
        layers = [path for path, m in modules.items() if is_linear(m) or _is_convolution(m)]
        patterns = as_list(self.config.target_modules)
        check_patterns(patterns, layers, "target_modules")
        try:
            blocks = find_blocks(self.model)
        except MethodError:
            blocks = []
        last = [end for block in blocks for _, end in block.feedforward]
        if not patterns:
            patterns = [*(path for block in blocks for path in block.keys_values), *last]
            if len(patterns) == len(last) or not last:
                raise MethodError(
                    f"the keys, values and feed-forward layers of {type(self.model).__name__} are not known; "
                    f"name them: IA3(target_modules=[...], feedforward_modules=[...]) among {', '.join(layers[:12])}"
                )
        targets = [path for path in layers if matches_any(patterns, path)]
        if self.config.feedforward_modules is not None:
            last = as_list(self.config.feedforward_modules)
            check_patterns(last, targets, "feedforward_modules")
        return targets, {path for path in targets if matches_any(last, path)}

    def _uninstall(self) -> None:
        self._attached.detach()

    def _switch(self, enabled: bool) -> None:
        self._attached.enable(enabled)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{path}{SUFFIX}": part.ia3_l for path, part in self._attached.parts.items()}

    def merge(self) -> nn.Module:
        """Scales rows (and the bias) or columns of the weights; 4-bit weights are quantized again, which rounds."""
        self._check_applied()
        check_mergeable(self.model, self._attached.parts, self.tensors().values())
        for path, part in self._attached.parts.items():
            layer, factors = self.model.get_submodule(path), part.ia3_l.detach()
            if isinstance(part, OutputScale):
                change_weight(layer, lambda w, f=factors: w * f.view(-1, *[1] * (w.dim() - 1)))
                if layer.bias is not None:
                    layer.bias.data = (layer.bias.data * factors).to(layer.bias.dtype)
            else:
                groups = getattr(layer, "groups", 1)
                change_weight(layer, lambda w, f=factors, g=groups: _scale_columns(w, f, g))
        return self.remove()

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        parts = self._attached.parts
        inputs = [path for path, part in parts.items() if isinstance(part, InputScale)]
        layers = {path: self.model.get_submodule(path) for path in parts}
        transposed = any(is_transposed_linear(m) or getattr(m, "fan_in_fan_out", False) for m in layers.values())
        config = {
            "peft_type": "IA3",
            "task_type": None,
            "base_model_name_or_path": getattr(self.model, "name_or_path", None),
            "inference_mode": True,
            "target_modules": "|".join(re.escape(path) for path in sorted(parts)),
            "feedforward_modules": "|".join(re.escape(path) for path in sorted(inputs)) or [],
            "fan_in_fan_out": transposed,
            "modules_to_save": None,
            "init_ia3_weights": True,
        }
        tensors = {}
        for path, part in parts.items():
            shape = (1, -1) if path in inputs else (-1, 1)
            if _is_convolution(layers[path]):
                shape = (1, -1, *[1] * (layers[path].weight.dim() - 2))
            tensors[f"{PREFIX}{path}{SUFFIX}"] = part.ia3_l.detach().view(shape)
        return config, tensors

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        if config.get("modules_to_save"):
            raise MethodError("modules_to_save of an IA3 adapter cannot be loaded here; load it in PEFT instead")
        strange = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(SUFFIX))]
        if strange or not tensors:
            raise MethodError(f"this is not the file of an IA3 adapter: {', '.join(strange[:5]) or 'it is empty'}")
        flat = {key.removeprefix(PREFIX): tensor.flatten() for key, tensor in tensors.items()}
        paths = [key.removesuffix(SUFFIX) for key in flat]
        names = config.get("feedforward_modules") or []
        if isinstance(names, str):
            inputs = [path for path in paths if re.fullmatch(names, path)]
        else:
            inputs = [path for path in paths if path.endswith(tuple(names))]
        exact = [f"re:{re.escape(path)}" for path in paths]
        return IA3(exact, [f"re:{re.escape(path)}" for path in inputs]), flat


def _scale_columns(weight: torch.Tensor, factors: torch.Tensor, groups: int) -> torch.Tensor:
    """Scales the input channels `[out, in / groups, ...]`; each group of outputs has channels of its own."""
    rows = weight.shape[0] // groups
    columns = factors.view(groups, 1, -1).expand(groups, rows, -1).reshape(weight.shape[0], -1)
    return weight * columns.view(*columns.shape, *[1] * (weight.dim() - 2))
