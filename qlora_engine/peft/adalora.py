"""AdaLoRA (Zhang et al. 2023, "Adaptive budget allocation for parameter-efficient fine-tuning"): ranks that move."""

import dataclasses
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

EPSILON = 1e-5  # PEFT divides by the rank plus this
TRIPLET, MEANS = ("lora_A", "lora_E", "lora_B"), ("mean", "spread")


@dataclasses.dataclass
class AdaLoRA(MethodConfig):
    """`y = W x + alpha / init_r * B (E * (A drop(x)))`, whose least important triplets go while it is trained.

    A triplet is a row of A, an element of E and a column of B. E starts at zero; A and B are kept near orthogonal by
    `penalty`, which belongs in the loss. `after_step` watches importances and takes triplets away: from all layers
    together the budget goes from `init_r` a layer to `target_r`, between step `t_init` and step
    `total_steps - t_final`, as a cubic (equation 12 of the paper). Then the ranks stay.

    Attributes:
        init_r: rank of every layer at the start.
        target_r: mean rank in the end.
        alpha: the scaling is alpha / init_r.
        dropout: on the branch's input alone, in [0, 1).
        total_steps: of the whole training; must be given.
        t_init: steps before the first triplet goes.
        t_final: steps in the end with fixed ranks.
        delta_t: steps between two allocations.
        beta1: of the running mean of sensitivities.
        beta2: of the running mean of their uncertainties.
        orthogonality: weight of `penalty`.
        target_modules, exclude_modules: patterns (see `QLoRAConfig`) of linear layers; default: all without heads.
        bias: which biases are trained as well: "none", "all", or those of adapted layers ("lora_only").
        modules_to_save: patterns of modules that are trained whole.
        adapter_name: its name among the adapters of the model.

    Raises:
        ValueError: where a value is out of range, or no step is left between `t_init` and `t_final`.
    """

    name: ClassVar[str] = "adalora"
    init_r: int = 12
    target_r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    total_steps: int = 0
    t_init: int = 0
    t_final: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    bias: str = "none"
    modules_to_save: str | Sequence[str] = ()
    adapter_name: str = DEFAULT_ADAPTER

    def __post_init__(self):
        LoRASettings(self.init_r, self.alpha, self.dropout)
        if not 0 <= self.target_r <= self.init_r:
            raise ValueError(f"target_r is {self.target_r}; expected 0 to init_r, {self.init_r}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}; expected the number of steps of the training")
        if self.delta_t < 1 or self.t_init < 0 or self.t_final < 0 or self.t_init >= self.total_steps - self.t_final:
            raise ValueError(
                f"no step is left to allocate ranks: total_steps {self.total_steps}, t_init {self.t_init}, "
                f"t_final {self.t_final}, delta_t {self.delta_t}; expected t_init below total_steps - t_final and a "
                "delta_t of at least 1"
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"beta1 is {self.beta1} and beta2 {self.beta2}; expected numbers between 0 and 1")
        if self.orthogonality < 0:
            raise ValueError(f"orthogonality is {self.orthogonality}; expected at least 0")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r}; expected none, all or lora_only")
        if not self.adapter_name or "." in self.adapter_name:
            raise ValueError(f"adapter_name {self.adapter_name!r} must not be empty or have a dot in it")


class TripletBranch(Branch):
    """`y += scaling * B (E * (A drop(x)))` beside a linear layer; A `[r, in]`, E `[r, 1]`, B `[out, r]`.

    `kept` `[r]` says which triplets are left once the ranks are fixed; before, all.
    """

    def __init__(self, layer: nn.Module, settings: LoRASettings):
        super().__init__()
        self.settings = settings
        self.scaling = settings.alpha / (settings.r + EPSILON)
        out_size, in_size = matrix_shape(layer)
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(settings.r, in_size, device=device).normal_(std=0.02))
        self.lora_E = nn.Parameter(torch.zeros(settings.r, 1, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_size, settings.r, device=device).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(settings.r, dtype=torch.bool, device=device))

    @property
    def triplet(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, E and B."""
        return self.lora_A, self.lora_E, self.lora_B

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """What a file must have of this layer, by the ends of names."""
        return dict(zip(TRIPLET, self.triplet, strict=True)) | {"kept": self.kept}

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight: float32 `[out, in]`."""
        A, E, B = (factor.detach().float() for factor in self.triplet)
        return self.scaling * (B @ (A * E))

    def change(self, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`output + scaling * B (E * (A drop(x)))`, in the dtype of `output`."""
        A, E, B = (factor.to(output.dtype) for factor in self.triplet)
        x = F.dropout(x.to(output.dtype), self.settings.dropout, self.training)
        return output + self.scaling * F.linear(F.linear(x, A) * E.flatten(), B)

    def orthogonality(self) -> torch.Tensor:
        """`|A A.T - 1| + |B.T B - 1|`, equation 4 of the paper without its squares, as PEFT has it."""
        one = torch.eye(self.settings.r, device=self.lora_A.device)
        A, _, B = self.triplet
        return torch.linalg.matrix_norm(A @ A.T - one) + torch.linalg.matrix_norm(B.T @ B - one)

    @torch.no_grad()
    def silence(self, chosen: torch.Tensor) -> None:
        """Zeroes E outside of `chosen` `[r]`; a triplet may come back as long as ranks are not fixed."""
        self.lora_E.masked_fill_(~chosen[:, None], 0.0)

    def extra_repr(self) -> str:
        return f"r={int(self.kept.sum())} of {self.settings.r}, scaling={self.scaling:g}"


class Importance:
    """Running means of a parameter's sensitivity `|w * dL/dw|` and of its uncertainty (equations 8 to 10)."""

    def __init__(self, parameter: torch.Tensor):
        self.mean, self.spread = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def observe(self, parameter: nn.Parameter, beta1: float, beta2: float) -> None:
        """Takes in the present value and gradient."""
        if parameter.grad is None:
            raise MethodError("AdaLoRA needs gradients: call after_step before they are set to None")
        sensitivity = (parameter * parameter.grad).abs()
        self.mean.lerp_(sensitivity, 1 - beta1)
        self.spread.lerp_((sensitivity - self.mean).abs(), 1 - beta2)

    def score(self) -> torch.Tensor:
        """Importance of each element."""
        return self.mean * self.spread


@register
class AdaLoRAMethod(LayerwiseMethod):
    """A `TripletBranch` on each chosen layer, and the allocation of ranks.

    Running means of importances are in `progress` and not in the file: a training that goes on from the file alone
    starts them anew.
    """

    config_class = AdaLoRA
    peft_type = "ADALORA"
    carries = staticmethod(is_linear)

    def _settings(self, layers: Mapping[str, nn.Module]) -> dict[str, LoRASettings]:
        config: AdaLoRA = self.config
        self._importances: dict[str, tuple[Importance, Importance, Importance]] = {}
        return dict.fromkeys(layers, LoRASettings(config.init_r, config.alpha, config.dropout))

    def _make_site(self, path: str, layer: nn.Module, settings: LoRASettings, places) -> BranchSite:
        branch = TripletBranch(layer, settings).train(layer.training)
        return BranchSite(self.model, path, branch, self.config.adapter_name)

    def penalty(self) -> torch.Tensor:
        """`orthogonality` times the mean over all A and B of their distance from orthogonal ones."""
        distances = [site.branch.orthogonality() for site in self._sites.values()]
        return self.config.orthogonality * torch.stack(distances).sum() / (2 * len(distances))

    def ranks(self) -> dict[str, int]:
        """Triplets that each layer has left."""
        return {path: int(site.branch.kept.sum()) for path, site in self._sites.items()}

    def notes(self) -> dict[str, Any]:
        ranks = self.ranks().values()
        return super().notes() | {"mean_rank": round(sum(ranks) / len(ranks), 2)}

    def budget(self, step: int) -> int:
        """Triplets that all layers together may have after a step; equation 12 of the paper."""
        c: AdaLoRA = self.config
        first, last = c.init_r * len(self._sites), c.target_r * len(self._sites)
        if step <= c.t_init:
            return first
        left = 1 - (step - c.t_init) / (c.total_steps - c.t_final - c.t_init)
        return last if left <= 0 else int((first - last) * left**3 + last)

    def after_step(self, step: int) -> None:
        """Watches importances, and takes triplets away where the schedule says so.

        Args:
            step: of the optimizer, from 1 on; gradients must still be there.

        Raises:
            MethodError: where there are none.
        """
        c: AdaLoRA = self.config
        end = c.total_steps - c.t_final
        if step > end:
            for site in self._sites.values():
                site.branch.silence(site.branch.kept)
            return
        if step < end or not self._importances:
            self._observe()
        if step == end or (step > c.t_init and step % c.delta_t == 0):
            for path, chosen in self._choose(self.budget(step)).items():
                self._sites[path].branch.silence(chosen)
                if step == end:
                    self._sites[path].branch.kept.copy_(chosen)
        if step == end:
            self._importances.clear()

    def progress(self) -> dict[str, torch.Tensor]:
        """Both running means of A, E and B in each layer; nothing before the first step and once ranks are fixed."""
        return {
            f"{path}.{end}.{mean}": getattr(importance, mean)
            for path, watched in self._importances.items()
            for end, importance in zip(TRIPLET, watched, strict=True)
            for mean in MEANS
        }

    @torch.no_grad()
    def resume(self, step: int, progress: Mapping[str, torch.Tensor] | None = None) -> None:
        """Takes up the running means.

        Raises:
            MethodError: where they are of other layers or ranks.
        """
        self._importances.clear()
        if not progress:
            return
        for path, site in self._sites.items():
            self._importances[path] = tuple(Importance(p) for p in site.branch.triplet)
        for name, mean in self.progress().items():
            if name not in progress or progress[name].shape != mean.shape:
                raise MethodError(f"adalora: the importances {name} are missing, or of another rank")
            mean.copy_(progress[name])

    def _observe(self) -> None:
        for path, site in self._sites.items():
            triplet = site.branch.triplet
            watched = self._importances.setdefault(path, tuple(Importance(p) for p in triplet))
            for importance, parameter in zip(watched, triplet, strict=True):
                importance.observe(parameter, self.config.beta1, self.config.beta2)

    def _choose(self, budget: int) -> dict[str, torch.Tensor]:
        """The `budget` triplets with the largest importance, as a mask `[r]` for each layer."""
        scores = {}
        for path, (A, E, B) in self._importances.items():
            scores[path] = E.score().flatten() + A.score().mean(dim=1) + B.score().mean(dim=0)
        together = torch.cat(list(scores.values()))
        chosen = torch.zeros_like(together, dtype=torch.bool)
        chosen[together.topk(budget).indices] = True
        return dict(zip(scores, chosen.split([len(s) for s in scores.values()]), strict=True))

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's ADALORA; once ranks are fixed, with the triplets that are left."""
        c: AdaLoRA = self.config
        config = self._peft_config({path: site.settings for path, site in self._sites.items()})
        fixed = any(not site.branch.kept.all() for site in self._sites.values())
        pattern, tensors = {}, {}
        for path, site in self._sites.items():
            A, E, B = site.branch.triplet
            kept = site.branch.kept
            pattern[f"{path}.lora_E"] = kept.tolist()
            named = {"lora_A": A[kept], "lora_E": E[kept], "lora_B": B[:, kept]}
            tensors |= {f"{PREFIX}{path}.{end}": t for end, t in named.items()}
        config |= {
            "peft_type": self.peft_type,
            "r": 8,  # PEFT's default: it is not used
            "init_r": c.init_r,
            "target_r": c.target_r,
            "tinit": c.t_init,
            "tfinal": c.t_final,
            "deltaT": c.delta_t,
            "beta1": c.beta1,
            "beta2": c.beta2,
            "orth_reg_weight": c.orthogonality,
            "total_step": c.total_steps,
            "rank_pattern": pattern if fixed else None,
        }
        return config, tensors | self._beside_in_peft()

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        own = own_names(tensors)
        paths = [name.removesuffix(".lora_E") for name in own if name.endswith(".lora_E")]
        if not paths:
            raise MethodError("there is no lora_E in the file")
        try:
            settings = AdaLoRA(
                init_r=config["init_r"],
                target_r=config["target_r"],
                alpha=config["lora_alpha"],
                dropout=config.get("lora_dropout", 0.0),
                total_steps=config["total_step"],
                t_init=config["tinit"],
                t_final=config["tfinal"],
                delta_t=config["deltaT"],
                beta1=config["beta1"],
                beta2=config["beta2"],
                orthogonality=config["orth_reg_weight"],
                target_modules=exact_patterns(paths),
                bias=config.get("bias", "none"),
                modules_to_save=saved_names(config, own),
            )
            pattern = config.get("rank_pattern") or {}
            for path in paths:
                kept = torch.tensor(pattern.get(f"{path}.lora_E", [True] * settings.init_r), dtype=torch.bool)
                own |= _widened(own, path, kept, settings.init_r)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise MethodError(f"{CONFIG_FILE} does not fit adalora: {error}") from error
        return settings, own


def _widened(own: Mapping[str, torch.Tensor], path: str, kept: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """A layer's tensors at full rank, zeros in the places of triplets that went."""
    if kept.shape != (rank,):
        raise ValueError(f"rank_pattern of {path} has {kept.numel()} entries; expected {rank}")
    found = {f"{path}.kept": kept}
    for end, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        narrow = own[f"{path}.{end}"]
        shape = list(narrow.shape)
        shape[dim] = rank
        where = kept.nonzero().flatten()
        found[f"{path}.{end}"] = torch.zeros(shape, dtype=narrow.dtype).index_copy(dim, where, narrow)
    return found
