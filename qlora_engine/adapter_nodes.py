"""Autograd nodes of 4-bit projections with low-rank adapters: one for projections of one input, one for a gated MLP.

Of a projection `y = x W^T + b + s (drop(x) A^T) B^T` a node keeps x, S = drop(x) A^T and references to the
parameters. Projections of one x share its reads: their S is one product with the stacked A, and so is their dA; one
mask of dropout serves them all. The gated MLP keeps gate and up besides, and computes h = act(gate) * up again.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from qlora_engine.ops.direct import one_read_pays, operator, serves_layers

TENSORS = 7  # of a projection, in the arguments of a node: A, B, bias, packed, absmax, nested_absmax, nested_offset


class Frozen(NamedTuple):
    """What a node knows of a projection besides tensors."""

    out_features: int
    blocksize: int
    scaling: float


class Group(NamedTuple):
    """Projections of one input.

    Attributes:
        members: one entry a projection.
        dropout_p: probability with which an element of the input is dropped before the adapters.
    """

    members: tuple[Frozen, ...]
    dropout_p: float


class _Recomputation(threading.local):
    unread = False


_recomputation = _Recomputation()


@contextlib.contextmanager
def unread_mlp_outputs() -> Iterator[None]:
    """Within this context, on this thread, the outputs of gated MLPs are NaN, and their last product is left out.

    For the recomputation of a layer that adds the MLP's output to something and ends: backward reads what the MLP
    keeps, and not what it gave.
    """
    before, _recomputation.unread = _recomputation.unread, True
    try:
        yield
    finally:
        _recomputation.unread = before


def _split(tensors: Sequence) -> list[Sequence]:
    return [tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS)]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _together(x, group: Group, projections) -> bool:
    """Whether one operator serves all of a group's projections: `ops/adapter.py`."""
    if group.dropout_p or not serves_layers(x.device.type):
        return False
    for A, B, *_ in projections:
        if not (A.is_contiguous() and B.is_contiguous()):
            return False
        if A.dtype not in (torch.float32, x.dtype) or B.dtype not in (torch.float32, x.dtype):
            return False
    return True


def _weights(projections, group: Group) -> tuple[list, ...]:
    """packed, absmax, nested_absmax, nested_offset and blocksizes, a list each."""
    packed, absmax, nested_absmax, nested_offset = [[p[3 + i] for p in projections] for i in range(4)]
    return packed, absmax, nested_absmax, nested_offset, [member.blocksize for member in group.members]


def _forward(x, seed, group: Group, tensors, unread: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of a group `[M, out]` for x `[M, in]`, and S `[M, sum of ranks]`; no outputs if they are unread."""
    projections = _split(tensors)
    if not unread and _together(x, group, projections):
        sizes, scalings = [m.out_features for m in group.members], [m.scaling for m in group.members]
        lora_A, lora_B, biases = [[p[i] for p in projections] for i in range(3)]
        weights = _weights(projections, group)
        return operator("adapter_forward", x)(x, *weights, sizes, biases, lora_A, lora_B, scalings)
    S = operator("lora_down", x)(x, [A for A, *_ in projections], 1.0, group.dropout_p, seed)
    if unread:
        return [x.new_full((), float("nan")).expand(len(x), member.out_features) for member in group.members], S
    product, add = operator("linear_nf4", x), operator("lora_add", x)
    outputs, first = [], 0
    for (A, B, bias, *weight), member in zip(projections, group.members, strict=True):
        y = product(x, *weight, member.blocksize, member.out_features, bias)
        add(y, S[:, first : first + A.shape[0]], B, member.scaling, [], 0.0, None)
        outputs.append(y)
        first += A.shape[0]
    return outputs, S


def _backward_of_S(grads, S, group: Group, tensors, needs):
    """Gradients of S `[M, sum of ranks]` and of every B and bias, in one read of every output's gradient.

    A gradient that is None is zero.
    """
    projections = _split(tensors)
    everything = all(grad is not None and need[1] for grad, need in zip(grads, needs, strict=True))
    if (
        everything
        and _together(S, group, projections)
        and not any(one_read_pays(g, p[1]) for g, p in zip(grads, projections, strict=True))
    ):
        scalings = [member.scaling for member in group.members]
        grad_S, grads_B = operator("adapter_backward_S", S)(grads, S, [p[1] for p in projections], scalings)
        biases = [grad.sum(dim=0) if need[2] else None for grad, need in zip(grads, needs, strict=True)]
        return grad_S, list(zip(grads_B, biases, strict=True))
    grad_S, first, rest = torch.empty_like(S), 0, []
    for grad, (A, B, *_), member, need in zip(grads, projections, group.members, needs, strict=True):
        part = slice(first, first + A.shape[0])
        first += A.shape[0]
        grad_B = grad_bias = None
        if grad is None:
            grad_S[:, part] = 0
        elif need[1]:
            grad_B = operator("lora_grad_B", grad)(grad, S[:, part], B, member.scaling, grad_S[:, part])
        else:
            grad_S[:, part] = operator("lora_down", grad)(grad, [B.T], member.scaling, 0.0, None)
        if grad is not None and need[2]:
            grad_bias = grad.sum(dim=0)
        rest.append((grad_B, grad_bias))
    return grad_S, rest


def _backward_of_x(grads, grad_S, seed, group: Group, tensors, in_features):
    """Gradient of x `[M, in]`: the sum over the projections, and the adapters' part in the same pass."""
    projections = _split(tensors)
    if all(grad is not None for grad in grads) and _together(grad_S, group, projections):
        lora_A = [p[0] for p in projections]
        return operator("adapter_backward_x", grad_S)(grads, grad_S, *_weights(projections, group), lora_A)
    parts = [
        operator("linear_nf4_backward", grad)(grad, *weight, member.blocksize, in_features)
        for grad, (_A, _B, _bias, *weight), member in zip(grads, projections, group.members, strict=True)
        if grad is not None
    ]
    grad_x, *others = parts
    lora_A = [A for A, *_ in projections]
    stacked = lora_A[0] if len(lora_A) == 1 else torch.cat(lora_A)
    operator("lora_add", grad_x)(grad_x, grad_S, stacked.T, 1.0, others, group.dropout_p, seed)
    return grad_x


def _backward_of_A(grad_S, x, seed, group: Group, tensors, needs):
    """Gradients of every A, in one read of x."""
    lora_A = [A for A, *_ in _split(tensors)]
    if not any(need[0] for need in needs):
        return [None] * len(lora_A)
    dtype = lora_A[0].dtype if len({A.dtype for A in lora_A}) == 1 else torch.float32
    stacked = operator("lora_grad_A", x)(grad_S, x, group.dropout_p, seed, dtype)
    parts = stacked.split([A.shape[0] for A in lora_A])
    return [part.to(A.dtype) if need[0] else None for part, A, need in zip(parts, lora_A, needs, strict=True)]


def _arranged(grads_A, rest) -> list[torch.Tensor | None]:
    """Gradients in the order of a node's tensors."""
    rows = [(grad_A, grad_B, grad_bias) for grad_A, (grad_B, grad_bias) in zip(grads_A, rest, strict=True)]
    return [grad for row in rows for grad in (*row, *[None] * (TENSORS - len(row)))]


def group_outputs(x, seed, group: Group, tensors) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What `QLoRAGroup` returns, and S: for calls that autograd does not record as well."""
    outputs, S = _forward(_flat(x), seed, group, tensors)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs), S


def gated_mlp_output(x, seeds, inner: Group, outer: Group, activation: str, tensors):
    """What `QLoRAMLP` returns, the S of both groups, gate and up: for calls that autograd does not record as well."""
    first, second = _seeds(seeds)
    outputs, S = _forward(_flat(x), first, inner, tensors[:-TENSORS])
    gate, up = _gate_and_up(outputs)
    h = operator("gated_activation", gate)(gate, up, activation)
    unread = not torch.compiler.is_compiling() and _recomputation.unread
    (y,), S_of_h = _forward(h, second, outer, tensors[-TENSORS:], unread)
    return y.reshape(*x.shape[:-1], y.shape[-1]), S, S_of_h, outputs


class QLoRAGroup(torch.autograd.Function):
    """Outputs of a group's projections for one x: `apply(x, seed, group, *tensors)`.

    `x` `[..., in]` in the compute dtype; `seed` int64 [1] where there is dropout, else None; TENSORS tensors a
    projection. Returns a tuple of `[..., out]`.
    """

    @staticmethod
    def forward(ctx, x, seed, group, *tensors):
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        outputs, S = group_outputs(x, seed, group, tensors)
        kept = [t if i % TENSORS != 2 else None for i, t in enumerate(tensors)]  # backward has no use for a bias
        ctx.save_for_backward(x, seed, S, *kept)
        ctx.group, ctx.shape = group, x.shape
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, seed, S, *tensors = ctx.saved_tensors
        group, in_features = ctx.group, x.shape[-1]
        nothing = (None,) * (3 + len(tensors))
        if all(grad is None for grad in grads):
            return nothing
        needs = _split(ctx.needs_input_grad[3:])
        grads = [grad if grad is None else _flat(grad) for grad in grads]
        grad_S, rest = _backward_of_S(grads, S, group, tensors, needs)
        grads_A = _backward_of_A(grad_S, _flat(x), seed, group, tensors, needs)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _backward_of_x(grads, grad_S, seed, group, tensors, in_features).reshape(ctx.shape)
        return grad_x, None, None, *_arranged(grads_A, rest)


class QLoRAMLP(torch.autograd.Function):
    """A gated MLP, `down(act(gate(x)) * up(x))`: `apply(x, seeds, inner, outer, activation, *tensors)`.

    `seeds` int64 [2] where there is dropout, else None; `inner` is the group of gate and up, or of one projection
    whose outputs are those of gate and then those of up; `outer` is that of down. TENSORS tensors a projection.
    Returns `[..., out]`.
    """

    @staticmethod
    def forward(ctx, x, seeds, inner, outer, activation, *tensors):
        x = x.contiguous()
        y, S, S_of_h, outputs = gated_mlp_output(x, seeds, inner, outer, activation, tensors)
        kept = [t if i % TENSORS != 2 else None for i, t in enumerate(tensors)]
        ctx.save_for_backward(x, seeds, S, S_of_h, *outputs, *kept)
        ctx.settings, ctx.shape = (inner, outer, activation), x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (inner, outer, activation), in_features = ctx.settings, ctx.shape[-1]
        x, seeds, S, S_of_h, *rest = ctx.saved_tensors
        outputs, tensors = rest[: len(inner.members)], rest[len(inner.members) :]
        first, second = _seeds(seeds)
        needs = _split(ctx.needs_input_grad[5:])
        inner_tensors, outer_tensors = tensors[:-TENSORS], tensors[-TENSORS:]
        grads = [_flat(grad)]
        grad_S, outer_rest = _backward_of_S(grads, S_of_h, outer, outer_tensors, needs[-1:])
        hidden = outputs[0].shape[-1] * len(outputs) // 2
        grad_h = _backward_of_x(grads, grad_S, second, outer, outer_tensors, hidden)
        h, inner_grads = _activation_backward(grad_h, outputs, activation)
        outer_A = _backward_of_A(grad_S, h, second, outer, outer_tensors, needs[-1:])
        del h, grad_h, outputs, rest
        grad_S, inner_rest = _backward_of_S(inner_grads, S, inner, inner_tensors, needs[:-1])
        inner_A = _backward_of_A(grad_S, _flat(x), first, inner, inner_tensors, needs[:-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _backward_of_x(inner_grads, grad_S, first, inner, inner_tensors, in_features).reshape(ctx.shape)
        return grad_x, None, None, None, None, *_arranged([*inner_A, *outer_A], [*inner_rest, *outer_rest])


def _gate_and_up(outputs):
    """Two matrices, or the halves of one."""
    return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)


def _activation_backward(grad_h, outputs, activation):
    """h, and the gradients of the inner projections' outputs; over grad_h and the outputs where they may be."""
    gate, up = _gate_and_up(outputs)
    if _may_overwrite_saved():
        operator("gated_activation_backward_inplace", gate)(grad_h, gate, up, activation)
        return grad_h, outputs
    h, *grads = operator("gated_activation_backward", gate)(grad_h, gate, up, activation)
    return h, grads if len(outputs) == 2 else [torch.cat(grads, dim=-1)]


def _seeds(seeds: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if seeds is None else (seeds[:1], seeds[1:])


def _may_overwrite_saved() -> bool:
    """Whether this backward is the last that reads what forward saved, so that it may be written over.

    Not under `retain_graph=True`; and where torch does not say, or is tracing, no.
    """
    if torch.compiler.is_compiling():
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()
