"""`NF4Linear`: a linear layer with a frozen 4-bit weight."""

import math

import torch
from torch import nn

from qlora_engine import functional
from qlora_engine.nn.nf4_matrix import NF4Matrix, apply_beside_scales
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, blocks_of
from qlora_engine.quantization.weight import NF4Weight, quantize

QUANTIZED_BUFFERS = ("absmax", "nested_absmax", "nested_offset")


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


class NF4Linear(NF4Matrix, nn.Linear):
    """`y = x W.T + bias` with W stored in 4 bits, frozen.

    The weight is plain tensors: `weight` (uint8, a Parameter without gradient) and the buffers `absmax`,
    `nested_absmax` and `nested_offset`. Casting the module (`.half()`, `.bfloat16()`, `.to(dtype)`) casts the
    bias and leaves them alone. `in_features`, `out_features` and `bias` are `nn.Linear`'s.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to add a bias.
        blocksize: elements of the weight that share a scale; a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.
        device: where the tensors are made; "meta" makes a module to load a `state_dict` into with `assign=True`.
        dtype: dtype of the bias, and what `dequantize` returns by default; default: torch's.

    A module made this way has a weight of zeros. Use `from_linear`, or load a `state_dict`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: that would make a weight in full precision
        dtype = dtype or torch.get_default_dtype()
        self.in_features, self.out_features, self.blocksize = in_features, out_features, blocksize
        self.weight_dtype = dtype
        self.fan_in_fan_out = False
        numel = out_features * in_features
        blocks = blocks_of(numel, blocksize)
        groups = blocks_of(blocks, NESTED_BLOCKSIZE)

        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        packed = zeros(math.ceil(numel / 2), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32))
        nested = (zeros(groups, dtype=torch.float32), zeros(dtype=torch.float32)) if double_quant else (None, None)
        self.register_buffer("nested_absmax", nested[0])
        self.register_buffer("nested_offset", nested[1])
        self.register_parameter("bias", nn.Parameter(zeros(out_features, dtype=dtype)) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        device: torch.device | str | None = None,
        **options,
    ):
        """Quantizes a linear layer; its 16-bit weight is released.

        Args:
            linear: `nn.Linear`, or transformers' `Conv1D`. Afterwards its `weight` is None, so that the memory is
                free even while something still refers to the layer. The bias moves over as it is.
            blocksize: elements of the weight that share a scale.
            double_quant: whether the scales are stored in 8 bits.
            scales: how they are found: "absmax", "search" or "signed", as in `qlora_engine.quantize`.
            device: where to quantize and keep the weight; default: where it is.
            options: passed on to the class's own constructor.

        Raises:
            TypeError: for another kind of module.
            ValueError: where the weight has already been released, or there are no such scales.
        """
        transposed = is_transposed_linear(linear) if getattr(linear, "weight", None) is not None else False
        if not transposed and (not isinstance(linear, nn.Linear) or isinstance(linear, NF4Linear)):
            raise TypeError(f"{type(linear).__name__} is not a linear layer to quantize; expected nn.Linear")
        if linear.weight is None:
            raise ValueError("this layer's weight was released when it was quantized before")
        weight = linear.weight.detach()
        weight = weight.T.contiguous() if transposed else weight
        w4 = quantize(weight if device is None else weight.to(device), blocksize, double_quant, scales)
        module = cls.from_weight(w4, linear.bias, fan_in_fan_out=transposed, **options)
        module.train(linear.training)
        linear.register_parameter("weight", None)
        return module

    @classmethod
    def from_weight(cls, w4: NF4Weight, bias: torch.Tensor | None = None, *, fan_in_fan_out: bool = False, **options):
        """A layer over an existing 4-bit weight `[out_features, in_features]`; nothing is copied.

        Raises:
            ValueError: where the weight is not a matrix.
        """
        if len(w4.shape) != 2:
            raise ValueError(f"the 4-bit weight has shape {list(w4.shape)}; expected a matrix [out, in]")
        out_features, in_features = w4.shape
        module = cls(
            in_features,
            out_features,
            bias=False,
            blocksize=w4.blocksize,
            double_quant=w4.double_quant,
            device="meta",
            dtype=w4.dtype,
            **options,
        )
        module.set_nf4_weight(w4)
        module.fan_in_fan_out = fan_in_fan_out
        if bias is not None:
            bias = bias.detach().to(w4.device)
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of the decoded weight."""
        return self.out_features, self.in_features

    @property
    def W_q(self) -> nn.Parameter:
        """The packed weight again, under the name by which PEFT knows a layer that it must ask to `dequantize`."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight `[out_features, in_features]`; default dtype: that of the weight before."""
        return self.nf4_weight.dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x` or autocast's."""
        return functional.nf4_linear(x, self.nf4_weight, self.bias)

    def _apply(self, fn, recurse=True):
        # `.half()` and the like convert every floating tensor; the scales must stay what they are. `fn` decides
        # the device, so it sees them, and only a change of dtype is undone.
        return apply_beside_scales(self, QUANTIZED_BUFFERS, fn, lambda: super(NF4Linear, self)._apply(fn, recurse))

    def reset_parameters(self) -> None:
        """Nothing: a quantized weight is not initialised in place."""

    def extra_repr(self) -> str:
        scales = "8-bit scales" if self.double_quant else "float32 scales"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nf4 blocks of {self.blocksize}, {scales}"
        )
