"""Hard-concrete gates (Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization").

    s = sigmoid(log u - log(1 - u) + a)          u uniform in (0, 1); without noise s = sigmoid(a)
    z = min(1, max(0, s (high - low) + low))     low < 0 < 1 < high: z is 0 and 1 with a probability above zero
    P(z > 0) = sigmoid(a - log(-low / high))

A gate's noise is drawn from a seed, so that gradient checkpointing and backward see the gates of the forward pass,
without keeping them. A gate at an infinite location is 1 or 0, gets no gradient, and no step moves it.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from qlora_engine.peft.parts import Part


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The interval that s is stretched to before it is cut to [0, 1]."""

    low: float
    high: float

    @property
    def shift(self) -> float:
        """The location a at which a gate is open with probability one half."""
        return math.log(-self.low / self.high)


@torch.library.custom_op("qlora_engine::logistic_noise", mutates_args=())
def logistic_noise(like: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """`log u - log(1 - u)` of the shape and device of `like`, float32; `seed` is int64 `[]` on the CPU.

    An operator, so that a compiled model draws new noise from a new seed without being compiled again.
    """
    generator = torch.Generator(like.device).manual_seed(int(seed))
    return torch.rand(like.shape, generator=generator, device=like.device).logit_(1e-6)


@logistic_noise.register_fake
def _(like, seed):
    return torch.empty(like.shape, device=like.device)


def gates(a: torch.Tensor, stretch: Stretch, seed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """z and dz/da, both of the shape of `a`; without a seed there is no noise."""
    if seed is not None:
        a = a + logistic_noise(a, seed)
    s = torch.sigmoid(a)
    wide = s * (stretch.high - stretch.low) + stretch.low
    inside = (wide > 0) & (wide < 1)
    return wide.clamp_(0, 1), s * (1 - s) * (stretch.high - stretch.low) * inside


class GatedDelta(Part):
    """Adds `x (z_group z w).T` to a linear layer's output: a dense change w with a gate for each entry.

    In training mode gates are random, in evaluation mode and once they are fixed they are not.

    Attributes:
        fixed: whether it has been decided which entries may change; their gates are at +inf, all others at -inf.

    Args:
        shape: (out, in) of the change.
        open_at: location a of a gate at the start.
        stretch: interval of the gates.
        group: location of the gate that the whole change shares, float32 `[]`; None: there is none.
        seeds: of the noise of this part's gates and of the group's, at the start; `draw` moves them on.
        device: of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        open_at: float,
        stretch: Stretch,
        group: nn.Parameter | None,
        seeds: tuple[int, int],
        device: torch.device,
    ):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape, device=device))
        self.gate = nn.Parameter(torch.full(shape, float(open_at), device=device))
        self.group = group
        self.stretch, self.fixed = stretch, False
        self.first_seeds = torch.tensor(seeds)
        self.seeds = self.first_seeds.clone()  # no buffer: on the CPU always, where reading it does not wait

    def draw(self, step: int) -> None:
        """Makes the noise that of another step."""
        self.seeds.copy_(self.first_seeds + step)

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seeds = self.seeds.unbind() if self.training and not self.fixed else (None, None)
        return y + _GatedLinear.apply(x.to(y.dtype), self.delta, self.gate, self.group, self.stretch, *seeds)

    def expected_open(self) -> torch.Tensor:
        """Expected number of open gates, `sum P(z > 0)` times the group's probability; differentiable."""
        count = _ExpectedOpen.apply(self.gate, self.stretch.shift)
        return count if self.group is None else count * torch.sigmoid(self.group - self.stretch.shift)

    @torch.no_grad()
    def change(self) -> torch.Tensor:
        """The change in evaluation mode, float32 `[out, in]`."""
        found = gates(self.gate, self.stretch, None)[0] * self.delta
        return found if self.group is None else found * gates(self.group, self.stretch, None)[0]

    @torch.no_grad()
    def fix(self, kept: torch.Tensor | None) -> None:
        """Leaves the entries at the flat positions `kept` (None: none) with their gated values, all others at zero.

        A gate that is shared must be opened afterwards.
        """
        self.delta.copy_(self.change())
        self.gate.fill_(-torch.inf)
        if kept is not None:
            self.gate.view(-1)[kept.to(self.gate.device)] = torch.inf
        self.fixed = True
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Zeroes the entries that are not kept: an optimizer's momentum moves them without a gradient."""
        self.delta.masked_fill_(self.gate < 0, 0.0)

    def kept(self) -> torch.Tensor:
        """Ascending flat positions of the entries that were kept, int64, once they are fixed."""
        return (self.gate.detach() > 0).flatten().nonzero().flatten()


class _ExpectedOpen(torch.autograd.Function):
    """Sum of sigmoids that keeps nothing but its argument."""

    @staticmethod
    def forward(ctx, a, shift):
        ctx.save_for_backward(a)
        ctx.shift = shift
        return torch.sigmoid(a - shift).sum()

    @staticmethod
    def backward(ctx, gradient):
        s = torch.sigmoid(ctx.saved_tensors[0] - ctx.shift)
        return gradient * s * (1 - s), None


class _GatedLinear(torch.autograd.Function):
    """`x (z_group z w).T`; the gates and the change are computed again in backward."""

    @staticmethod
    def forward(ctx, x, delta, gate, group, stretch, seed, group_seed):
        # copies: a step may move the seeds on before backward
        ctx.save_for_backward(x, delta, gate, group, *(s if s is None else s.clone() for s in (seed, group_seed)))
        ctx.stretch = stretch
        z, _ = gates(gate, stretch, seed)
        change = z.mul_(delta)
        if group is not None:
            change *= gates(group, stretch, group_seed)[0]
        return F.linear(x, change.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        x, delta, gate, group, seed, group_seed = ctx.saved_tensors
        z, slope = gates(gate, ctx.stretch, seed)
        z_group, slope_group = (1.0, None) if group is None else gates(group, ctx.stretch, group_seed)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ (z * delta * z_group).to(gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_change = (rows.T @ x.reshape(-1, x.shape[-1])).to(delta.dtype)
        of_gate = of_change * delta
        of_group = None if group is None else (of_gate * z).sum() * slope_group
        return of_x, of_change * z * z_group, of_gate.mul_(slope).mul_(z_group), of_group, None, None, None
