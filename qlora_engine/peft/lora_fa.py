"""LoRA-FA (Zhang et al. 2023, "LoRA-FA: Memory-efficient low-rank adaptation"): A stays as it was drawn, B learns."""

import dataclasses
from typing import ClassVar

from torch import nn

from qlora_engine.peft.base import MethodError, register
from qlora_engine.peft.layers import is_embedding
from qlora_engine.peft.lora import LoRA, LoRAMethod
from qlora_engine.peft.sites import BranchSite


@dataclasses.dataclass
class LoRAFA(LoRA):
    """LoRA's settings, without the inits that begin with other factors than random ones.

    Raises:
        ValueError: for `init` "both" or "pissa".
    """

    name: ClassVar[str] = "lora_fa"

    def __post_init__(self):
        super().__post_init__()
        if self.init in ("both", "pissa"):
            raise ValueError(
                f"init={self.init!r} is not for LoRA-FA; expected kaiming, gaussian, orthogonal or loftq"
            )


@register
class LoRAFAMethod(LoRAMethod):
    """A branch on each chosen layer, whose input is not kept for backward: only its product with A, `[..., r]`.

    Not fused on 4-bit layers: the fused operator keeps the input.
    """

    config_class = LoRAFA
    fused = False

    def _make_site(self, path: str, layer: nn.Module, settings, places) -> BranchSite:
        if is_embedding(layer):
            raise MethodError(f"{path}: LoRA-FA freezes A, which is zero at the start for embeddings; leave it out")
        site = super()._make_site(path, layer, settings, places)
        site.factors[0].requires_grad_(False)
        return site
