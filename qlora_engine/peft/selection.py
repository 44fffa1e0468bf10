"""Layer selection: some of the model's own parameters are trained, the others stay frozen."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.models.targets import HEAD_NAMES, check_patterns, matches_any
from qlora_engine.peft.base import MethodConfig, MethodError, applied, register
from qlora_engine.peft.blocks import as_list, find_blocks
from qlora_engine.peft.values import InPlaceMethod, TrainedValues

PREFIX, INFIX = "base_model.model.", ".ln_tuning_layers."  # of the tensors in PEFT's files


@dataclasses.dataclass
class LayerSelection(MethodConfig):
    """Trains parameters of the model itself: the union of what is asked for.

    Attributes:
        last: the last so many blocks of each stack (Lee et al. 2019, "What Would Elsa Do?").
        target_modules: patterns (see `QLoRAConfig`) of modules, trained with all that is inside them, or of
            parameters.
        norms: all normalization layers (Zhao et al. 2024, "Tuning LayerNorm in Attention"); alone, or as
            `target_modules` that are norms, the file is one of PEFT's LN_TUNING.
        head: the output head. Where its weight is tied to the embeddings, those are trained with it.
        embeddings: all embeddings.
        skip_quantized: layers in 4 bits are trained but for their weights; else to ask for one is an error.

    >>> from qlora_engine.peft import apply
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> list(apply(model, LayerSelection(norms=True, target_modules=["2.bias"])).trainable_parameters())
    ['1.weight', '1.bias', '2.bias']
    """

    name: ClassVar[str] = "selection"
    last: int = 0
    target_modules: Sequence[str] = ()
    norms: bool = False
    head: bool = False
    embeddings: bool = False
    skip_quantized: bool = False


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


@register
class LayerSelectionMethod(InPlaceMethod):
    """The chosen parameters."""

    config_class = LayerSelection
    peft_type = "LN_TUNING"

    def _install(self) -> None:
        owners, packed, seen = {}, [], set()
        others = {id(p) for method in applied(self.model) for p in method.tensors().values()}
        chosen = self._choose()
        for path, module in self.model.named_modules():
            for attribute, param in module._parameters.items():
                name = f"{path}.{attribute}" if path else attribute
                inside = name in chosen or any(name.startswith(f"{root}.") for root in chosen)
                if param is None or id(param) in others or not inside:
                    continue
                if not param.is_floating_point():
                    packed.append(name)
                elif id(param) not in seen:
                    seen.add(id(param))
                    owners[name] = (module, attribute)
        if packed and not self.config.skip_quantized:
            names = ", ".join(packed[:5]) + (", ..." if len(packed) > 5 else "")
            raise MethodError(
                f"{names} cannot be trained: in 4 bits. Name what is not, quantize the model without these layers "
                "(QLoRAConfig(skip_modules=[...])), or train the rest of them: LayerSelection(skip_quantized=True)"
            )
        if not owners:
            raise MethodError("what was chosen has no parameters that can be trained")
        self._values = TrainedValues(owners)

    def _choose(self) -> set[str]:
        """Paths of modules and names of parameters."""
        config: LayerSelection = self.config
        modules = {path: module for path, module in self.model.named_modules() if path}
        names = [*modules, *(name for name, _ in self.model.named_parameters(remove_duplicate=False))]
        patterns = as_list(config.target_modules)
        check_patterns(patterns, names, "target_modules")
        chosen = {name for name in names if matches_any(patterns, name)}
        if config.last < 0 or not isinstance(config.last, int):
            raise MethodError(f"last is {config.last!r}; expected a whole number of blocks")
        if config.last:
            stacks: dict[str, list[str]] = {}
            for block in find_blocks(self.model):
                stacks.setdefault(block.stack, []).append(block.path)
            short = {stack: len(paths) for stack, paths in stacks.items() if len(paths) < config.last}
            if short:
                raise MethodError(f"last is {config.last}, more blocks than there are: {short}")
            chosen.update(path for paths in stacks.values() for path in paths[-config.last :])
        for asked, what, found in (
            (config.norms, "normalization layers", [p for p, m in modules.items() if _is_norm(m)]),
            (config.head, "output head", self._head(modules)),
            (config.embeddings, "embeddings", [p for p, m in modules.items() if isinstance(m, nn.Embedding)]),
        ):
            if asked and not found:
                raise MethodError(
                    f"the {what} of {type(self.model).__name__} cannot be found; name them: target_modules=[...]"
                )
            chosen.update(found if asked else ())
        if not chosen:
            raise MethodError("nothing is chosen: LayerSelection(last=..., target_modules=[...], norms=True, ...)")
        return chosen

    def _head(self, modules: dict[str, nn.Module]) -> list[str]:
        get_head = getattr(self.model, "get_output_embeddings", None)
        try:
            head = get_head() if get_head else None
        except (NotImplementedError, AttributeError):
            head = None
        if head is not None:
            return [path for path, module in modules.items() if module is head]
        return [path for path in modules if path.rsplit(".", 1)[-1] in HEAD_NAMES]

    def notes(self) -> dict[str, Any]:
        """Names of parameters that are trained because another name of theirs was chosen."""
        own = {id(p): name for name, p in self.tensors().items()}
        tied = {
            name: own[id(p)]
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if id(p) in own and own[id(p)] != name
        }
        return {"tied": tied} if tied else {}

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        paths = sorted({name.rpartition(".")[0] for name in self.tensors()})
        layers = [self.model.get_submodule(path) for path in paths]
        whole = sum(len([p for p in layer._parameters.values() if p is not None]) for layer in layers)
        if not all(_is_norm(layer) for layer in layers) or whole != len(self.tensors()):
            return None
        config = {
            "peft_type": "LN_TUNING",
            "task_type": None,
            "base_model_name_or_path": getattr(self.model, "name_or_path", None),
            "inference_mode": True,
            "target_modules": "|".join(re.escape(path) for path in paths),
            "modules_to_save": None,
        }
        names = ((name.rpartition("."), tensor) for name, tensor in self.tensors().items())
        return config, {f"{PREFIX}{path}{INFIX}{last}": tensor for (path, _, last), tensor in names}

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        if config.get("modules_to_save"):
            raise MethodError(
                "modules_to_save of an LN_TUNING adapter cannot be loaded here; load it in PEFT instead"
            )
        strange = [key for key in tensors if not (key.startswith(PREFIX) and INFIX in key)]
        if strange or not tensors:
            raise MethodError(
                f"this is not the file of an LN_TUNING adapter: {', '.join(strange[:5]) or 'it is empty'}"
            )
        found = {key.removeprefix(PREFIX).replace(INFIX, "."): tensor for key, tensor in tensors.items()}
        paths = sorted({name.rpartition(".")[0] for name in found})
        return LayerSelection(target_modules=[f"re:{re.escape(path)}" for path in paths]), found
