"""VeRA (Kopiczko et al. 2024, "VeRA: Vector-based random matrix adaptation"): two trained vectors a layer."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine.models.config import ALL_LINEAR
from qlora_engine.models.peft_format import CONFIG_FILE, PREFIX
from qlora_engine.models.targets import is_linear
from qlora_engine.nn.qlora_linear import DEFAULT_ADAPTER, LoRASettings
from qlora_engine.peft.base import MethodConfig, MethodError, register
from qlora_engine.peft.beside import own_names, saved_names
from qlora_engine.peft.branch import Branch
from qlora_engine.peft.layers import exact_patterns, matrix_shape
from qlora_engine.peft.layerwise import LayerwiseMethod
from qlora_engine.peft.sites import BranchSite

PROJECTIONS = ("vera_A", "vera_B")


@dataclasses.dataclass
class VeRA(MethodConfig):
    """`y = W x + b * (B (d * (A drop(x))))` with random A and B that all layers share, and b and d trained.

    Layers of several sizes use the first rows and columns that they need of A `[r, in]` and B `[out, r]`, which have
    the largest of the sizes. b starts at zero, d at `d_initial`.

    Attributes:
        r: rank; larger than LoRA's, since only r + out numbers a layer are trained.
        d_initial: what d starts with.
        dropout: on the branch's input alone, in [0, 1).
        seed: from which A and B are drawn, as PEFT draws them.
        save_projection: whether a file has A and B. Without them it is a few vectors, and whoever loads it draws A
            and B from the seed again.
        target_modules, exclude_modules: patterns (see `QLoRAConfig`) of linear layers; default: all without heads.
        bias: which biases are trained as well: "none", "all", or those of adapted layers ("vera_only").
        modules_to_save: patterns of modules that are trained whole.
        adapter_name: its name among the adapters of the model.

    Raises:
        ValueError: where a value is out of range.
    """

    name: ClassVar[str] = "vera"
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = True
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    bias: str = "none"
    modules_to_save: str | Sequence[str] = ()
    adapter_name: str = DEFAULT_ADAPTER

    def __post_init__(self):
        LoRASettings(self.r, 1, self.dropout)
        if self.bias not in ("none", "all", "vera_only"):
            raise ValueError(f"bias={self.bias!r}; expected none, all or vera_only")
        if not self.adapter_name or "." in self.adapter_name:
            raise ValueError(f"adapter_name {self.adapter_name!r} must not be empty or have a dot in it")


class Projections(nn.Module):
    """The frozen A `[r, in]` and B `[out, r]`, Kaiming-uniform from a seed; not part of a model's `state_dict`."""

    def __init__(self, rank: int, in_size: int, out_size: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in zip(PROJECTIONS, ((rank, in_size), (out_size, rank)), strict=True):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=False)


class VeRABranch(Branch):
    """`y += b * (B (d * (A drop(x))))` beside a linear layer.

    Args:
        layer: what it is put beside.
        shared: A and B, those of all layers.
        settings: rank and dropout.
        d_initial: what d starts with.
    """

    def __init__(self, layer: nn.Module, shared: Projections, settings: LoRASettings, d_initial: float):
        super().__init__()
        self.shared, self.settings = shared, settings
        self.out_size, self.in_size = matrix_shape(layer)
        device = layer.weight.device
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_size, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((settings.r,), d_initial, device=device))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's part of A and B."""
        return self.shared.vera_A[:, : self.in_size], self.shared.vera_B[: self.out_size]

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have of this layer, by the ends of names."""
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight: float32 `[out, in]`."""
        A, B = self.factors
        b, d = self.vera_lambda_b.detach().float(), self.vera_lambda_d.detach().float()
        return b[:, None] * ((B * d) @ A)

    def change(self, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output + b * (B (d * (A drop(x))))`, in the dtype of `output`."""
        A, B = (factor.to(output.dtype) for factor in self.factors)
        x = F.dropout(x.to(output.dtype), self.settings.dropout, self.training)
        S = F.linear(x, A) * self.vera_lambda_d.to(output.dtype)
        return output + F.linear(S, B) * self.vera_lambda_b.to(output.dtype)

    def extra_repr(self) -> str:
        return f"r={self.settings.r}"


@register
class VeRAMethod(LayerwiseMethod):
    """A `VeRABranch` on each chosen layer, and one pair of projections."""

    config_class = VeRA
    peft_type = "VERA"
    carries = staticmethod(is_linear)

    def _settings(self, layers: Mapping[str, nn.Module]) -> dict[str, LoRASettings]:
        config: VeRA = self.config
        sizes = [matrix_shape(layer) for layer in layers.values()]
        out_size, in_size = (max(size[i] for size in sizes) for i in (0, 1))
        self._shared = Projections(config.r, in_size, out_size, config.seed)
        self._shared.to(next(iter(layers.values())).weight.device)
        return dict.fromkeys(layers, LoRASettings(config.r, config.r, config.dropout))

    def _make_site(self, path: str, layer: nn.Module, settings: LoRASettings, places) -> BranchSite:
        branch = VeRABranch(layer, self._shared, settings, self.config.d_initial).train(layer.training)
        return BranchSite(self.model, path, branch, self.config.adapter_name)

    def _projections(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self._shared, name) for name in PROJECTIONS if self.config.save_projection}

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | self._projections()

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's VERA."""
        config: VeRA = self.config
        known = self._peft_config({path: site.settings for path, site in self._sites.items()})
        lora_only = ("exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights")
        known = {k: v for k, v in known.items() if k not in (*lora_only, "rank_pattern", "alpha_pattern")}
        known |= {
            "peft_type": self.peft_type,
            "r": config.r,
            "d_initial": config.d_initial,
            "vera_dropout": config.dropout,
            "projection_prng_key": config.seed,
            "save_projection": config.save_projection,
            "init_weights": True,
        }
        tensors = {
            f"{PREFIX}{path}.{end}": t
            for path, site in self._sites.items()
            for end, t in site.named_tensors().items()
        }
        tensors |= {f"base_model.{name}": t for name, t in self._projections().items()}
        return known, tensors | self._beside_in_peft()

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        own = {name.removeprefix("base_model."): tensor for name, tensor in own_names(tensors).items()}
        paths = [name.removesuffix(".vera_lambda_d") for name in own if name.endswith(".vera_lambda_d")]
        if not paths:
            raise MethodError("there is no vera_lambda_d in the file")
        try:
            return VeRA(
                r=config["r"],
                d_initial=config.get("d_initial", 0.1),
                dropout=config.get("vera_dropout", 0.0),
                seed=config.get("projection_prng_key", 0),
                save_projection=config.get("save_projection", True),
                target_modules=exact_patterns(paths),
                bias=config.get("bias", "none"),
                modules_to_save=saved_names(config, own),
            ), own
        except (ValueError, KeyError, TypeError) as error:
            raise MethodError(f"{CONFIG_FILE} does not fit vera: {error}") from error
