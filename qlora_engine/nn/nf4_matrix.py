"""`NF4Matrix`: what layers share whose weight is a matrix in 4 bits, kept as plain tensors."""

from collections.abc import Callable, Iterable

from torch import nn

from qlora_engine.quantization.weight import NF4Weight


class NF4Matrix:
    """A mixin for modules with a packed `weight`, its scales as buffers, `blocksize` and `weight_dtype`.

    A class says the decoded weight's shape in `matrix_shape`.
    """

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight; it shares the module's tensors."""
        scales = self.absmax, self.nested_absmax, self.nested_offset
        return NF4Weight(self.weight, *scales, self.matrix_shape, self.blocksize, self.weight_dtype)

    def set_nf4_weight(self, w4: NF4Weight) -> None:
        """Replaces the weight; the new tensors are taken over, not copied.

        Raises:
            ValueError: where the shape is another.
        """
        if tuple(w4.shape) != self.matrix_shape:
            raise ValueError(f"the new weight has shape {list(w4.shape)}; expected {list(self.matrix_shape)}")
        self.weight = nn.Parameter(w4.packed, requires_grad=False)
        self.absmax, self.nested_absmax, self.nested_offset = w4.absmax, w4.nested_absmax, w4.nested_offset
        self.blocksize, self.weight_dtype = w4.blocksize, w4.dtype

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None


def apply_beside_scales(module: nn.Module, names: Iterable[str], fn: Callable, apply: Callable) -> nn.Module:
    """`nn.Module._apply` for a module some of whose buffers move with it but keep their dtype.

    Args:
        module: the module.
        names: of those buffers; a sharded one is a parameter, and left to `apply`.
        fn: what `_apply` was called with.
        apply: applies it to everything else.
    """
    scales = {name: module._buffers.pop(name) for name in names if name in module._buffers}
    apply()
    for name, scale in scales.items():
        if scale is not None:
            applied = fn(scale)
            scale = applied if applied.dtype == scale.dtype else scale.to(applied.device)
        module._buffers[name] = scale
    return module
