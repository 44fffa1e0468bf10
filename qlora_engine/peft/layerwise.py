"""Methods that put a branch, or a fused adapter, on each of many layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qlora_engine.models.peft_format import adapter_config
from qlora_engine.models.prepare import shared_places
from qlora_engine.nn.nf4_linear import is_transposed_linear
from qlora_engine.nn.qlora_linear import LoRASettings
from qlora_engine.peft.base import Method
from qlora_engine.peft.beside import peft_names, trained_beside
from qlora_engine.peft.branch import Branch
from qlora_engine.peft.layers import choose_layers, is_adaptable
from qlora_engine.peft.merging import Mergeable
from qlora_engine.peft.sites import BranchSite, FusedSite, tell_changed


class LayerwiseMethod(Mergeable, Method):
    """What LoRA and its relatives share; a subclass writes `_make_site` and `_settings`.

    Its settings have `target_modules`, `exclude_modules`, `bias`, `modules_to_save` and `adapter_name`.
    """

    carries = staticmethod(is_adaptable)  # says of a module whether it can carry the method

    def _install(self) -> None:
        config = self.config
        layers = choose_layers(self.model, config.target_modules, config.exclude_modules, self.carries)
        settings = self._settings(layers)
        self._values, self._whole = trained_beside(self.model, layers, config.bias, config.modules_to_save)
        self._sites: dict[str, BranchSite | FusedSite] = {}
        self._notes: dict[str, Any] = {}
        places = shared_places(self.model)
        try:
            for path, s in settings.items():
                self._sites[path] = self._make_site(path, layers[path], s, places)
                self._initialise(self._sites[path])
        except BaseException:
            self._uninstall()
            raise

    def _settings(self, layers: Mapping[str, nn.Module]) -> dict[str, LoRASettings]:
        """Rank, scaling and dropout of each layer that gets a site."""
        raise NotImplementedError

    def _make_site(self, path: str, layer: nn.Module, settings: LoRASettings, places) -> BranchSite | FusedSite:
        """Puts the method on one layer."""
        raise NotImplementedError

    def _initialise(self, site: BranchSite | FusedSite) -> None:
        """Gives a site its first values, where making it has not."""

    def _uninstall(self) -> None:
        places = shared_places(self.model)
        for site in self._sites.values():
            site.remove(places)
        self._values.restore()

    def _switch(self, enabled: bool) -> None:
        for site in self._sites.values():
            site.switch(enabled)
        self._values.swap()

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {f"{path}.{end}": t for path, site in self._sites.items() for end, t in site.named_tensors().items()}
        return own | self._values.parameters()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        for site in self._sites.values():
            if site.base_tensors():
                tell_changed(site.layer)

    def notes(self) -> dict[str, Any]:
        return dict(self._notes)

    def _peft_config(self, settings: Mapping[str, LoRASettings]) -> dict[str, Any]:
        """What PEFT's configurations of these methods have in common, as that of LoRA with these settings."""
        branches = {inner for m in self.model.modules() if isinstance(m, Branch) for inner in m.modules()}
        model_config = getattr(self.model, "config", None)
        config = adapter_config(
            settings,
            module_paths=[path for path, m in self.model.named_modules() if m not in branches],
            modules_to_save=self._whole,
            fan_in_fan_out=all(_is_transposed(site.layer) for site in self._sites.values()),
            base_model=getattr(model_config, "_name_or_path", None) or None,
            class_name=type(self.model).__name__,
            auto_mapping=None if model_config is not None else self._mapping(),
        )
        return config | {"bias": self.config.bias}

    def _mapping(self) -> dict[str, Any]:
        """`auto_mapping`: where PEFT finds the model's class."""
        return {"base_model_class": type(self.model).__name__, "parent_library": type(self.model).__module__}

    def _beside_in_peft(self) -> dict[str, torch.Tensor]:
        return peft_names(self._values.parameters(), self._sites)


def _is_transposed(module: nn.Module) -> bool:
    return getattr(module, "fan_in_fan_out", False) or is_transposed_linear(module)
