"""Parameters, gradients and paged state for tests of `adamw_step`."""

from dataclasses import dataclass, field

import torch

from qlora_engine.ops import adamw as ops

HYPER = [1e-2, 0.9, 0.999, 1e-8, 1e-2, 1.0, 3e-3, 0.8, 0.95, 1e-6, 0.0, -1.0]  # two groups, the second maximizes
SIZES = [1, 3, 255, 256, 257, 5000, 65536, 70_001]


@dataclass
class Problem:
    """Everything that `adamw_step` takes."""

    params: list
    grads: list
    steps: torch.Tensor
    memory: list
    pages: torch.Tensor
    cold_pages: int
    groups: list
    layouts: list
    table: list = field(default_factory=list)

    def step(self, hyper=HYPER, operator=ops.adamw_step, **options):
        operator(
            self.params,
            self.grads,
            self.steps,
            self.memory,
            self.pages,
            self.cold_pages,
            self.table,
            hyper,
            self.groups,
            self.layouts,
            **options,
        )

    def to(self, device):
        def move(t):
            return None if t is None else t.detach().clone().to(device)

        return Problem(
            [move(p) for p in self.params],
            [move(g) for g in self.grads],
            move(self.steps),
            [move(s) for s in self.memory],
            move(self.pages),
            self.cold_pages,
            self.groups,
            self.layouts,
            ops.launch_table(len(self.params), len(HYPER) // 6, len(self.memory), torch.device(device)),
        )


def problem(dtypes, layout=0, sizes=SIZES, slabs=3, cold=0.5):
    """Parameters of every size in every dtype, every fifth without a gradient; pages dealt out to several slabs.

    Memory is full of nonsense but for the state itself, which is zero, and the master copies.
    """
    torch.manual_seed(len(sizes))
    shapes = [(size, dtype) for size in sizes for dtype in dtypes]
    params = [torch.randn(size).to(dtype) for size, dtype in shapes]
    layouts = [layout if dtype == torch.bfloat16 else layout & ~ops.STOCHASTIC_ROUNDING for _, dtype in shapes]
    rows, ends = [], [0] * slabs
    for index, param in enumerate(params):
        for first in range(0, param.numel(), ops.PAGE_ELEMENTS):
            count = min(ops.PAGE_ELEMENTS, param.numel() - first)
            slab = len(rows) % slabs
            rows.append((index, first, count, slab, ends[slab]))
            ends[slab] += -(-ops.page_bytes(count, layouts[index]) // 256) * 256
    memory = [torch.full((end,), 0xFF, dtype=torch.uint8) for end in ends]
    for index, first, count, slab, offset in rows:
        views = ops.page_views(memory[slab], offset, count, layouts[index])
        for name, view in views.items():
            view.zero_()
            if name == "master":
                view[:count] = params[index][first : first + count].float()
    return Problem(
        params,
        [None if i % 5 == 4 else torch.zeros_like(p) for i, p in enumerate(params)],
        torch.zeros(len(params)),
        memory,
        torch.tensor(rows, dtype=torch.int64),
        int(len(rows) * cold),
        [i % 2 for i in range(len(params))],
        layouts,
    )


def new_gradients(problem):
    """Other gradients over six orders of magnitude, some of them zero."""
    for i, grad in enumerate(problem.grads):
        if grad is not None:
            values = torch.randn(grad.numel()) * torch.logspace(-6, 0, grad.numel())
            values[:: 7 + i] = 0
            grad.copy_(values)
