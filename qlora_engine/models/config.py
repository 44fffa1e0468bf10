"""`QLoRAConfig`: what to quantize and what to adapt."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from qlora_engine.nn.qlora_linear import DEFAULT_ADAPTER, LoRASettings
from qlora_engine.quantization.weight import check_scales

ALL_LINEAR = "all-linear"


class TargetError(ValueError):
    """A pattern for modules matches nothing, or something that cannot be a target."""


@dataclasses.dataclass
class QLoRAConfig:
    """How `prepare` turns a model into a 4-bit model with trainable adapters.

    A pattern for modules is one of

    - a module's path, or its end: `"q_proj"`, `"mlp.down_proj"`, `"model.layers.3.mlp.up_proj"`
    - a regular expression for the whole path, behind `re:`: `"re:.*layers\\.[0-3]\\..*_proj"`
    - `"all-linear"`: every linear layer except those that `skip_modules` names

    Attributes:
        r: rank of the adapters; 0 quantizes without adapters.
        alpha: the adapters' scaling is alpha / r.
        dropout: dropout on the adapters' input, in [0, 1).
        target_modules: a pattern or several; the layers that get an adapter.
        exclude_modules: patterns; layers that get none although a pattern of `target_modules` matches.
        skip_modules: patterns; linear layers that stay in 16 bits. None: the output head, layers whose weight
            is shared with another module, those that transformers keeps in float32, and `modules_to_save`; in a
            model that has been quantized before, all that stayed then.
        modules_to_save: patterns; modules that stay in 16 bits and are trained whole and saved with the adapter,
            such as a new classification head.
        blocksize: elements of a weight that share a scale; a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        scales: how they are found: "absmax", "search" (a lower error at the same size), or "signed" (lower still,
            with `double_quant=False` alone); see `qlora_engine.quantize`.
        rslora: scale by alpha / sqrt(r) instead.
        rank_pattern, alpha_pattern: pattern -> rank or alpha of the layers that it matches; the first match wins;
            rank 0 leaves a layer without an adapter.
        adapter_dtype: dtype of the adapters' parameters.
        adapter_name: name of the adapter.
        fused: let the projections of one input and gated MLPs act together (`models/grouping.py`), where the model's
            structure allows it; projections of one input then share a mask of dropout. False: every layer by itself.
        experts: store the stacked weights of a mixture of experts in 4 bits as well (`nn.NF4Experts`), frozen.
        quantize_embeddings: store the table of the input embeddings in 4 bits as well (`nn.NF4Embedding`), frozen.
        quantize_head: store the output head in 4 bits as well, frozen; it has an adapter only where
            `target_modules` names it. A head that is tied to the embeddings goes on sharing their weight where both
            are quantized.

    Raises:
        ValueError: where a value is out of range.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    skip_modules: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] = ()
    blocksize: int = 64
    double_quant: bool = True
    scales: str = "absmax"
    rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    adapter_dtype: torch.dtype = torch.float32
    adapter_name: str = DEFAULT_ADAPTER
    fused: bool = True
    experts: bool = True
    quantize_embeddings: bool = False
    quantize_head: bool = False

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r < 0:
            raise ValueError(f"the rank r is {self.r!r}; expected a whole number of at least 0 (0: no adapters)")
        LoRASettings(max(self.r, 1), self.alpha, self.dropout, self.rslora)
        if self.blocksize < 32 or self.blocksize > 4096 or self.blocksize & (self.blocksize - 1):
            raise ValueError(f"blocksize is {self.blocksize}; expected a power of two from 32 to 4096")
        check_scales(self.scales, self.double_quant)
        for field in ("target_modules", "exclude_modules", "modules_to_save", "skip_modules"):
            value = getattr(self, field)
            if isinstance(value, str):
                setattr(self, field, (value,))
            elif value is not None:
                setattr(self, field, tuple(value))
