"""`NF4Experts`: the experts of a mixture-of-experts block with frozen 4-bit weights."""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import nn

from qlora_engine import functional
from qlora_engine.nn.nf4_matrix import apply_beside_scales
from qlora_engine.quantization.codebook import NESTED_BLOCKSIZE, blocks_of
from qlora_engine.quantization.weight import NF4Weight, quantize

SCALES = ("absmax", "nested_absmax", "nested_offset")


def expert_projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacked weights of a module of experts as transformers 5 writes them; empty for another module.

    Such a module has `num_experts`, `_apply_gate` or `act_fn`, and the parameters `gate_up_proj` (or `up_proj`) and
    `down_proj` of three dimensions, experts first (`use_experts_implementation` there).
    """
    flags = ("num_experts", "has_gate", "has_bias", "is_transposed")
    if not all(hasattr(module, flag) for flag in flags) or getattr(module, "has_post_expert_norm", False):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [module._parameters.get(name) for name in names]
    return names if all(w is not None and w.dim() == 3 for w in weights) else ()


class NF4Experts(nn.Module):
    """Experts `down(act(gate(x)) * up(x))`, weighted and summed, over stacked weights in 4 bits, frozen.

    Takes the place of a module of experts of transformers 5 and is called as that: with the tokens, the experts
    chosen for each, and their weights. What an expert computes between its projections stays that module's
    (`_apply_gate`). Each expert's weight is quantized by itself, so the bytes of a projection named `P` are

    - `P` uint8 `[experts, ceil(out * in / 2)]` (a Parameter without gradient),
    - `P_absmax` `[experts, blocks]`, uint8 where double-quantized, else float32,
    - `P_nested_absmax` float32 `[experts, ceil(blocks / 256)]` and `P_nested_offset` float32 `[experts]`, or None.

    A call has one product of each projection for every expert that is chosen, which the host must know to begin them.
    Weights that transformers keeps as `[experts, in, out]` are quantized as `[out, in]`, as those of a linear layer.

    Args:
        experts: the module that is replaced; its weights, here or on the meta device, are released, and it stays
            as `gating`.
        blocksize: elements of a weight that share a scale; a power of two from 32 to 4096.
        double_quant: whether the scales are stored in 8 bits.

    A module made this way has no weights yet: see `set_weights`, `from_experts`.

    Raises:
        TypeError: where the module is none of such experts.
    """

    def __init__(self, experts: nn.Module, *, blocksize: int = 64, double_quant: bool = True):
        super().__init__()
        names = expert_projections(experts)
        if not names:
            raise TypeError(f"{type(experts).__name__} is no module of stacked experts that is known here")
        self.num_experts, self.blocksize, self.double_quant = experts.num_experts, blocksize, double_quant
        self.has_gate, self.is_transposed = experts.has_gate, experts.is_transposed
        self.projections = names
        self.shapes: dict[str, tuple[int, int]] = {}
        self.weight_dtype = experts._parameters[names[0]].dtype
        for name in names:
            weight = experts._parameters[name]
            self.shapes[name] = tuple(weight.shape[:0:-1] if self.is_transposed else weight.shape[1:])
            bias = experts._parameters.get(f"{name}_bias") if experts.has_bias else None
            self.register_parameter(f"{name}_bias", bias)
            for key in (name, f"{name}_bias"):
                if key in experts._parameters:
                    experts.register_parameter(key, None)
            self._register_empty(name)
        self.gating = experts
        self._adapters: dict[str, tuple] = {}  # of the call that runs, by projection; see `adapted`
        self.train(experts.training)

    def _register_empty(self, name: str) -> None:
        numel = math.prod(self.shapes[name])
        blocks = blocks_of(numel, self.blocksize)
        E = self.num_experts

        def empty(*shape, dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        self.register_parameter(
            name, nn.Parameter(empty(E, math.ceil(numel / 2), dtype=torch.uint8), requires_grad=False)
        )
        self.register_buffer(
            f"{name}_absmax", empty(E, blocks, dtype=torch.uint8 if self.double_quant else torch.float32)
        )
        groups = blocks_of(blocks, NESTED_BLOCKSIZE)
        nested = self.double_quant
        self.register_buffer(f"{name}_nested_absmax", empty(E, groups, dtype=torch.float32) if nested else None)
        self.register_buffer(f"{name}_nested_offset", empty(E, dtype=torch.float32) if nested else None)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        scales: str = "absmax",
        device: torch.device | str | None = None,
    ) -> "NF4Experts":
        """Quantizes a module of experts; its 16-bit weights are released.

        Args:
            experts, blocksize, double_quant: as above.
            scales: how the scales are found, as in `qlora_engine.quantize`.
            device: where to quantize and keep the weights; default: where they are.
        """
        weights = {name: experts._parameters[name].detach() for name in expert_projections(experts)}
        module = cls(experts, blocksize=blocksize, double_quant=double_quant)
        for name in module.projections:
            weight = weights.pop(name)
            module.set_weights(name, weight if device is None else weight.to(device), scales)
        return module

    def set_weights(self, name: str, weights: torch.Tensor, scales: str = "absmax") -> None:
        """Quantizes the stacked weights of a projection, expert by expert, into the module.

        Args:
            name: of the projection.
            weights: `[experts, out, in]`, or `[experts, in, out]` where the replaced module keeps them so.
            scales: as in `qlora_engine.quantize`.

        Raises:
            ValueError: where the shape is another.
        """
        out_features, in_features = self.shapes[name]
        order = (in_features, out_features) if self.is_transposed else (out_features, in_features)
        if tuple(weights.shape) != (self.num_experts, *order):
            raise ValueError(f"{name} has shape {list(weights.shape)}; expected {[self.num_experts, *order]}")
        stacked = None
        for index, weight in enumerate(weights):
            weight = weight.T.contiguous() if self.is_transposed else weight
            w4 = quantize(weight, self.blocksize, self.double_quant, scales)
            parts = w4.arguments[:4]
            if stacked is None:
                stacked = [None if t is None else t.new_empty((self.num_experts, *t.shape)) for t in parts]
            for whole, part in zip(stacked, parts, strict=True):
                if whole is not None:
                    whole[index].copy_(part)
        self.weight_dtype = weights.dtype
        self._parameters[name] = nn.Parameter(stacked[0], requires_grad=False)
        for scale, tensor in zip(SCALES, stacked[1:], strict=True):
            self._buffers[f"{name}_{scale}"] = tensor

    def nf4_weight(self, name: str, expert: int) -> NF4Weight:
        """One expert's weight of a projection; it shares the module's tensors."""
        scales = [getattr(self, f"{name}_{scale}") for scale in SCALES]
        scales = [None if scale is None else scale[expert] for scale in scales]
        packed = self._parameters[name][expert]
        return NF4Weight(packed, *scales, self.shapes[name], self.blocksize, self.weight_dtype)

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weights of a projection, in the order in which the replaced module keeps them."""
        stacked = torch.stack([self.nf4_weight(name, e).dequantize(dtype) for e in range(self.num_experts)])
        return stacked.transpose(1, 2).contiguous() if self.is_transposed else stacked

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module that was replaced, with its decoded weights and biases.

        Args:
            dtype: theirs; default: that of the weights before.
        """
        experts = copy.copy(self.gating)
        experts._parameters = dict(self.gating._parameters)
        for name in self.projections:
            experts._parameters[name] = nn.Parameter(self.dequantize(name, dtype), requires_grad=False)
            bias = self._parameters[f"{name}_bias"]
            if bias is not None:
                bias = bias.detach() if dtype is None else bias.detach().to(dtype)
                experts._parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
        return experts.train(self.training)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the chosen experts.

        Args:
            hidden: `[tokens, hidden]`.
            chosen: int64 `[tokens, top_k]`: experts; one of `num_experts` or more is none.
            weights: `[tokens, top_k]`.

        Returns:
            `[tokens, hidden]`, in the dtype of `hidden`, summed in float32.
        """
        up = self.projections[0]
        top_k = chosen.shape[-1]
        order = chosen.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=self.num_experts)[: self.num_experts].tolist()
        summed = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        start = 0
        for expert, count in enumerate(counts):
            places = order[start : start + count]
            start += count
            if not count:
                continue
            tokens = places // top_k
            y = self._project(hidden[tokens], up, expert)
            y = self.gating._apply_gate(y) if self.has_gate else self.gating.act_fn(y)
            y = self._project(y, "down_proj", expert)
            summed = summed.index_add(0, tokens, y.float() * weights.reshape(-1)[places, None].float())
        return summed.to(hidden.dtype)

    @contextlib.contextmanager
    def adapted(self, name: str, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> Iterator[None]:
        """Within this context a projection has low-rank adapters, one for each expert.

        Args:
            name: of the projection.
            lora_A: `[experts, r, in]`.
            lora_B: `[experts, out, r]`.
            scaling: factor of their product.
        """
        self._adapters[name] = (lora_A.unbind(0), lora_B.unbind(0), scaling)
        try:
            yield
        finally:
            del self._adapters[name]

    def _project(self, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        bias = self._parameters[f"{name}_bias"]
        bias = None if bias is None else bias[expert]
        w4 = self.nf4_weight(name, expert)
        if name not in self._adapters:
            return functional.nf4_linear(x, w4, bias)
        A, B, scaling = self._adapters[name]
        return functional.qlora_linear(x, w4, A[expert], B[expert], scaling, bias)

    def _apply(self, fn, recurse=True):
        # as in NF4Linear: a change of dtype must not reach the scales
        names = [f"{name}_{scale}" for name in self.projections for scale in SCALES]
        return apply_beside_scales(self, names, fn, lambda: super(NF4Experts, self)._apply(fn, recurse))

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        return f"experts={self.num_experts}, {shapes}, nf4 blocks of {self.blocksize}"
