"""transformers' `from_pretrained` into 4 bits: a configuration and a quantizer in its public registries.

    import qlora_engine as qe

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=qe.NF4Config())

Layers are quantized while they are loaded, a tensor at a time, on their own device. Importing this module registers
both; a saved checkpoint loads through them only where that has happened, as `qe.NF4Config` does.
"""

import copy
import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_engine.integrations.conversions import LoadBitsandbytes, Quantize
from qlora_engine.models import bnb_checkpoint
from qlora_engine.models.checkpoint import QUANT_METHOD, quantization_settings
from qlora_engine.models.config import QLoRAConfig
from qlora_engine.models.prepare import untie
from qlora_engine.models.skeleton import decode_modules, empty_modules, modules_to_quantize
from qlora_engine.models.targets import find_experts, find_targets
from qlora_engine.nn import NF4Embedding, NF4Experts, NF4Linear, QLoRALinear, TiedNF4Linear

logger = logging.get_logger(__name__)


@register_quantization_config(QUANT_METHOD)
class NF4Config(QuantizationConfigMixin):
    """Loads a model in 4-bit NormalFloat: `from_pretrained(..., quantization_config=NF4Config())`.

    Args:
        blocksize: elements of a weight that share a scale; a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        scales: how they are found: "absmax", "search" or "signed", as in `qlora_engine.quantize`.
        skip_modules: patterns for linear layers and experts that stay in 16 bits, as in `QLoRAConfig`; None: the
            output head, layers with a shared weight, and those that transformers keeps in float32.
        experts: whether the stacked weights of a mixture of experts are quantized as well.
        quantize_embeddings, quantize_head: whether the input embeddings and the output head are; tied ones together.
        save_format: what `save_pretrained` writes: "qlora_engine", or "bitsandbytes", which transformers loads with
            bitsandbytes, and servers such as vLLM load too.
        quant_method, format, modules: what a saved checkpoint says about itself; not for callers.

    Raises:
        ValueError: where a value is out of range.

    >>> NF4Config(blocksize=128).to_dict()["blocksize"]
    128
    """

    def __init__(
        self,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        skip_modules: Sequence[str] | None = None,
        experts: bool = True,
        save_format: str = QUANT_METHOD,
        quant_method: str = QUANT_METHOD,
        format: str = "nf4",
        modules: dict[str, dict] | None = None,
        quantize_embeddings: bool = False,
        quantize_head: bool = False,
    ):
        settings = QLoRAConfig(
            r=0, blocksize=blocksize, double_quant=double_quant, scales=scales, skip_modules=skip_modules
        )
        self.quantize_embeddings, self.quantize_head = quantize_embeddings, quantize_head
        if save_format not in (QUANT_METHOD, bnb_checkpoint.BNB_METHOD):
            raise ValueError(
                f"save_format is {save_format!r}; expected {QUANT_METHOD!r} or {bnb_checkpoint.BNB_METHOD!r}"
            )
        if quant_method != QUANT_METHOD or format not in ("nf4", bnb_checkpoint.BNB_METHOD):
            raise ValueError(f"a checkpoint of quant_method {quant_method!r} and format {format!r} is not known here")
        self.quant_method, self.format, self.modules = QUANT_METHOD, format, modules
        self.blocksize, self.double_quant, self.scales = blocksize, double_quant, scales
        self.skip_modules = None if skip_modules is None else list(settings.skip_modules)
        self.experts, self.save_format = experts, save_format
        self.saved: dict | None = None

    def to_dict(self) -> dict:
        """The settings; of a loaded model, what its checkpoint says of itself."""
        if self.saved is not None:
            return copy.deepcopy(self.saved)
        names = ("quant_method", "format", "blocksize", "double_quant", "scales", "skip_modules", "experts")
        names = (*names, "quantize_embeddings", "quantize_head", "save_format")
        return {name: getattr(self, name) for name in names}

    @property
    def wanted(self) -> QLoRAConfig:
        """What is to be quantized, as `prepare` takes it."""
        names = ("blocksize", "double_quant", "scales", "skip_modules", "experts", "quantize_embeddings")
        return QLoRAConfig(r=0, quantize_head=self.quantize_head, **{name: getattr(self, name) for name in names})


@register_quantizer(QUANT_METHOD)
class NF4Quantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model in 4 bits. Made by transformers; see `NF4Config`."""

    def __init__(self, quantization_config: NF4Config, **options):
        super().__init__(copy.deepcopy(quantization_config), **options)
        self.set_aside: list = []

    @property
    def is_trainable(self) -> bool:
        """Adapters are trained over the frozen weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer accepts a model that has adapters of this package, which it cannot see, and no PEFT."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **options) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("a part of the model is to stay on disk, which 4-bit weights cannot; map it to 'cpu'")

    @property
    def _is_own_checkpoint(self) -> bool:
        return self.pre_quantized and self.quantization_config.format == "nf4"

    def update_device_map(self, device_map):
        """The GPU by default, as bitsandbytes has it: that is where weights are quantized fast."""
        if device_map is None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return device_map

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """A tenth is left for the 16-bit tensor that is being quantized."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        if isinstance(module, NF4Experts):
            return leaf in module.projections
        return isinstance(module, (NF4Linear, NF4Embedding)) and leaf == "weight"

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element on its device, by which `device_map="auto"` divides a model."""
        packed = not self.pre_quantized and self.param_needs_quantization(model, param_name)
        return 0.5 if packed else param.element_size()

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **options) -> None:
        config = self.quantization_config
        if self._is_own_checkpoint:
            modules = config.modules or {}
        elif self.pre_quantized:
            modules, weights = bnb_checkpoint.read_layers(checkpoint_files or [])
            if len(weights) > len(modules):
                logger.warning(
                    f"{len(weights) - len(modules)} layers are FP4, which has no fast product here: they are decoded "
                    "into ordinary layers. qlora_engine.prepare stores them in NF4, which rounds them once more"
                )
            modules = _under_own_names(model, modules)
        else:
            wanted = config.wanted
            paths = [*find_targets(model, wanted)[0], *find_experts(model, wanted)]
            _refuse_tied(model, paths)
            modules = modules_to_quantize(model, wanted, paths)
            for path, options in modules.items():
                if "tied_to" in options:
                    untie(model, path)
        unknown = [path for path in modules if path not in dict(model.named_modules())]
        if unknown or not (modules or self.quantization_config.format == bnb_checkpoint.BNB_METHOD):
            raise ValueError(
                f"the checkpoint's 4-bit layers do not fit {type(model).__name__}: "
                f"{f'it has no {unknown[0]}' if unknown else 'none are named'}"
            )
        empty_modules(model, modules)
        for module in model.modules():
            if isinstance(module, NF4Experts):
                module.gating._is_hf_initialized = True  # it has no weights for transformers to initialise
        if not self.pre_quantized:
            _expect_unquantized(model)
        _warn_of_large_rest(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **options) -> nn.Module:
        empty = [name for name, tensor in model.state_dict().items() if _is_packed(model, name) and tensor.is_meta]
        if empty:
            raise ValueError(f"the checkpoint has no weights for {', '.join(empty[:4])}")
        # what transformers would turn back into the layout of the original files cannot be: it is packed
        packed = [name for name in model.state_dict() if _is_packed(model, name)]
        conversions = getattr(model, "_weight_conversions", None) or []
        self.set_aside = [change for change in conversions if _acts_on(change, packed)]
        if self.set_aside:
            model._weight_conversions = [change for change in conversions if change not in self.set_aside]
        if not packed:  # all of it was FP4
            self.remove_quantization_config(model)
            model.config._is_quantized = False
            return model
        self.quantization_config.format = "nf4"
        self.quantization_config.saved = quantization_settings(model)
        model.qlora_config = QLoRAConfig(r=0, skip_modules=None)  # what stayed in 16 bits stays so
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_weight_conversions(self) -> list:
        if not self.pre_quantized or self._is_own_checkpoint:
            return []
        suffixes = sorted(bnb_checkpoint.SUFFIXES, key=len, reverse=True)
        sources = [*(f"weight.{suffix}" for suffix in suffixes), "weight"]
        return [WeightConverter(sources, "weight", operations=[LoadBitsandbytes(self)])]

    def update_weight_conversions(self, weight_conversions: list, *model) -> list:
        return [*weight_conversions, *self.get_weight_conversions()]

    def get_state_dict_and_metadata(self, model: nn.Module):
        """What `save_pretrained` writes."""
        config = self.quantization_config
        config.saved = quantization_settings(model, config.save_format)
        model.config.quantization_config = config
        if config.save_format == bnb_checkpoint.BNB_METHOD:
            return bnb_checkpoint.bitsandbytes_tensors(model, model.state_dict()), {}
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        adapted = [p for p, m in model.named_modules() if isinstance(m, QLoRALinear) and m.adapters]
        if adapted:
            raise ValueError(f"{adapted[0]} has adapters; call qlora_engine.merge, which keeps what they learnt")
        decode_modules(model, dtype)
        model._weight_conversions = [*(getattr(model, "_weight_conversions", None) or []), *self.set_aside]
        del model.qlora_config
        return model


def bitsandbytes_config(name_or_path: str | os.PathLike, **options):
    """The configuration of a 4-bit checkpoint of bitsandbytes, changed so that it loads into this package.

    NF4 layers stay in 4 bits; FP4 ones are decoded into ordinary layers.

        AutoModelForCausalLM.from_pretrained(name, config=bitsandbytes_config(name))

    Args:
        name_or_path: folder, or name on the hub.
        options: for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: where the checkpoint is not one of bitsandbytes.
    """
    config = AutoConfig.from_pretrained(name_or_path, **options)
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if not settings.get("load_in_4bit"):
        raise ValueError(f"{name_or_path} is not a 4-bit checkpoint of bitsandbytes: {settings or 'not quantized'}")
    config.quantization_config = {"quant_method": QUANT_METHOD, "format": bnb_checkpoint.BNB_METHOD}
    return config


def _expect_unquantized(model: nn.Module) -> None:
    """Weights that are still to be quantized stand in the model with their own shape and dtype.

    transformers 5.17 casts what it reads to the dtype that it finds there, before it is quantized.
    """
    for module in model.modules():
        if isinstance(module, NF4Experts):
            shapes = {name: (module.num_experts, *shape) for name, shape in module.shapes.items()}
        elif isinstance(module, TiedNF4Linear):
            continue  # the embedding's
        elif isinstance(module, (NF4Linear, NF4Embedding)):
            shapes = {"weight": module.nf4_weight.shape}
        else:
            continue
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=module.weight_dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _under_own_names(model: nn.Module, modules: dict[str, dict]) -> dict[str, dict]:
    """Layers named as in a file -> as in the model, which may be the file's with a head, or without."""
    known, prefix = {path for path, _ in model.named_modules()}, getattr(model, "base_model_prefix", "")
    result = {}
    for path, options in modules.items():
        candidates = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
        result[next((name for name in candidates if name in known), path)] = options
    return result


def _refuse_tied(model: nn.Module, paths: Sequence[str]) -> None:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = {*tied, *tied.values()}
    shared = [path for path in paths if f"{path}.weight" in names]
    if shared:
        raise ValueError(
            f"{shared[0]} shares its weight with another module and cannot be quantized while it is loaded; name it "
            "in skip_modules, or load the model with qlora_engine.load_quantized"
        )


def _warn_of_large_rest(model: nn.Module) -> None:
    """Stacked weights that are left in 16 bits must not go unseen: they are most of such a model."""
    rest = [n for n, p in model.named_parameters() if p.dim() == 3 and not _is_packed(model, n)]
    if rest:
        size = sum(model.get_parameter(name).numel() for name in rest)
        logger.warning(f"{len(rest)} stacked weights with {size:,} elements stay in 16 bits, such as {rest[0]}")


def _is_packed(model: nn.Module, name: str) -> bool:
    module, leaf = get_module_from_name(model, name)
    if isinstance(module, NF4Experts):
        return not leaf.endswith("_bias")
    return isinstance(module, (NF4Linear, NF4Embedding)) and leaf in (
        "weight",
        "absmax",
        "nested_absmax",
        "nested_offset",
    )


def _acts_on(change, names: list[str]) -> bool:
    """Whether a conversion of weights, reversed, would take packed bytes for numbers."""
    if not isinstance(change, WeightConverter):
        return False
    if any(isinstance(operation, LoadBitsandbytes) for operation in change.operations):
        return True
    endings = tuple(pattern.strip("^$").lstrip("\\.") for pattern in change.target_patterns)
    return any(name.endswith(endings) for name in names)
