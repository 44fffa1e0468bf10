"""One layer with an adapter: a branch beside it, or a name among the adapters of a fused 4-bit layer."""

import dataclasses

import torch
from torch import nn

from qlora_engine.nn import NF4Linear, QLoRALinear
from qlora_engine.nn.qlora_linear import LoRASettings
from qlora_engine.peft.base import MethodError
from qlora_engine.peft.branch import Branch
from qlora_engine.peft.layers import weight_matrix, with_adapters, without_adapters
from qlora_engine.quantization.weight import NF4Weight

BASE = ("packed", "absmax", "nested_absmax", "nested_offset")


class Site:
    """A layer of a model, by its path, since other methods may replace the module; and its 4-bit weight's exchange.

    Args:
        model: the model.
        path: the layer's path.
    """

    def __init__(self, model: nn.Module, path: str):
        self.model, self.path = model, path
        self.other_base: NF4Weight | None = None  # the weight that is not in use, once there are two
        self._exchanged = False

    @property
    def layer(self) -> nn.Module:
        """The layer as the model has it now."""
        return self.model.get_submodule(self.path)

    def base(self) -> torch.Tensor:
        """The layer's weight as it is: float32 `[out, in]`."""
        return weight_matrix(self.layer)

    def original_base(self) -> NF4Weight:
        """The 4-bit weight that the model had before the method."""
        return self.other_base if self._exchanged else self.layer.nf4_weight

    def replace_base(self, w4: NF4Weight) -> None:
        """Another 4-bit weight takes the place of the layer's, while the method is there and enabled."""
        layer: NF4Linear = self.layer
        self.other_base = dataclasses.replace(w4, dtype=layer.weight_dtype)
        self._exchange(True)

    def keep_base(self) -> None:
        """The weight that is in use stays when the method goes."""
        self.other_base, self._exchanged = None, False

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have of a weight that took another's place, by the ends of names."""
        if self.other_base is None:
            return {}
        w4 = self.layer.nf4_weight if self._exchanged else self.other_base
        tensors = zip(BASE, w4.arguments, strict=False)
        return {f"base.{name}": tensor for name, tensor in tensors if tensor is not None}

    def _exchange(self, replaced: bool) -> None:
        if self.other_base is None or replaced == self._exchanged:
            return
        layer: NF4Linear = self.layer
        now = layer.nf4_weight
        layer.set_nf4_weight(self.other_base.to(layer.weight.device))
        self.other_base, self._exchanged = now, replaced
        tell_changed(layer)


def tell_changed(layer: nn.Module) -> None:
    """Tells the branches on a layer, which may keep something of its weight, that it is another."""
    for branch in layer.children():
        if isinstance(branch, Branch):
            branch.base_changed(layer)


class BranchSite(Site):
    """A `Branch` on a layer of any kind.

    Args:
        model, path: as in `Site`.
        branch: put on the layer at once.
        name: the adapter's name.
    """

    def __init__(self, model: nn.Module, path: str, branch: Branch, name: str):
        super().__init__(model, path)
        self.branch, self.attribute = branch, f"lora_{name}"
        branch.attach(self.layer, self.attribute)

    @property
    def settings(self) -> LoRASettings:
        """Rank, scaling, dropout."""
        return self.branch.settings

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.branch.factors

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B whose product is taken off, where there are any."""
        return self.branch.start

    def take_off_start(self) -> None:
        """From now on the product of today's A and B is taken off: the output is the base's until they change."""
        self.branch.take_off_start()

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have of this layer, by the ends of names."""
        return self.branch.named_tensors() | self.base_tensors()

    def switch(self, enabled: bool) -> None:
        """Takes part in the forward pass or not."""
        self.branch.active = enabled
        self._exchange(enabled)

    def merged(self) -> torch.Tensor:
        """The weight with what was learnt: float32 `[out, in]`."""
        return self.branch.merged(self.layer)

    def remove(self, places) -> None:
        """Takes the branch off the layer."""
        self._exchange(False)
        self.branch.detach(self.layer, self.attribute)


class FusedSite(Site):
    """A named adapter of a `QLoRALinear`, which computes base and adapter in one operator.

    Args:
        model, path: as in `Site`; a plain 4-bit layer is replaced until its last adapter is removed.
        settings: rank, scaling, dropout.
        name: the adapter's name.
        dtype: dtype of A and B.
        places: what `shared_places` returned.
    """

    def __init__(self, model: nn.Module, path: str, settings: LoRASettings, name: str, dtype: torch.dtype, places):
        super().__init__(model, path)
        self.name = name
        layer = with_adapters(model, path, places)
        if name in layer.adapters:
            raise MethodError(f"{path} has an adapter {name!r} already; choose another adapter_name")
        self._add(name, settings, dtype)

    def _add(self, name: str, settings: LoRASettings, dtype: torch.dtype) -> None:
        layer: QLoRALinear = self.layer
        before = layer.active_adapters
        layer.add_adapter(name, dtype=dtype, **dataclasses.asdict(settings))
        layer.active_adapters = (*before, name)

    @property
    def settings(self) -> LoRASettings:
        """Rank, scaling, dropout."""
        return self.layer.adapters[self.name]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.layer.lora_A[self.name], self.layer.lora_B[self.name]

    @property
    def _names(self) -> list[str]:
        return [name for name in (self.name, self._start_name) if name in self.layer.adapters]

    @property
    def _start_name(self) -> str:
        return f"{self.name}_start"

    @property
    def start(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B whose product is taken off, where there are any."""
        if self._start_name not in self.layer.adapters:
            return None
        return self.layer.lora_A[self._start_name], self.layer.lora_B[self._start_name]

    def take_off_start(self) -> None:
        """From now on the product of today's A and B is taken off: the output is the base's until they change."""
        s, factors = self.settings, self.factors
        self._add(self._start_name, dataclasses.replace(s, alpha=-s.alpha, dropout=0.0), factors[0].dtype)
        for own, factor in zip(self.start, factors, strict=True):
            own.data.copy_(factor)
            own.requires_grad_(False)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have of this layer, by the ends of names."""
        found = dict(zip(("lora_A.weight", "lora_B.weight"), self.factors, strict=True))
        if self.start is not None:
            found |= dict(zip(("start_A", "start_B"), self.start, strict=True))
        return found | self.base_tensors()

    def switch(self, enabled: bool) -> None:
        """Takes part in the forward pass or not."""
        others = tuple(name for name in self.layer.active_adapters if name not in self._names)
        self.layer.active_adapters = (*others, *self._names) if enabled else others
        self._exchange(enabled)

    def merged(self) -> torch.Tensor:
        """The weight with what was learnt: float32 `[out, in]`."""
        return weight_matrix(self.layer) + self.layer.delta_weight(self._names)

    def remove(self, places) -> None:
        """Takes the adapter off the layer."""
        self._exchange(False)
        for name in self._names:
            self.layer.delete_adapter(name)
        without_adapters(self.model, self.path, places)
