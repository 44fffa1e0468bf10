"""DoRA (Liu et al. 2024, "DoRA: Weight-decomposed low-rank adaptation"): LoRA for directions, and lengths."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine import functional
from qlora_engine.models.targets import is_linear
from qlora_engine.nn import NF4Linear
from qlora_engine.nn.qlora_linear import LoRASettings
from qlora_engine.peft.base import register
from qlora_engine.peft.branch import LowRank
from qlora_engine.peft.layers import along_output, is_convolution, weight_matrix
from qlora_engine.peft.lora import LoRA, LoRAMethod
from qlora_engine.peft.sites import BranchSite


class DoRABranch(LowRank):
    """`y = m / |W + dW| * (W + dW) x + bias` with `dW = scaling * B A` and `|.|` the norm of each output's row.

    `m` starts as the norms, so that the untrained branch changes nothing. As in section 4.3 of the paper the norm
    is no part of the gradient. A 4-bit weight is not decoded for it: `|W + dW|^2 = |W|^2 + 2 <dW, W> + |dW|^2` row by
    row, where `|W|^2` is kept and `<dW, W>` needs the product of W with the r rows of A alone.
    """

    def __init__(self, layer: nn.Module, settings: LoRASettings, dtype: torch.dtype = torch.float32):
        super().__init__(layer, settings, dtype)
        self.register_buffer("base_square", None, persistent=False)  # float32 [out]
        self.base_changed(layer)
        magnitude = self.norm(layer).to(dtype)
        if is_convolution(layer):
            magnitude = magnitude.view(1, -1, *[1] * len(layer.kernel_size))  # PEFT's shape
        self.magnitude = nn.Parameter(magnitude)

    @torch.no_grad()
    def base_changed(self, layer: nn.Module) -> None:
        """Computes again what is kept of the layer's weight."""
        self.base_square = weight_matrix(layer).square().sum(dim=1)

    @torch.no_grad()
    def norm(self, layer: nn.Module) -> torch.Tensor:
        """`|W + dW|`: float32 `[out]`."""
        A, B = (factor.float().flatten(1) for factor in self.factors)
        with torch.autocast(A.device.type, enabled=False):
            if isinstance(layer, NF4Linear):
                through = functional.nf4_linear(A, layer.nf4_weight).T
            else:
                through = weight_matrix(layer) @ A.T
            cross = (B * through).sum(dim=1)
            square = ((B @ (A @ A.T)) * B).sum(dim=1)
        s = self.settings.scaling
        return (self.base_square + 2 * s * cross + s * s * square).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def start_at_norm(self, layer: nn.Module) -> None:
        """Makes the lengths those that the weight has with the present A and B."""
        self.magnitude.copy_(self.norm(layer).view(self.magnitude.shape))

    def named_tensors(self) -> dict[str, torch.Tensor]:
        return super().named_tensors() | {"lora_magnitude_vector": self.magnitude}

    def merged(self, layer: nn.Module) -> torch.Tensor:
        """`m / |W + dW| * (W + dW)`: float32 `[out, in]`."""
        length = self.magnitude.detach().float().flatten() / self.norm(layer)
        return length[:, None] * super().merged(layer)

    def change(self, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The output with directions and lengths that were learnt; `output` is that of the layer alone."""
        scale = along_output(layer, self.magnitude.float().flatten() / self.norm(layer))
        base = output
        if layer.bias is not None:
            base = output - along_output(layer, layer.bias.detach().to(output.dtype))
        branch = self.settings.scaling * self.product(layer, x, output.dtype)
        return output + ((scale - 1) * base + scale * branch).to(output.dtype)


@dataclasses.dataclass
class DoRA(LoRA):
    """LoRA's settings; on linear layers and convolutions.

    Raises:
        ValueError: where `init` is "pissa", whose product is taken off outside of the norm.
    """

    name: ClassVar[str] = "dora"

    def __post_init__(self):
        super().__post_init__()
        if self.init == "pissa":
            raise ValueError("init='pissa' is not for DoRA; expected another initialisation")


def _has_rows(module: nn.Module) -> bool:
    return is_linear(module) or is_convolution(module)


@register
class DoRAMethod(LoRAMethod):
    """A `DoRABranch` on each chosen layer."""

    config_class = DoRA
    fused = False
    branch_class = DoRABranch
    carries = staticmethod(_has_rows)
    peft_fields: ClassVar[dict[str, Any]] = {"use_dora": True}

    def _initialise(self, site: BranchSite) -> None:
        super()._initialise(site)
        self._fit(site)

    def _fit(self, site: BranchSite) -> None:
        site.branch.start_at_norm(site.layer)
