"""LoRA+ (Hayou et al. 2024, "LoRA+: Efficient low rank adaptation of large models"): B learns faster than A."""

import dataclasses
from typing import Any, ClassVar

from qlora_engine.peft.base import register
from qlora_engine.peft.lora import LoRA, LoRAMethod


@dataclasses.dataclass
class LoRAPlus(LoRA):
    """LoRA whose `parameter_groups` have two learning rates.

    Attributes:
        ratio: the learning rate of B is this times that of A and of all else; the paper finds about 16.

    Raises:
        ValueError: where the ratio is not positive.
    """

    name: ClassVar[str] = "lora_plus"
    ratio: float = 16.0

    def __post_init__(self):
        super().__post_init__()
        if not self.ratio > 0:
            raise ValueError(f"ratio is {self.ratio}; expected a positive number")


@register
class LoRAPlusMethod(LoRAMethod):
    """LoRA with its own groups for the optimizer."""

    config_class = LoRAPlus
    extra_settings = ("ratio",)

    def parameter_groups(self, lr: float, **options) -> list[dict[str, Any]]:
        """Two groups: all but B at `lr`, B at `ratio * lr`."""
        factors = [site.factors[1] for site in self._sites.values()]
        known = {id(p) for p in factors}
        others = [p for p in self.trainable_parameters().values() if id(p) not in known]
        groups = [(others, lr), (factors, lr * self.config.ratio)]
        return [{"params": params, "lr": rate, **options} for params, rate in groups if params]
