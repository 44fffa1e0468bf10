"""FishMask (Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks")."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.peft.base import Method, MethodConfig, MethodError, register
from qlora_engine.peft.blocks import features, linear_targets
from qlora_engine.peft.fisher import Loss, largest_fisher, model_loss
from qlora_engine.peft.parts import Attached
from qlora_engine.peft.sparse_delta import INDEX, VALUES, SparseDelta, deltas_of, load_deltas
from qlora_engine.peft.weights import change_weight, check_mergeable


@dataclasses.dataclass
class FishMask(MethodConfig):
    """Trains the share of the weights with the largest empirical Fisher information, `F = mean (d loss / d W)^2`.

    Attributes:
        share: how many of all weights of the chosen layers are trained, in (0, 1].
        samples: batches as the model takes them, with labels, or for `loss`; batches that are dicts of tensors are
            taken apart into samples, whose gradients are squared one by one. A few hundred samples do. None: the
            choice is made later, by `method.select(batches)`.
        target_modules: patterns (see `QLoRAConfig`) of the linear layers; default: all but output heads.
        loss: function of the model and a batch; default: the loss that the model returns.
        memory: bytes for F at a time. Layers that do not fit take further passes over the samples.

    >>> from qlora_engine.peft import apply
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> def loss(model, x):
    ...     return model(x).square().sum()
    >>> method = apply(model, FishMask(share=0.25, samples=torch.randn(10, 1, 4), loss=loss))
    >>> method.report().trainable, sum(module.weight.numel() for module in (model[0], model[2]))
    (12, 48)
    """

    name: ClassVar[str] = "fishmask"
    share: float = 0.005
    samples: Iterable[Any] | None = None
    target_modules: Sequence[str] = ()
    loss: Loss | None = None
    memory: int = 2**30

    def __post_init__(self):
        if not 0.0 < self.share <= 1.0:
            raise MethodError(f"the share is {self.share}; expected a number above 0 and at most 1")
        if self.samples is not None:
            self.samples = list(self.samples)  # read once for every group of layers

    def to_json(self) -> dict[str, Any]:
        """What a file keeps: the samples have done their work."""
        return {"share": self.share, "target_modules": list(self.target_modules), "memory": self.memory}


@register
class FishMaskMethod(Method):
    """Sparse changes on linear layers; the memory is that of the mask: 8 bytes an entry, and its gradient."""

    config_class = FishMask

    def _install(self) -> None:
        self._targets = linear_targets(self.model, self.config.target_modules)
        self._attached: Attached | None = None
        if self.config.samples is not None:
            self.select(self.config.samples)

    def select(self, batches: Iterable[Any]) -> None:
        """Chooses the weights that are trained; see `FishMask`. Make the optimizer afterwards.

        Raises:
            MethodError: where they have been chosen already, or the samples do not tell.
        """
        if self._attached is not None:
            raise MethodError("the weights have been chosen already; remove the method and apply it again")
        config: FishMask = self.config
        layers = {path: self.model.get_submodule(path) for path in self._targets}
        total = sum(rows * columns for rows, columns in map(features, layers.values()))
        count = max(1, round(config.share * total))
        loss = config.loss or model_loss
        found = largest_fisher(self.model, self._targets, list(batches), count, loss, config.memory)
        self._attach({p: SparseDelta(where, tuple(reversed(features(layers[p])))) for p, where in found.items()})

    def _attach(self, parts: dict[str, SparseDelta]) -> None:
        self._attached = Attached(self.model, parts, "sparse_delta")
        self._attached.enable(self.enabled)

    def _uninstall(self) -> None:
        if self._attached is not None:
            self._attached.detach()

    def _switch(self, enabled: bool) -> None:
        if self._attached is not None:
            self._attached.enable(enabled)

    def tensors(self) -> dict[str, torch.Tensor]:
        if self._attached is None:
            return {}
        parts = self._attached.parts.items()
        return {f"{path}.{name}": getattr(part, name) for path, part in parts for name in (INDEX, VALUES)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if self._attached is None:
            self._attach(deltas_of(self.model, state))
            return
        load_deltas(self._attached.parts, state, super().load_state_dict)

    def save(self, folder) -> None:
        if self._attached is None:
            raise MethodError("nothing has been chosen yet: method.select(batches)")
        super().save(folder)

    def merge(self) -> nn.Module:
        """Adds the changes to the weights; 4-bit weights are quantized again, which rounds most of a change away."""
        self._check_applied()
        check_mergeable(self.model, self._attached.parts if self._attached else (), self.tensors().values())
        for path, part in self._attached.parts.items() if self._attached else ():
            change_weight(self.model.get_submodule(path), part.add_to)
        return self.remove()

    def notes(self) -> dict[str, Any]:
        layers = len(self._attached.parts) if self._attached else 0
        return {"layers with trained weights": layers, "of": len(self._targets)}
