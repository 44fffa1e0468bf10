"""The loss of a causal language model without its logits: head and cross-entropy in one, a few rows at a time.

With 128,256 words the logits of 8,192 tokens take 2 GiB in 16 bits and 4 GiB in the float32 that cross-entropy wants.
Here CHUNK_BYTES of them exist at a time, are overwritten with their gradient, and give the gradient of the hidden
states at once (the idea is that of Liger-Kernel's fused linear cross-entropy). Nothing waits for the GPU, so a step
can be captured into a CUDA graph. Losses are summed, or given row by row for objectives that weigh them afterwards.

A head in 4 bits is multiplied as any layer in 4 bits is. Where that decodes the weight, as on GPUs without the fused
kernels, its 16-bit copy would be as large as the logits were: so it is multiplied SLICE_BYTES of it at a time.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from qlora_engine import kernels, ops
from qlora_engine.functional import compute_dtype
from qlora_engine.models.adapters import evaluating
from qlora_engine.nn.nf4_embedding import TiedNF4Linear
from qlora_engine.nn.nf4_linear import NF4Linear
from qlora_engine.quantization.weight import NF4Weight, split_rows

CHUNK_BYTES = 128 << 20
SLICE_BYTES = 64 << 20  # of a 4-bit head, decoded: 8,192 words of 4,096, which still fill an H100
# Rows below which a product with the head is bound by reading the head: an H100 takes as long for fewer
LEAST_ROWS = 256
IGNORED = -100  # transformers' label of tokens that do not count
PROBE_TOKENS = 5
PROBE_BOUND = 1e-2  # relative RMS: two orders of summation in bfloat16


class CausalLoss(NamedTuple):
    """What a batch gave.

    Attributes:
        loss: the sum of the tokens' losses over `num_items`, a scalar with a graph.
        correct: int64 scalar, tokens whose label has the highest logit.
        count: int64 scalar, tokens that count.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    count: torch.Tensor


def _rows_in_torch(logits, labels, losses, correct, ignore_index, gradient):
    """`kernels.cross_entropy.cross_entropy_` where there is no Triton."""
    z = logits.float()
    counts = labels != ignore_index
    index = labels.where(counts, 0).unsqueeze(1)
    chosen = z.gather(1, index).squeeze(1)
    losses.copy_((z.logsumexp(1) - chosen).where(counts, 0))
    correct.copy_(counts & (chosen >= z.amax(1)))
    if gradient:
        p = z.softmax(1).scatter_add_(1, index, torch.full_like(index, -1, dtype=z.dtype))
        logits.copy_(p.where(counts.unsqueeze(1), 0))


def _rows(logits: torch.Tensor):
    if logits.is_cuda and kernels.why_not() is None:
        from qlora_engine.kernels.cross_entropy import cross_entropy_

        return cross_entropy_
    return _rows_in_torch


class _Head:
    """The products with a head of ordinary numbers."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        self.matrix = weight.to(dtype)

    def logits(self, hidden: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
        return torch.mm(hidden, self.matrix.T, out=storage)

    def grad_hidden(self, grad: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(grad, self.matrix, out=out)


class _PackedHead:
    """The products with a head in 4 bits, a part of the vocabulary at a time."""

    def __init__(self, w4: NF4Weight, dtype: torch.dtype):
        self.parts = split_rows(w4, SLICE_BYTES // (w4.shape[1] * dtype.itemsize))

    def logits(self, hidden: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
        for part, columns in self._columns():
            storage[:, columns] = ops.linear_nf4(hidden, *part.arguments, part.shape[0])
        return storage

    def grad_hidden(self, grad: torch.Tensor, out: torch.Tensor) -> None:
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for part, columns in self._columns():
            total += ops.linear_nf4_backward(grad[:, columns].contiguous(), *part.arguments, out.shape[1])
        out.copy_(total)

    def _columns(self):
        first = 0
        for part in self.parts:
            yield part, slice(first, first + part.shape[0])
            first += part.shape[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """`apply(hidden, weight, w4, labels, chunk_rows, summed)`: losses, float32 [M], or their sum; correct, int32 [M].

    One of weight and w4 is None: a tensor, or an `NF4Weight`, which has no gradient. A row's gradient is made in
    forward for a factor of 1, and scaled in backward. The weight's is a sum over rows: made in forward as well where
    all rows will have one factor, else in backward from logits computed again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, w4, labels, chunk_rows, summed):
        M, dtype = hidden.shape[0], compute_dtype(hidden)
        wide = hidden.to(dtype)
        head = _Head(weight, dtype) if w4 is None else _PackedHead(w4, dtype)
        vocabulary = (weight if w4 is None else w4).shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        at_once = needs_weight and summed
        losses = torch.empty(M, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(M, dtype=torch.int32, device=hidden.device)
        grad_hidden = torch.empty_like(wide) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        for rows, logits in _chunks_of_logits(wide, head, vocabulary, chunk_rows):
            _rows(logits)(logits, labels[rows], losses[rows], correct[rows], IGNORED, needs_hidden or at_once)
            if needs_hidden:
                head.grad_hidden(logits, grad_hidden[rows])
            if at_once:
                grad_weight += logits.T @ wide[rows]
        ctx.grads = grad_hidden, grad_weight
        ctx.again = (wide, head, labels, chunk_rows) if needs_weight and not summed else None
        ctx.dtypes = hidden.dtype, None if weight is None else weight.dtype
        ctx.mark_non_differentiable(correct)
        return losses.sum() if summed else losses, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if ctx.grads is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass; compute it again")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        factors = grad.reshape(-1, 1)  # float32, of every row or one for all
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factors).to(ctx.dtypes[0])
        if ctx.again is not None:
            wide, head, labels, chunk_rows = ctx.again
            losses, correct = torch.empty_like(grad), torch.empty_like(grad, dtype=torch.int32)
            for rows, logits in _chunks_of_logits(wide, head, grad_weight.shape[0], chunk_rows):
                _rows(logits)(logits, labels[rows], losses[rows], correct[rows], IGNORED, True)
                grad_weight += logits.mul_(factors[rows]).T @ wide[rows]
        elif grad_weight is not None:
            grad_weight.mul_(grad)
        grad_weight = grad_weight if grad_weight is None else grad_weight.to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None, None, None


def _chunks_of_logits(hidden: torch.Tensor, head, vocabulary: int, chunk_rows: int):
    """(rows, their logits) one after another, in memory that all of them share."""
    M = hidden.shape[0]
    storage = hidden.new_empty(min(chunk_rows, M), vocabulary)
    for first in range(0, M, chunk_rows):
        rows = slice(first, min(first + chunk_rows, M))
        yield rows, head.logits(hidden[rows], storage[: rows.stop - first])


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    labels: torch.Tensor,
    chunk_rows: int | None = None,
    *,
    reduction: str = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropies of `hidden @ weight.T`, whose `[M, V]` logits are never whole in memory.

    Products accumulate in float32 and are rounded to the compute dtype; softmax and losses are float32. The gradients
    are made in forward and serve one backward pass. With "none" each row's loss may have a factor of its own in what
    is minimised, which need not be known before backward; a trained weight then takes one more product there.

    Args:
        hidden: float16, bfloat16 or float32 `[M, H]`.
        weight: `[V, H]`, in the compute dtype or rounded to it; or in 4 bits, frozen.
        labels: int64 `[M]`; rows with -100 do not count.
        chunk_rows: rows at a time; default: `rows_at_a_time`.
        reduction: "sum", or "none" for the losses of the rows.

    Returns:
        The sum, float32 `[]`, or the losses, float32 `[M]`, 0 where a row does not count; and int32 `[M]`: 1 where no
        logit is above the label's.

    Raises:
        ValueError: where the shapes do not fit, or the reduction is another.

    >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8)
    >>> total, correct = linear_cross_entropy(hidden, weight, torch.arange(6), chunk_rows=4)
    >>> bool(torch.isclose(total, torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(6)) * 6))
    True
    """
    if (
        hidden.dim() != 2
        or len(weight.shape) != 2
        or hidden.shape[1] != weight.shape[1]
        or labels.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"hidden is {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}; expected "
            "[M, H], [V, H] and [M]"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'none'")
    if chunk_rows is None:
        chunk_rows = rows_at_a_time(hidden.shape[0], weight.shape[0] * compute_dtype(hidden).itemsize)
    dense, w4 = (None, weight) if isinstance(weight, NF4Weight) else (weight, None)
    return _LinearCrossEntropy.apply(hidden, dense, w4, labels, chunk_rows, reduction == "sum")


def rows_at_a_time(rows: int, row_bytes: int) -> int:
    """How many of the rows' logits to hold: what CHUNK_BYTES takes, or half of few rows, not below LEAST_ROWS.

    >>> rows_at_a_time(8192, 2 * 128256), rows_at_a_time(512, 2 * 128256), rows_at_a_time(8, 2 * 128256)
    (512, 256, 256)
    """
    most = CHUNK_BYTES // max(1, row_bytes)
    most = max(1, most // LEAST_ROWS * LEAST_ROWS or most)
    half = -(-rows // (2 * LEAST_ROWS)) * LEAST_ROWS
    return min(most, max(LEAST_ROWS, half))


def causal_lm_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    **inputs,
) -> CausalLoss:
    """The next-token loss of a transformers model with a language-model head, without its logits.

    As `model(input_ids, labels=labels).loss`: each position predicts the next label.

    Args:
        model: a model for which `why_no_causal_loss` is None.
        input_ids: int64 `[B, T]`.
        labels: int64 `[B, T]`, -100 where a token does not count.
        num_items: what the sum is divided by; default: the number of tokens that count.
        inputs: further arguments of the model, such as `attention_mask`.
    """
    total, correct, shifted = _next_token_losses(model, input_ids, labels, inputs, "sum")
    count = (shifted != IGNORED).sum()
    items = count if num_items is None else torch.as_tensor(num_items)
    return CausalLoss(total / items.clamp(min=1), correct.sum(), count)


def sequence_log_probs(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """Log-probability of what is labelled in each sequence, given what is before it: float32 `[B]`, with a graph.

    Args:
        model, input_ids, labels, inputs: as in `causal_lm_loss`.
    """
    losses, _, _ = _next_token_losses(model, input_ids, labels, inputs, "none")
    return -losses.reshape(input_ids.shape).sum(1)


def _next_token_losses(model, input_ids, labels, inputs, reduction):
    """(sum or losses, correct, the labels that the positions predict), all but the sum of [B * T]."""
    hidden = decoder_of(model)(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    head = model.get_output_embeddings()
    weight = head.nf4_weight if isinstance(head, NF4Linear) else head.weight
    losses, correct = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, shifted, reduction=reduction)
    return losses, correct, shifted


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a language model that gives the hidden states its head reads."""
    return getattr(model, model.base_model_prefix)


@contextlib.contextmanager
def decoded_head(model: nn.Module) -> Iterator[None]:
    """Within this context a loss that multiplies with the head's weight itself, as TRL's does, finds numbers there.

    A head in 4 bits is decoded, whole, when the loss asks the model for its head; for several processes, evaluation,
    and models whose loss is not `causal_lm_loss`.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, NF4Linear):
        yield
        return
    model.get_output_embeddings = lambda: types.SimpleNamespace(weight=head.dequantize(), bias=head.bias)
    try:
        yield
    finally:
        del model.get_output_embeddings


def why_no_causal_loss(model: nn.Module) -> str | None:
    """Why `causal_lm_loss` would not be a model's own loss, or None; a few tokens are tried out."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return f"{type(model).__name__} has no decoder under a base_model_prefix"
    if getattr(model, "loss_type", None) != "ForCausalLM":
        return f"{type(model).__name__} computes another loss than the next token's"
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, NF4Linear, TiedNF4Linear) or head.bias is not None:
        return "its head is no plain nn.Linear or NF4Linear without a bias"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__:
        return "something listens to its head"
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device).unsqueeze(0) % head.out_features
    try:
        with torch.no_grad(), evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits.float()
            actual = head(decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state).float()
    except Exception as error:  # a forward that takes other arguments
        return f"a forward of its decoder failed ({' '.join(str(error).split())})"
    if actual.shape != expected.shape or not float((actual - expected).norm()) <= PROBE_BOUND * float(
        expected.norm()
    ):
        return "its logits are not the product of the decoder's output with its head"
    return None
