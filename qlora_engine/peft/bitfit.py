"""BitFit (Ben Zaken et al. 2022, "BitFit: Simple parameter-efficient fine-tuning"): only biases are trained."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from qlora_engine.models.targets import check_patterns, is_linear, matches_any
from qlora_engine.peft.base import MethodConfig, MethodError, register
from qlora_engine.peft.values import InPlaceMethod, TrainedValues


@dataclasses.dataclass
class BitFit(MethodConfig):
    """Trains biases.

    Attributes:
        target_modules: patterns (see `QLoRAConfig`) of the modules whose biases are trained; default: all that have
            one.
        add_missing: gives linear layers without a bias a trainable one of zeros; Llama's layers have none.
    """

    name: ClassVar[str] = "bitfit"
    target_modules: Sequence[str] = ()
    add_missing: bool = False


@register
class BitFitMethod(InPlaceMethod):
    """Biases of the model itself, and those that linear layers are given."""

    config_class = BitFit

    def _install(self) -> None:
        config: BitFit = self.config
        modules = {path: m for path, m in self.model.named_modules() if path}
        patterns = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        check_patterns(patterns, list(modules), "target_modules")
        chosen = {path: m for path, m in modules.items() if not patterns or matches_any(patterns, path)}
        with_bias = [path for path, m in chosen.items() if isinstance(getattr(m, "bias", None), nn.Parameter)]
        without = [path for path, m in chosen.items() if is_linear(m) and getattr(m, "bias", None) is None]
        if not with_bias and not (config.add_missing and without):
            near = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in without})[:10]) or "none"
            raise MethodError(
                f"{type(self.model).__name__} has no bias to train in the modules asked for; "
                f"BitFit(add_missing=True) gives linear layers one. Linear layers without a bias: {near}"
            )
        self._added: list[str] = without if config.add_missing else []
        for path in self._added:
            module = modules[path]
            reference = next(t for t in [*module.buffers(), *module.parameters()])
            dtype = getattr(module, "compute_dtype", None) or next(
                (p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32
            )
            size = getattr(module, "out_features", None) or module.nf  # nf: transformers' Conv1D
            module.bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=reference.device))
        self._values = TrainedValues(
            {f"{path}.bias": (modules[path], "bias") for path in [*with_bias, *self._added]},
        )

    def _uninstall(self) -> None:
        super()._uninstall()
        for path in self._added:
            self.model.get_submodule(path).bias = None

    def merge(self) -> nn.Module:
        """The trained biases stay."""
        self._check_applied()
        self._added = []
        return super().merge()
