"""`adamw_step`: one AdamW step of many parameters on paged state. `gradient_norm`: of all their gradients."""

from collections.abc import Sequence

import torch

from qlora_engine.ops import backend, checks  # noqa: F401  (backend defines the operators)
from qlora_engine.reference.adamw import (
    EIGHT_BIT_STATE,
    HYPERPARAMETERS,
    MASTER_COPY,
    STATE_BLOCK,
    STOCHASTIC_ROUNDING,
    page_bytes,
    page_views,
)

__all__ = [
    "EIGHT_BIT_STATE",
    "HYPERPARAMETERS",
    "MASTER_COPY",
    "PAGE_ELEMENTS",
    "STATE_BLOCK",
    "STOCHASTIC_ROUNDING",
    "adamw_step",
    "gradient_norm",
    "launch_table",
    "page_bytes",
    "page_views",
]

PAGE_ELEMENTS = 65536


@torch.library.register_fake("qlora_engine::adamw_step")
def _(params, grads, steps, memory, pages, cold_pages, table, multiplier, skip, hyper, groups, layouts, seed):
    checks.adamw_step(
        params, grads, steps, memory, pages, cold_pages, table, multiplier, skip, hyper, groups, layouts, seed
    )


@torch.library.register_fake("qlora_engine::gradient_norm")
def _(grads, pages, table):
    checks.gradient_norm(grads, pages, table)
    return pages.new_empty((), dtype=torch.float32)


def launch_table(params: int, groups: int, slabs: int, device: torch.device) -> list[torch.Tensor]:
    """Memory in which the CUDA operators keep what a launch reads: empty on a CPU.

    Args:
        params: number of parameters.
        groups: number of parameter groups.
        slabs: number of slabs.
        device: where the parameters are.

    Returns:
        A list of two uint8 tensors, one in host memory and its copy on the device: pointers and numbers, rewritten
        and uploaded by the operators where they differ from the previous call's.
    """
    if device.type != "cuda":
        return []
    # csrc/cuda/adamw_kernels.h: AdamWTable
    uploaded = 48 * groups + 32 * params + 16 * -(-slabs // 2)
    host = torch.zeros(uploaded, dtype=torch.uint8)
    return [host, torch.zeros(uploaded + 48 * params + 8 * 4096, dtype=torch.uint8, device=device)]


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    steps: torch.Tensor,
    memory: Sequence[torch.Tensor],
    pages: torch.Tensor,
    cold_pages: int,
    table: Sequence[torch.Tensor],
    hyper: Sequence[float],
    groups: Sequence[int],
    layouts: Sequence[int],
    multiplier: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    seed: int = 0,
) -> None:
    """One step of AdamW over all parameters, in one launch, in the order of torch.optim.AdamW's operations.

    Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2; 8-bit state is that of Dettmers et
    al. 2022, "8-bit optimizers via block-wise quantization".

    Args:
        params: `T` tensors of float32, float16 or bfloat16, dense, on one device; updated in place.
        grads: `T` gradients of the same dtype, shape and strides; a parameter without one is left alone.
        steps: float32 `[T]`, steps made so far; those with a gradient are incremented.
        memory: uint8 slabs that hold the pages (csrc/adamw.h has their layout); updated in place. Host memory too,
            where the device can read it.
        pages: int64 `[P, 5]` on the device: parameter, first element, elements, slab, byte. Whole in itself: every
            element of every parameter lies in exactly one page. The rows of host memory come last.
        cold_pages: number of those rows.
        table: what `launch_table` made.
        hyper: 6 numbers a group: lr, beta1, beta2, eps, weight_decay, and 1, or -1 to maximize.
        groups: `T` indices of groups.
        layouts: `T` sums of EIGHT_BIT_STATE, MASTER_COPY and STOCHASTIC_ROUNDING (bfloat16 only).
        multiplier: float32 `[]` on the device that gradients are multiplied by first; None: 1.
        skip: float32 `[]` on the device; anything but 0 makes the step change nothing. None: 0.
        seed: of stochastic rounding.

    Raises:
        RuntimeError: where tensors disagree in number, dtype, size, or device.
    """
    torch.ops.qlora_engine.adamw_step(
        list(params),
        list(grads),
        steps,
        list(memory),
        pages,
        cold_pages,
        list(table),
        multiplier,
        skip,
        list(hyper),
        list(groups),
        list(layouts),
        seed,
    )


def gradient_norm(
    grads: Sequence[torch.Tensor | None], pages: torch.Tensor, table: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The L2 norm of all gradients together.

    Args:
        grads: as for `adamw_step`.
        pages: as for `adamw_step`.
        table: as for `adamw_step`.

    Returns:
        float32 `[]` on the device; NaN or infinity where a gradient holds such a number.
    """
    return torch.ops.qlora_engine.gradient_norm(list(grads), pages, list(table))
