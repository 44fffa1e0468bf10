"""The empirical Fisher information of weights, and where it is largest."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qlora_engine.models.adapters import evaluating
from qlora_engine.peft.base import MethodError
from qlora_engine.peft.blocks import features
from qlora_engine.peft.parts import first_tensor
from qlora_engine.peft.sparse_delta import Largest

Loss = Callable[[nn.Module, Any], torch.Tensor]


def model_loss(model: nn.Module, sample: Any) -> torch.Tensor:
    """The loss that a transformers model returns for a batch with labels.

    Raises:
        MethodError: where it returns none.
    """
    found = getattr(model(**sample), "loss", None) if isinstance(sample, Mapping) else None
    if found is None:
        raise MethodError(
            "the model returns no loss for a sample; give batches as dicts with labels, or a function: loss=..."
        )
    return found


def singly(batches: Iterable[Any]) -> Iterator[Any]:
    """Samples one by one: the rows of batches that are dicts of tensors, other batches as they are."""
    for batch in batches:
        tensors = list(batch.values()) if isinstance(batch, Mapping) else []
        sizes = {t.shape[0] if isinstance(t, torch.Tensor) and t.dim() else None for t in tensors}
        if len(sizes) == 1 and None not in sizes:
            for row in range(sizes.pop()):
                yield {name: tensor[row : row + 1] for name, tensor in batch.items()}
        else:
            yield batch


def largest_fisher(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Any], count: int, loss: Loss, memory: int
) -> dict[str, torch.Tensor]:
    """Positions of the weights with the largest `F = mean over samples of (d loss / d W)^2`.

    Gradients are taken with respect to the weight as it acts, decoded where it is in 4 bits. Layers are visited in
    groups whose F fits `memory`, each with a pass over all samples of its own; only the `count` largest so far
    are kept between groups. Modules are in evaluation mode meanwhile.

    Args:
        model: the model.
        paths: linear layers.
        batches: samples, or batches of them.
        count: how many positions.
        loss: of the model for one sample.
        memory: bytes for F; a single layer may need more.

    Returns:
        Path -> ascending int64 positions in the flattened `[out, in]`; layers without any are left out.

    Raises:
        MethodError: where there is no sample, or no layer has a finite gradient that is not zero.
    """
    largest = Largest(count)
    for group in _groups(model, paths, memory):
        for path, fisher in _fisher(model, group, batches, loss).items():
            if not torch.isfinite(fisher).all():
                raise MethodError(f"the gradient of {path} has NaN or infinity; the samples or the model are broken")
            largest.add(path, fisher)
    found = largest.positions()
    if not found:
        raise MethodError("no gradient reaches the layers that were chosen; do the samples have labels?")
    return found


def _groups(model: nn.Module, paths: Sequence[str], memory: int) -> list[list[str]]:
    groups, used = [[]], 0
    for path in paths:
        rows, columns = features(model.get_submodule(path))
        size = 4 * rows * columns
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += size
    return groups


def _fisher(model: nn.Module, paths: list[str], batches: Sequence[Any], loss: Loss) -> dict[str, torch.Tensor]:
    sums = [_SquaredGradient(model.get_submodule(path)) for path in paths]
    samples = 0
    with _evaluating(model), contextlib.ExitStack() as stack:
        for total in sums:
            stack.callback(total.layer.register_forward_hook(total, with_kwargs=True).remove)
        for sample in singly(batches):
            samples += 1
            with torch.enable_grad():
                value = loss(model, sample)
            if not value.requires_grad:
                raise MethodError("the loss does not depend on the layers that were chosen")
            value.backward()
            for total in sums:
                total.finish()
    if not samples:
        raise MethodError("there is no sample to take the Fisher information of")
    return {path: total.fisher.div_(samples) for path, total in zip(paths, sums, strict=True)}


class _SquaredGradient:
    """Sums a weight's squared gradients, one sample after another; a forward hook of its layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        columns, rows = features(layer)
        device = layer.weight.device
        self.fisher = torch.zeros(rows, columns, device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)  # the base is frozen
        self.sample: torch.Tensor | None = None
        self.calls = self.seen = 0

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return _Tap.apply(output, self.anchor, first_tensor(args, kwargs).detach(), self)

    def add(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """One call's share of the sample's gradient; a layer may be called several times."""
        self.seen += 1
        new = gradient.reshape(-1, gradient.shape[-1]).float().T @ x.reshape(-1, x.shape[-1]).float()
        self.sample = new if self.sample is None else self.sample.add_(new)
        if self.seen == self.calls:
            self.finish()

    def finish(self) -> None:
        """Adds the sample; where its gradient did not reach every call, at its end."""
        if self.sample is not None:
            self.fisher.addcmul_(self.sample, self.sample)
        self.sample, self.calls, self.seen = None, 0, 0


class _Tap(torch.autograd.Function):
    """Hands a layer's input and the gradient of its output to a `_SquaredGradient`; changes nothing."""

    @staticmethod
    def forward(ctx, output, anchor, x, total):
        ctx.x, ctx.total = x, total
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.total.add(ctx.x, gradient)
        return gradient, None, None, None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:  # other methods' parameters collect no gradients meanwhile
        param.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for param in trained:
            param.requires_grad_(True)
