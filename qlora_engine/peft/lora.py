"""LoRA (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models"): a low-rank change of each weight."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qlora_engine.models.config import ALL_LINEAR
from qlora_engine.models.peft_format import CONFIG_FILE, PREFIX, check_adapter_config, settings_of
from qlora_engine.models.targets import check_patterns, matches
from qlora_engine.nn import NF4Linear
from qlora_engine.nn.qlora_linear import DEFAULT_ADAPTER, LoRASettings
from qlora_engine.peft import initialise
from qlora_engine.peft.base import MethodConfig, MethodError, applied, register
from qlora_engine.peft.beside import own_names, saved_names
from qlora_engine.peft.branch import LowRank
from qlora_engine.peft.layers import exact_patterns, is_convolution
from qlora_engine.peft.layerwise import LayerwiseMethod
from qlora_engine.peft.sites import BranchSite, FusedSite
from qlora_engine.quantization.weight import NF4Weight

BIASES = ("none", "all", "lora_only")


@dataclasses.dataclass
class LoRA(MethodConfig):
    """`y = W x + scaling * B A drop(x)` with W frozen.

    On linear layers (in 4 bits: through the fused operator), transformers' Conv1D, 1- and 2-dimensional
    convolutions, and embeddings. Several may be on one model under different `adapter_name`s; their changes add up.

    Attributes:
        r: rank; 0 adds nothing.
        alpha: the scaling is alpha / r.
        dropout: on the branch's input alone, in [0, 1); not on embeddings.
        rslora: the scaling is alpha / sqrt(r) (Kalajdzievski 2023).
        target_modules: patterns (see `QLoRAConfig`); default: the linear layers without heads.
        exclude_modules: patterns of layers that are left out.
        rank_pattern, alpha_pattern: pattern -> rank or alpha of the layers it matches; the first match wins; rank 0
            leaves a layer out.
        init: where A and B start. "kaiming": A Kaiming-uniform, B zero. "gaussian": A normal, B zero. "both": both
            normal with deviation `sigma`, so that the output changes at once: a warning, and `disturbance` in the
            report. "orthogonal": both full with B A = 0. "pissa": the largest singular vectors of the weight (Meng et
            al. 2024), whose product is taken off again by a frozen branch, so that base weights stay. "loftq": the
            best low-rank part of what 4-bit quantization lost (Li et al. 2023), which needs `reference`. "pissa" with
            a `reference`, on 4-bit layers: A and B from the reference, and the layer's weight is quantized anew
            without their product.
        sigma: deviation for "both".
        reference: the weights before quantization, as tensors by name or a folder of safetensors. Not saved.
        loftq_iterations: alternations of quantizing the weight without the adapter's product and of fitting the
            product. 1 leaves the 4-bit weights as they are; more exchange them, as "pissa" with a reference does:
            the file then holds them, in a format that PEFT does not have.
        bias: which biases are trained as well: "none", "all", or those of adapted layers ("lora_only").
        modules_to_save: patterns of modules that are trained whole.
        adapter_name: its name among the adapters of the model.

    Raises:
        ValueError: where a value is out of range.
    """

    name: ClassVar[str] = "lora"
    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    init: str = "kaiming"
    sigma: float = 0.02
    reference: Any = dataclasses.field(default=None, repr=False)
    loftq_iterations: int = 1
    bias: str = "none"
    modules_to_save: str | Sequence[str] = ()
    adapter_name: str = DEFAULT_ADAPTER

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r < 0:
            raise ValueError(f"the rank r is {self.r!r}; expected a whole number of at least 0 (0: nothing is added)")
        LoRASettings(max(self.r, 1), self.alpha, self.dropout, self.rslora)
        if self.init not in initialise.INITIALISATIONS:
            raise ValueError(f"init={self.init!r}; expected one of {', '.join(initialise.INITIALISATIONS)}")
        if self.loftq_iterations < 1:
            raise ValueError(f"loftq_iterations is {self.loftq_iterations}; expected at least 1")
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r}; expected one of {', '.join(BIASES)}")
        if not self.adapter_name or "." in self.adapter_name:
            raise ValueError(f"adapter_name {self.adapter_name!r} must not be empty or have a dot in it")

    def to_json(self) -> dict[str, Any]:
        """The settings without `reference`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "reference"}


@register
class LoRAMethod(LayerwiseMethod):
    """A `LowRank` or a fused adapter on each chosen layer.

    Attributes:
        quantization_errors: after an initialisation with `reference`, path -> `|W - Q| / |W|` before, and
            `|W - (Q' + scaling * B A)| / |W|` with the adapter.
    """

    config_class = LoRA
    peft_type = "LORA"
    fused: ClassVar[bool] = True  # whether 4-bit layers compute base and adapter in one operator
    branch_class: ClassVar[type[LowRank]] = LowRank
    peft_fields: ClassVar[dict[str, Any]] = {"use_dora": False}  # of PEFT's configuration, which tell methods apart
    extra_settings: ClassVar[tuple[str, ...]] = ()  # fields that PEFT's configuration has no place for

    def _install(self) -> None:
        self.quantization_errors: dict[str, tuple[float, float]] = {}
        super()._install()
        if "disturbance" in self._notes:
            initialise.warn_disturbed(self._notes["disturbance"])

    def _settings(self, layers: Mapping[str, nn.Module]) -> dict[str, LoRASettings]:
        config: LoRA = self.config
        for field in ("rank_pattern", "alpha_pattern"):
            check_patterns(getattr(config, field), list(layers), field)
        found = {}
        for path in layers:
            rank = next((v for p, v in config.rank_pattern.items() if matches(p, path)), config.r)
            alpha = next((v for p, v in config.alpha_pattern.items() if matches(p, path)), config.alpha)
            if rank:
                found[path] = LoRASettings(rank, alpha, config.dropout, config.rslora)
        return found

    def _make_site(self, path: str, layer: nn.Module, settings: LoRASettings, places) -> BranchSite | FusedSite:
        name = self.config.adapter_name
        if self.fused and isinstance(layer, NF4Linear):
            return FusedSite(self.model, path, settings, name, torch.float32, places)
        return BranchSite(self.model, path, self.branch_class(layer, settings).train(layer.training), name)

    def _initialise(self, site: BranchSite | FusedSite) -> None:
        config: LoRA = self.config
        if self._restored is not None:
            if f"{site.path}.start_A" in self._restored:
                site.take_off_start()
            if f"{site.path}.base.packed" in self._restored:
                site.replace_base(_copied(site.layer.nf4_weight))
            return
        A, B = site.factors
        if config.init == "gaussian":
            initialise.gaussian(A, B)
        elif config.init == "orthogonal":
            initialise.orthogonal(A, B)
        elif config.init == "both":
            initialise.both(A, B, config.sigma)
            share = float((site.merged() - site.base()).norm() / site.base().norm())
            self._notes["disturbance"] = max(share, self._notes.get("disturbance", 0.0))
        elif config.init == "loftq" or (config.init == "pissa" and config.reference is not None):
            self._make_up_for_quantization(site)
        elif config.init == "pissa":
            initialise.principal(A, B, site.base(), site.settings.scaling)
            site.take_off_start()

    def _make_up_for_quantization(self, site: BranchSite | FusedSite) -> None:
        config: LoRA = self.config
        if config.reference is None:
            raise MethodError("init='loftq' needs reference, the weights before they were quantized")
        layer = site.layer
        if not isinstance(layer, NF4Linear):
            raise MethodError(f"init={config.init!r} makes up for 4-bit quantization; {site.path} is not in 4 bits")
        exchanges = config.init == "pissa" or config.loftq_iterations > 1
        if exchanges and applied(self.model):
            raise MethodError("other methods are on the model, whose 4-bit weights this initialisation exchanges")
        wanted = initialise.reference_weight(config.reference, site.path, layer, layer.fan_in_fan_out)
        norm, before = wanted.norm(), (wanted - site.base()).norm()
        if config.init == "pissa":
            w4 = initialise.pissa_of_quantized(*site.factors, wanted, site.settings.scaling, layer.nf4_weight)
        else:
            w4 = initialise.loftq(
                *site.factors, wanted, site.settings.scaling, layer.nf4_weight, config.loftq_iterations
            )
        if exchanges:
            site.replace_base(w4)
        self._fit(site)
        self.quantization_errors[site.path] = (float(before / norm), float((wanted - site.merged()).norm() / norm))

    def _fit(self, site: BranchSite | FusedSite) -> None:
        """What must follow from A and B that were set anew."""

    def notes(self) -> dict[str, Any]:
        found = super().notes()
        if self.quantization_errors:
            before, after = (max(pair) for pair in zip(*self.quantization_errors.values(), strict=True))
            found |= {"quantization_error_before": before, "quantization_error": after}
        return found

    # PEFT's format

    def _changes(self) -> tuple[dict[str, LoRASettings], dict[str, torch.Tensor]]:
        """Settings and tensors of the layers as LoRA relative to the base; a product taken off doubles the rank."""
        settings, tensors = {}, {}
        for path, site in self._sites.items():
            s, named = site.settings, site.named_tensors()
            if site.start is not None:
                start_A, start_B = named.pop("start_A"), named.pop("start_B")
                (name_A, A), (name_B, B) = named.items()
                named = {name_A: torch.cat([A, start_A]), name_B: torch.cat([B, -start_B], dim=1)}
                alpha = s.alpha * (2**0.5 if s.rslora else 2)
                s = LoRASettings(2 * s.r, alpha, s.dropout, s.rslora)
            settings[path] = s
            tensors |= {f"{PREFIX}{path}.{end}": t for end, t in named.items()}
        return settings, tensors

    def to_peft(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """PEFT's LORA; None at rank 0, where 4-bit weights were exchanged, and for convolutions that PEFT lacks."""
        layers = [site.layer for site in self._sites.values()]
        exchanged = any(site.base_tensors() for site in self._sites.values())
        if not layers or exchanged or any(is_convolution(m) and _differs_in_peft(m) for m in layers):
            return None
        settings, tensors = self._changes()
        config = self._peft_config(settings) | self.peft_fields
        if self.name not in ("lora", "dora"):  # in PEFT all of them are LORA
            own = {field: getattr(self.config, field) for field in self.extra_settings}
            config["auto_mapping"] = self._mapping() | {"method": self.name} | own
        return config, tensors | self._beside_in_peft()

    @classmethod
    def reads(cls, config: dict[str, Any]) -> bool:
        if config["peft_type"] != cls.peft_type:
            return False
        name = (config.get("auto_mapping") or {}).get("method", "dora" if config.get("use_dora") else "lora")
        return name == cls.config_class.name

    @classmethod
    def from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        try:
            check_adapter_config(config, CONFIG_FILE, carried=("bias", "use_dora"))
            return cls._from_peft(config, tensors)
        except (ValueError, KeyError, TypeError) as error:
            raise MethodError(f"{CONFIG_FILE} does not fit {cls.config_class.name}: {error}") from error

    @classmethod
    def _from_peft(cls, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[MethodConfig, dict]:
        own, settings = own_names(tensors), {}
        for name, tensor in own.items():
            match = re.fullmatch(r"(.+)\.(?:lora_A\.weight|lora_embedding_A)", name)
            if match:
                settings[match[1]] = settings_of(config, match[1], tensor.shape[0], Path("adapter"))
        if not settings:
            raise MethodError("there is no lora_A in the file")
        first = next(iter(settings.values()))
        exact = dict(zip(settings, exact_patterns(settings), strict=True))
        mapping = config.get("auto_mapping") or {}
        return cls.config_class(
            **{field: mapping[field] for field in cls.extra_settings},
            r=first.r,
            alpha=first.alpha,
            dropout=first.dropout,
            rslora=first.rslora,
            target_modules=list(exact.values()),
            rank_pattern={exact[path]: s.r for path, s in settings.items() if s.r != first.r},
            alpha_pattern={exact[path]: s.alpha for path, s in settings.items() if s.alpha != first.alpha},
            bias=config.get("bias", "none"),
            modules_to_save=saved_names(config, own),
        ), own


def _copied(w4: NF4Weight) -> NF4Weight:
    tensors = {f.name: getattr(w4, f.name) for f in dataclasses.fields(w4)}
    return NF4Weight(**{n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in tensors.items()})


def _differs_in_peft(module: nn.Module) -> bool:
    return module.padding_mode != "zeros" or any(d != 1 for d in module.dilation)
