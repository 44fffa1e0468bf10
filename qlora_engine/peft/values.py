"""Parameters of the base that a method trains in place, with the values they had before."""

from collections.abc import Mapping

import torch
from torch import nn

from qlora_engine.peft.base import Method


class TrainedValues:
    """Parameters whose former values can be brought back.

    Args:
        owners: name -> (module, name of its parameter). They are made to require gradients.
    """

    def __init__(self, owners: Mapping[str, tuple[nn.Module, str]]):
        self._owners = dict(owners)
        self._former: dict[str, torch.Tensor] = {}
        for name, param in self.parameters().items():
            self._former[name] = param.detach().clone()
            param.requires_grad_(True)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, as the model has them now."""
        return {name: getattr(module, attribute) for name, (module, attribute) in self._owners.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the values that are in the model with those that are not."""
        for name, param in self.parameters().items():
            now = param.detach().clone()
            param.copy_(self._former[name].to(param.device, param.dtype))
            self._former[name] = now

    @torch.no_grad()
    def restore(self) -> None:
        """Brings back the values from before, and drops the trained ones."""
        for name, param in self.parameters().items():
            param.copy_(self._former[name].to(param.device, param.dtype))
            param.grad = None

    def former(self) -> dict[str, torch.Tensor]:
        """The values from before, by name."""
        return {name: value.clone() for name, value in self._former.items()}

    @torch.no_grad()
    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Writes values into the parameters."""
        for name, param in self.parameters().items():
            param.copy_(values[name].to(param.device, param.dtype))

    def keep(self) -> None:
        """Makes the trained values those that `restore` brings back."""
        self._former = {name: param.detach().clone() for name, param in self.parameters().items()}


class InPlaceMethod(Method):
    """Parameters of the model itself, trained in place; their former values come back on `disable` and `remove`.

    A subclass writes `_install`, which makes `_values`.
    """

    _values: TrainedValues

    def _uninstall(self) -> None:
        self._values.restore()

    def _switch(self, enabled: bool) -> None:
        self._values.swap()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._values.parameters()

    def merge(self) -> nn.Module:
        """The trained values stay."""
        self._check_applied()
        self.enable()
        self._values.keep()
        return self.remove()
