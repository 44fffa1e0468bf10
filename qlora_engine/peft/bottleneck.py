"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021; in parallel: He et al. 2022)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine.models.targets import check_patterns, is_linear, matches_any
from qlora_engine.peft.base import Method, MethodConfig, MethodError, register
from qlora_engine.peft.blocks import as_list, features, find_blocks
from qlora_engine.peft.parts import Attached, Part

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
PLACEMENTS = ("houlsby", "pfeiffer")


@dataclasses.dataclass
class Bottleneck(MethodConfig):
    """Trains a narrow network beside or behind layers: `y + scaling * (U f(D drop(h) + d) + u)`.

    `h` is the layer's output (sequential) or its input (parallel). U and u start at zero, so nothing changes yet.

    Attributes:
        size: width of the bottleneck, the rows of `D [size, in]` and columns of `U [out, size]`.
        placement: "houlsby", after attention and after the feed-forward part of every block; "pfeiffer", after the
            feed-forward part alone. In both the adapter comes before the residual sum. In parallel it spans the whole
            part: it reads what attention or the feed-forward part reads.
        target_modules: patterns (see `QLoRAConfig`) of layers to adapt instead of a placement: linear layers,
            convolutions (1x1 projections over channels), norms, embeddings in sequence, and attention, feed-forward
            or other modules that return hidden states of the model's width.
        parallel: the adapter reads the input instead of the output.
        activation: f, one of relu, gelu, silu, tanh, identity.
        scaling: factor of what is added; He et al. use 4 in parallel.
        dropout: dropout on the adapter's input, in [0, 1).

    >>> from qlora_engine.peft import apply
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> method = apply(model, Bottleneck(size=3, target_modules=["0"]))
    >>> {name: tuple(param.shape) for name, param in method.trainable_parameters().items()}
    {'0.down': (3, 8), '0.up': (8, 3), '0.down_bias': (3,), '0.up_bias': (8,)}
    """

    name: ClassVar[str] = "bottleneck"
    size: int = 16
    placement: str = "houlsby"
    target_modules: Sequence[str] = ()
    parallel: bool = False
    activation: str = "gelu"
    scaling: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        if not isinstance(self.size, int) or self.size < 1:
            raise MethodError(f"the bottleneck's size is {self.size!r}; expected a whole number of at least 1")
        if self.activation not in ACTIVATIONS:
            raise MethodError(
                f"activation {self.activation!r} is not known; expected one of {', '.join(ACTIVATIONS)}"
            )
        if self.placement not in PLACEMENTS:
            raise MethodError(f"placement {self.placement!r} is not known; expected one of {', '.join(PLACEMENTS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise MethodError(f"the dropout is {self.dropout}; expected a probability of at least 0 and below 1")


class Adapter(Part):
    """The narrow network on one layer. Its parameters are float32; it computes in the dtype of the hidden states.

    Args:
        config: activation, scaling, dropout and size.
        sizes: features of what it reads and of what it adds to.
        channels: whether features are dimension 1, as in convolutions, instead of the last.
        device: of its parameters.
    """

    def __init__(self, config: Bottleneck, sizes: tuple[int, int], channels: bool, device: torch.device):
        super().__init__()
        self.parallel, self.channels = config.parallel, channels
        self.activation, self.scaling, self.dropout = config.activation, config.scaling, config.dropout
        self.down = nn.Parameter(torch.empty(config.size, sizes[0], device=device))
        self.up = nn.Parameter(torch.zeros(sizes[1], config.size, device=device))
        self.down_bias = nn.Parameter(torch.zeros(config.size, device=device))
        self.up_bias = nn.Parameter(torch.zeros(sizes[1], device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # nn.Linear's
        self.source: Source | None = None

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.source is not None:
            x, self.source.seen = self.source.seen, None
        h = x if self.parallel else y
        if self.channels:
            h = h.movedim(1, -1)
        down, down_bias, up, up_bias = (p.to(h.dtype) for p in (self.down, self.down_bias, self.up, self.up_bias))
        h = F.dropout(h, self.dropout, self.training)
        h = ACTIVATIONS[self.activation](F.linear(h, down, down_bias))
        change = F.linear(h, up, up_bias) * self.scaling
        return y + (change.movedim(-1, 1) if self.channels else change).to(y.dtype)


class Source(Part):
    """Keeps the input of the first layer of a part for the adapter on its last, within one forward pass."""

    def __init__(self):
        super().__init__()
        self.seen: torch.Tensor | None = None

    def before(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


@register
class BottleneckMethod(Method):
    """Adapters on layers through hooks. The non-linearity keeps them from being merged."""

    config_class = Bottleneck

    def _install(self) -> None:
        config: Bottleneck = self.config
        patterns = as_list(config.target_modules)
        pairs = self._named(patterns) if patterns else self._placed()
        adapters, sources = {}, {}
        for start, end in pairs:
            reads, channels = self._sizes(start, 0)
            adds, _ = self._sizes(end, 1)
            layer = self.model.get_submodule(end)
            device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), torch.device("cpu"))
            self._check_channels(layer, end)
            adapters[end] = Adapter(config, (reads if config.parallel else adds, adds), channels, device)
            if config.parallel and start != end:
                sources[start] = adapters[end].source = Source()
        self._sources = Attached(self.model, sources, "bottleneck_source")
        self._attached = Attached(self.model, adapters, "bottleneck")

    def _placed(self) -> list[tuple[str, str]]:
        """(first, last) layer of every part that the placement means."""
        kinds = ("attention", "feedforward") if self.config.placement == "houlsby" else ("feedforward",)
        pairs = []
        for block in find_blocks(self.model):
            for kind in kinds:
                found = getattr(block, kind)
                if not found:
                    raise MethodError(
                        f"the {kind} layers of {block.path} in {type(self.model).__name__} are not known; name what "
                        "to adapt: Bottleneck(target_modules=[...])"
                    )
                pairs += found
        return pairs

    def _named(self, patterns: list[str]) -> list[tuple[str, str]]:
        paths = [path for path, _ in self.model.named_modules() if path]
        check_patterns(patterns, paths, "target_modules")
        return [(path, path) for path in paths if matches_any(patterns, path)]

    def _sizes(self, path: str, end: int) -> tuple[int, bool]:
        """Features of a layer's input (0) or output (1), and whether they are channels."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return (layer.in_channels, layer.out_channels)[end], True
        if is_linear(layer):
            return features(layer)[end], False
        if isinstance(layer, nn.Embedding):
            if self.config.parallel:
                raise MethodError(f"{path} reads indices; an adapter on an embedding can only be sequential")
            return layer.embedding_dim, False
        if "norm" in type(layer).__name__.lower() and getattr(layer, "weight", None) is not None:
            return layer.weight.shape[-1], isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        width = getattr(getattr(self.model, "config", None), "hidden_size", None)
        if width is None or isinstance(layer, nn.ModuleList):
            raise MethodError(
                f"the width of {path} ({type(layer).__name__}) is not known; adapt a linear layer, a convolution, a "
                "norm or an embedding, or a module of a model whose config has a hidden_size"
            )
        return width, False

    def _check_channels(self, layer: nn.Module, path: str) -> None:
        """In parallel a projection of the input must have the positions of the output."""
        if self.config.parallel and isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            padding = (0,) * len(layer.kernel_size) if layer.padding == "valid" else layer.padding
            kept = padding == "same" or all(
                2 * p == d * (k - 1) for p, d, k in zip(padding, layer.dilation, layer.kernel_size, strict=True)
            )
            if not kept or set(layer.stride) != {1}:
                raise MethodError(
                    f"{path} changes the positions (stride or padding), so that a parallel adapter does not fit; use "
                    "a sequential one"
                )

    def _uninstall(self) -> None:
        self._attached.detach()
        self._sources.detach()

    def _switch(self, enabled: bool) -> None:
        self._attached.enable(enabled)
        self._sources.enable(enabled)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{path}.{name}": param
            for path, part in self._attached.parts.items()
            for name, param in part._parameters.items()
        }

    def notes(self) -> dict[str, Any]:
        return {"adapters": len(self._attached.parts), "size": self.config.size}
