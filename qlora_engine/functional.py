"""Products with 4-bit weights as differentiable functions: frozen, with low-rank adapters, and in groups."""

from typing import NamedTuple

import torch

from qlora_engine import ops
from qlora_engine.adapter_nodes import Frozen, Group, QLoRAGroup, QLoRAMLP, gated_mlp_output, group_outputs
from qlora_engine.ops.direct import makes_graph, operator
from qlora_engine.ops.gated import ACTIVATIONS
from qlora_engine.quantization.weight import NF4Weight


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with `x` is computed: autocast's where it is on, else that of `x`."""
    device = x.device.type
    if x.is_floating_point() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def nf4_linear(x: torch.Tensor, w4: NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Product with a frozen 4-bit weight: `y = x @ W.T + bias`.

    Differentiable in `x` and `bias`. Nothing of the weight's size is computed for backward or saved.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        w4: a weight of shape `[out_features, in_features]`.
        bias: `[out_features]`, or None.

    Returns:
        `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where the weight is not a matrix or does not fit `x`.

    >>> from qlora_engine import quantize
    >>> w4 = quantize(torch.randn(8, 64))
    >>> nf4_linear(torch.randn(2, 3, 64), w4).shape
    torch.Size([2, 3, 8])
    """
    out_features, _ = _matrix_shape(x, w4)
    dtype = compute_dtype(x)
    bias = bias if bias is None else bias.to(dtype)
    x = x.to(dtype)
    product = ops.linear_nf4 if makes_graph(x, bias) else operator("linear_nf4", x)
    return product(x, *w4.arguments, out_features, bias)


def qlora_linear(
    x: torch.Tensor,
    w4: NF4Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Product with a frozen 4-bit weight and a low-rank adapter: `y = x W.T + scaling * (drop(x) A.T) B.T + bias`.

    Hu et al. 2021, "LoRA", equation 3, on the base of Dettmers et al. 2023, "QLoRA", equation 5. One autograd
    node: backward keeps `x`, the narrow product `S = drop(x) A.T` and references to the parameters, nothing
    else. The dropout mask is computed again from a seed of torch's generator.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        w4: a weight of shape `[out_features, in_features]`.
        lora_A: `[r, in_features]`, float32 or the dtype of `x`; its gradient has its own dtype.
        lora_B: `[out_features, r]`, likewise.
        scaling: factor of the adapter's product, such as alpha / r.
        bias: `[out_features]`, or None.
        dropout_p: probability with which an element of `x` is dropped before the adapter, in [0, 1).

    Returns:
        `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where shapes do not fit, or `dropout_p` is out of range.

    >>> from qlora_engine import quantize
    >>> A, B = torch.randn(4, 64, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    >>> qlora_linear(torch.randn(2, 64), quantize(torch.randn(8, 64)), A, B, scaling=2.0).sum().backward()
    >>> A.grad.shape, B.grad.shape
    (torch.Size([4, 64]), torch.Size([8, 4]))
    """
    (y,) = qlora_group(x, QLoRAProjection(w4, lora_A, lora_B, scaling, bias, dropout_p))
    return y


class QLoRAProjection(NamedTuple):
    """One projection of a group: the arguments of `qlora_linear` after x.

    Attributes:
        weight: a weight of shape `[out_features, in_features]`.
        lora_A: `[r, in_features]`, float32 or the dtype of x.
        lora_B: `[out_features, r]`, likewise.
        scaling: factor of the adapter's product.
        bias: `[out_features]`, or None.
        dropout_p: probability with which an element of x is dropped before the adapter, in [0, 1).
    """

    weight: NF4Weight
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    dropout_p: float = 0.0


def qlora_qkv(
    x: torch.Tensor, q: QLoRAProjection, k: QLoRAProjection, v: QLoRAProjection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three projections of one x, as `qlora_linear` of each, in one autograd node.

    The adapters read x once in forward and once in backward; backward keeps x, the three narrow products, and
    references to the parameters. One mask of dropout serves all three.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        q, k, v: the projections; their dropout is the same.

    Returns:
        Three tensors `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where shapes do not fit, or the dropouts differ or are out of range.

    >>> from qlora_engine import quantize
    >>> def projection(out):
    ...     return QLoRAProjection(quantize(torch.randn(out, 64)), torch.randn(4, 64), torch.randn(out, 4), 2.0)
    >>> [y.shape for y in qlora_qkv(torch.randn(2, 64), projection(64), projection(16), projection(16))]
    [torch.Size([2, 64]), torch.Size([2, 16]), torch.Size([2, 16])]
    """
    return qlora_group(x, q, k, v)


def qlora_mlp(
    x: torch.Tensor,
    gate: QLoRAProjection,
    up: QLoRAProjection | None,
    down: QLoRAProjection,
    activation: str = "silu",
) -> torch.Tensor:
    """A gated MLP, `down(act(gate(x)) * up(x))`, in one autograd node.

    Shazeer 2020, "GLU variants improve transformer", with `qlora_linear` for each product. Backward keeps x, gate,
    up, the narrow products and references to the parameters; it computes `act(gate) * up` again and, unless the graph
    is retained, writes it and the gradients of gate and up over what it kept. Gate and up share a mask of dropout.

    Args:
        x: float16, bfloat16 or float32 `[..., in_features]`.
        gate, up: projections of `x` of the same size; their dropout is the same. Where `up` is None, `gate` is both,
            one below the other: its first outputs are those of gate, the others those of up.
        down: projection of their product.
        activation: "silu", "gelu" (exact) or "gelu_tanh".

    Returns:
        `[..., out_features]` in the dtype of `x`, or autocast's where it is on.

    Raises:
        ValueError: where shapes do not fit, or the dropouts differ or are out of range, or for another activation.

    >>> from qlora_engine import quantize
    >>> def projection(out, into):
    ...     return QLoRAProjection(quantize(torch.randn(out, into)), torch.randn(4, into), torch.randn(out, 4), 2.0)
    >>> qlora_mlp(torch.randn(2, 64), projection(96, 64), projection(96, 64), projection(64, 96)).shape
    torch.Size([2, 64])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"the activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    inputs = (gate,) if up is None else (gate, up)
    sizes = [list(one.weight.shape) for one in (*inputs, down)]
    hidden = sizes[0][0] // (2 if up is None else 1)
    if sizes[-1][-1] != hidden or (up is None and sizes[0][0] % 2) or (up is not None and sizes[1] != sizes[0]):
        raise ValueError(
            f"the weights are {', '.join(map(str, sizes))}; expected gate and up of [hidden, in], or both in one of "
            "[2 hidden, in], and down of [out, hidden]"
        )
    inner, tensors = _as_group(x, inputs)
    dtype = compute_dtype(x)
    outer, more = _as_group(x.new_empty(0, hidden, dtype=dtype), (down,))
    seeds = _draw_seeds(x, 2) if inner.dropout_p or outer.dropout_p else None
    x = x.to(dtype)
    if makes_graph(x, *tensors, *more):
        return QLoRAMLP.apply(x, seeds, inner, outer, activation, *tensors, *more)
    return gated_mlp_output(x, seeds, inner, outer, activation, (*tensors, *more))[0]


def qlora_group(x: torch.Tensor, *projections: QLoRAProjection) -> tuple[torch.Tensor, ...]:
    """One to three projections of one x, as `qlora_qkv` of three.

    Raises:
        ValueError: as in `qlora_qkv`, or for more projections.
    """
    if not 1 <= len(projections) <= 3:
        raise ValueError(f"there are {len(projections)} projections; a group has one to three")
    group, tensors = _as_group(x, projections)
    seed = _draw_seeds(x, 1) if group.dropout_p else None
    x = x.to(compute_dtype(x))
    if makes_graph(x, *tensors):
        return QLoRAGroup.apply(x, seed, group, *tensors)
    return group_outputs(x, seed, group, tensors)[0]


def _draw_seeds(x: torch.Tensor, count: int) -> torch.Tensor:
    """From torch's generator on the device of x: `torch.manual_seed` repeats them, and so does a checkpoint."""
    return torch.randint(2**62, (count,), device=x.device)


def _as_group(x: torch.Tensor, projections: tuple[QLoRAProjection, ...]) -> tuple[Group, list[torch.Tensor | None]]:
    """Checks projections of x and arranges them for an autograd node."""
    dtype, members, tensors = compute_dtype(x), [], []
    dropout_p = float(projections[0].dropout_p)
    for w4, lora_A, lora_B, scaling, bias, other_p in projections:
        out_features, in_features = _matrix_shape(x, w4)
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, in_features) or lora_B.shape != (out_features, rank):
            raise ValueError(
                f"lora_A is {list(lora_A.shape)} and lora_B {list(lora_B.shape)}; for a weight of "
                f"[{out_features}, {in_features}] they must be [r, {in_features}] and [{out_features}, r]"
            )
        if not 0.0 <= other_p < 1.0:
            raise ValueError(f"dropout_p is {other_p}; expected a probability of at least 0 and below 1")
        if other_p != dropout_p:
            raise ValueError(f"dropout_p is {dropout_p} and {other_p}; projections of one group share their dropout")
        *weight, blocksize = w4.arguments
        members.append(Frozen(out_features, blocksize, float(scaling)))
        tensors += [lora_A, lora_B, bias if bias is None else bias.to(dtype), *weight]
    return Group(tuple(members), dropout_p), tensors


def _matrix_shape(x: torch.Tensor, w4: NF4Weight) -> tuple[int, int]:
    if len(w4.shape) != 2:
        raise ValueError(f"the 4-bit weight has shape {list(w4.shape)}; expected a matrix [out, in]")
    if x.dim() == 0 or x.shape[-1] != w4.shape[1]:
        raise ValueError(
            f"x has shape {list(x.shape)}; its last dimension must be the weight's in_features, {w4.shape[1]}"
        )
    return w4.shape
