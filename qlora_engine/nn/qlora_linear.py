"""`QLoRALinear`: a linear layer with a frozen 4-bit weight and trainable low-rank adapters."""

import dataclasses
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine import functional
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.quantization.weight import quantize

DEFAULT_ADAPTER = "default"


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """What makes an adapter besides its matrices.

    Attributes:
        r: rank, at least 1.
        alpha: numerator of the scaling.
        dropout: probability with which an input element is dropped before the adapter, in [0, 1).
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, "rsLoRA") instead of alpha / r.

    Raises:
        ValueError: where a value is out of range.
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"the rank r is {self.r!r}; expected a whole number of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"the dropout is {self.dropout}; expected a probability of at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class QLoRALinear(NF4Linear):
    """`y = x W.T + bias + scaling * (drop(x) A.T) B.T` with W frozen in 4 bits and A, B trainable.

    Hu et al. 2021, "LoRA", on the base of Dettmers et al. 2023, "QLoRA". Adapters have names; any number can
    be held, and the active ones add up. `lora_A[name]` is `[r, in_features]`, `lora_B[name]`
    `[out_features, r]`. A new adapter changes nothing: A is Kaiming-uniform, B zero.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a bias (frozen).
        r: rank of the adapter "default"; 0 makes a layer without an adapter.
        alpha: its scaling is alpha / r.
        dropout: dropout on the adapter's input, in [0, 1).
        rslora: scale by alpha / sqrt(r).
        adapter_dtype: dtype of A and B.
        blocksize, double_quant, device, dtype: as in `NF4Linear`.
        scales: how the scales of its first weight are found, as in `NF4Linear.from_linear`.

    The constructor initialises the weight as `nn.Linear` does and quantizes it, unless the device is "meta".

    >>> layer = QLoRALinear(64, 32, r=8, alpha=16)
    >>> layer(torch.randn(4, 64)).shape
    torch.Size([4, 32])
    >>> sorted(name for name, p in layer.named_parameters() if p.requires_grad)
    ['lora_A.default', 'lora_B.default']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features,
            out_features,
            bias,
            blocksize=blocksize,
            double_quant=double_quant,
            device=device,
            dtype=dtype,
        )
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.adapters: dict[str, LoRASettings] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.adapters_enabled = True
        self.group = None  # nn.grouped.SharedInput, where other layers read the same input
        if self.weight.device.type != "meta":
            linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
            self.set_nf4_weight(quantize(linear.weight.detach(), blocksize, double_quant, scales))
            if bias:
                self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        if r:
            self.add_adapter(DEFAULT_ADAPTER, r=r, alpha=alpha, dropout=dropout, rslora=rslora, dtype=adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        device: torch.device | str | None = None,
    ) -> "QLoRALinear":
        """Quantizes a linear layer and adds an adapter; its 16-bit weight is released.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`; afterwards its `weight` is None.
            r, alpha, dropout, rslora, adapter_dtype: the adapter "default"; r=0 adds none.
            blocksize, double_quant, scales, device: as in `NF4Linear.from_linear`.

        >>> layer = QLoRALinear.from_linear(torch.nn.Linear(64, 32), r=8, alpha=16)
        """
        base = NF4Linear.from_linear(
            linear, blocksize=blocksize, double_quant=double_quant, scales=scales, device=device
        )
        return cls.from_nf4(base, r, alpha, dropout, rslora=rslora, adapter_dtype=adapter_dtype)

    @classmethod
    def from_nf4(
        cls,
        base: NF4Linear,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
        adapter_name: str = DEFAULT_ADAPTER,
    ) -> "QLoRALinear":
        """A layer with an adapter over the tensors of an `NF4Linear`; nothing is copied."""
        module = cls.from_weight(base.nf4_weight, base.bias, fan_in_fan_out=base.fan_in_fan_out, r=0)
        module.train(base.training)
        if r:
            module.add_adapter(adapter_name, r=r, alpha=alpha, dropout=dropout, rslora=rslora, dtype=adapter_dtype)
        return module

    def to_nf4(self) -> NF4Linear:
        """The layer without adapters, over the same tensors."""
        base = NF4Linear.from_weight(self.nf4_weight, self.bias, fan_in_fan_out=self.fan_in_fan_out)
        return base.train(self.training)

    def add_adapter(
        self,
        name: str,
        *,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds an adapter that changes nothing yet, trainable, and makes it the only active one.

        Raises:
            ValueError: where the name is taken, empty or has a dot, or a setting is out of range.
        """
        if not name or "." in name:
            raise ValueError(f"the adapter name {name!r} must not be empty or have a dot in it")
        if name in self.adapters:
            raise ValueError(f"there is already an adapter {name!r}; delete it first or choose another name")
        settings = LoRASettings(r, alpha, dropout, rslora)
        device = self.weight.device
        A = torch.empty(r, self.in_features, dtype=dtype, device=device)
        if device.type != "meta":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=device))
        self.adapters[name] = settings
        self.active_adapters = (name,)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            KeyError: where there is none of that name.
        """
        self._check_names([name])
        del self.lora_A[name], self.lora_B[name], self.adapters[name]
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def set_adapters(self, names: str | Iterable[str]) -> None:
        """Chooses the adapters that act; their products add up.

        Raises:
            KeyError: where there is none of a name.
        """
        names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self._check_names(names)
        self.active_adapters = names

    def scaling(self, name: str = DEFAULT_ADAPTER) -> float:
        """Factor of an adapter's product."""
        self._check_names([name])
        return self.adapters[name].scaling

    def delta_weight(self, names: str | Iterable[str] | None = None) -> torch.Tensor:
        """The change that adapters make to the weight: float32 `[out_features, in_features]`.

        Args:
            names: which ones; default: the active ones.
        """
        names = self.active_adapters if names is None else ((names,) if isinstance(names, str) else tuple(names))
        self._check_names(names)
        shape = (self.out_features, self.in_features)
        delta = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        for name in names:
            B, A = self.lora_B[name].detach().float(), self.lora_A[name].detach().float()
            delta.addmm_(B, A, alpha=self.adapters[name].scaling)
        return delta

    def projection(self) -> functional.QLoRAProjection | None:
        """What the layer computes now, as arguments of `functional.qlora_linear`; None unless one adapter acts."""
        if not self.adapters_enabled or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        settings = self.adapters[name]
        dropout_p = settings.dropout if self.training else 0.0
        A, B = self.lora_A[name], self.lora_B[name]
        return functional.QLoRAProjection(self.nf4_weight, A, B, settings.scaling, self.bias, dropout_p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x` or autocast's."""
        names = self.active_adapters if self.adapters_enabled else ()
        if not names:
            return super().forward(x)
        if self.group is not None:
            y = self.group.product(self, x)
            if y is not None:
                return y
        first, *others = names
        y = functional.qlora_linear(
            x,
            self.nf4_weight,
            self.lora_A[first],
            self.lora_B[first],
            self.adapters[first].scaling,
            self.bias,
            self.adapters[first].dropout if self.training else 0.0,
        )
        for name in others:
            settings = self.adapters[name]
            dropped = F.dropout(x.to(y.dtype), settings.dropout, self.training)
            S = F.linear(dropped, self.lora_A[name].to(y.dtype))
            y = y + settings.scaling * F.linear(S, self.lora_B[name].to(y.dtype))
        return y

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.adapters:
                raise KeyError(f"there is no adapter {name!r}; this layer has {sorted(self.adapters) or 'none'}")

    def extra_repr(self) -> str:
        adapters = [
            f"{name}{'*' if name in self.active_adapters else ''}: r={s.r}, scaling={s.scaling:g}"
            + (f", dropout={s.dropout:g}" if s.dropout else "")
            for name, s in self.adapters.items()
        ]
        return super().extra_repr() + (f", adapters: {'; '.join(adapters)}" if adapters else ", no adapter")
