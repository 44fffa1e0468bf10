"""The state of many parameters as pages in a few slabs of memory, each slab on the device or in host memory."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qlora_engine.ops import adamw as ops
from qlora_engine.ops import host_memory

BACKENDS = ("auto", "managed", "pinned", "device")
ALIGNMENT = 256
MEBIBYTE = 1 << 20
SMALLEST_SLAB, LARGEST_SLAB = 2 * MEBIBYTE, 32 * MEBIBYTE


@dataclass(frozen=True)
class Page:
    """Part of one parameter's state: elements [first, first + count), at a byte of a slab."""

    parameter: int
    first: int
    count: int
    slab: int
    offset: int


def check_backend(backend: str, budget: int | None, device: torch.device) -> None:
    """Raises ValueError for a backend that does not exist, or does not go with the budget or the device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend in ("managed", "pinned") and device.type != "cuda":
        raise ValueError(f"backend={backend!r} is for CUDA parameters; these are on {device}: leave backend='auto'")
    if backend == "device" and budget is not None:
        raise ValueError(
            f"backend='device' keeps all state on the device, but device_budget={budget} bounds it; give one of them"
        )
    if backend == "managed" and not host_memory.concurrent_managed_access(device):
        raise ValueError(
            f"backend='managed' needs a device that shares managed memory with the host while it works; {device} "
            "does not (concurrentManagedAccess is 0): use backend='pinned', or 'auto'"
        )


class Arena:
    """Pages of optimizer state.

    Pages of at most 65,536 elements are packed one behind the other into slabs of 2 to 32 MiB, so that parameters
    smaller than a page share a slab too. The first slabs, up to the budget, are device memory. The others are host
    memory that kernels stream across the bus in place: nothing migrates between steps.

    Args:
        device: where the parameters are.
        budget: bytes of state on the device; None: as much as fits.
        backend: "managed", "pinned", "device" (no host memory), or "auto": managed where host and device may use
            such memory at the same time, else pinned.
    """

    def __init__(self, device: torch.device, budget: int | None, backend: str):
        check_backend(backend, budget, device)
        self.device, self.budget, self.backend = device, budget, backend
        self.pages: list[Page] = []
        self.layouts: list[int] = []
        self.slabs: list[torch.Tensor] = []
        self.hot: list[bool] = []
        self.page_table = torch.empty(0, 5, dtype=torch.int64, device=device)
        self.cold_pages = 0

    def extend(self, numels: Sequence[int], layouts: Sequence[int]) -> None:
        """Adds zeroed state for more parameters, in slabs of their own.

        Args:
            numels: elements of each parameter.
            layouts: its layout, a sum of the bits in `qlora_engine.ops.adamw`.
        """
        base = len(self.layouts)
        pieces = [
            (base + i, first, min(ops.PAGE_ELEMENTS, numel - first), layout)
            for i, (numel, layout) in enumerate(zip(numels, layouts, strict=True))
            for first in range(0, numel, ops.PAGE_ELEMENTS)
        ]
        sizes = [-(-ops.page_bytes(count, layout) // ALIGNMENT) * ALIGNMENT for _, _, count, layout in pieces]
        # few slabs, but small enough that a budget is met to about a sixteenth
        limit = min(max(sum(sizes) // 16, SMALLEST_SLAB), LARGEST_SLAB)
        slab_sizes: list[int] = []
        for (parameter, first, count, _), size in zip(pieces, sizes, strict=True):
            if not slab_sizes or slab_sizes[-1] + size > limit:
                slab_sizes.append(0)
            self.pages.append(Page(parameter, first, count, len(self.slabs) + len(slab_sizes) - 1, slab_sizes[-1]))
            slab_sizes[-1] += size
        for size in slab_sizes:
            hot = self._wants_device(sum(s.numel() for s, h in zip(self.slabs, self.hot, strict=True) if h) + size)
            slab, hot = self._allocate(size, hot)
            self.slabs.append(slab)
            self.hot.append(hot)
        self.layouts.extend(layouts)
        self._write_page_table()

    def _wants_device(self, total: int) -> bool:
        return self.budget is None or total <= self.budget

    def _allocate(self, size: int, hot: bool) -> tuple[torch.Tensor, bool]:
        """Zeroed memory, and whether it is the device's."""
        if self.device.type != "cuda":
            return torch.zeros(size, dtype=torch.uint8, device=self.device), True
        if hot:
            try:
                return torch.zeros(size, dtype=torch.uint8, device=self.device), True
            except torch.OutOfMemoryError:
                if self.backend == "device":
                    raise
                warnings.warn(
                    f"the device has no room for {size} more bytes of optimizer state; the rest lies in host memory. "
                    "Give device_budget to say how much stays on the device.",
                    stacklevel=4,
                )
                self.budget = sum(s.numel() for s, h in zip(self.slabs, self.hot, strict=True) if h)
        return host_memory.host_slab(size, self.device, self.uses_managed_memory()), False

    def uses_managed_memory(self) -> bool:
        """Whether host memory is managed memory rather than pinned memory."""
        if self.backend == "auto":
            return host_memory.concurrent_managed_access(self.device)
        return self.backend == "managed"

    def _write_page_table(self) -> None:
        hot = [p for p in self.pages if self.hot[p.slab]]
        cold = [p for p in self.pages if not self.hot[p.slab]]
        rows = [(p.parameter, p.first, p.count, p.slab, p.offset) for p in hot + cold]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
        self.page_table, self.cold_pages = table.to(self.device), len(cold)

    @property
    def device_bytes(self) -> int:
        """Bytes of state on the parameters' device."""
        return sum(s.numel() for s, h in zip(self.slabs, self.hot, strict=True) if h)

    @property
    def host_bytes(self) -> int:
        """Bytes of state in host memory."""
        return sum(s.numel() for s, h in zip(self.slabs, self.hot, strict=True) if not h)

    def rebalance(self, budget: int | None) -> None:
        """Moves slabs until the first ones, up to a new budget, are on the device.

        One slab moves at a time, and those that leave the device go first, so that at most one slab exists twice.

        Args:
            budget: bytes of state on the device; None: as much as fits.
        """
        check_backend(self.backend, budget, self.device)
        self.budget = budget
        if self.device.type != "cuda":
            return
        wanted, total = [], 0
        for slab in self.slabs:
            wanted.append(self._wants_device(total + slab.numel()))
            total += slab.numel() if wanted[-1] else 0
        leaving = [i for i, want in enumerate(wanted) if self.hot[i] and not want]
        coming = [i for i, want in enumerate(wanted) if want and not self.hot[i]]
        try:
            for i in leaving + coming:
                slab, hot = self._allocate(self.slabs[i].numel(), wanted[i])
                if hot != self.hot[i]:
                    host_memory.copy_bytes(self.slabs[i], slab)
                    self.slabs[i], self.hot[i] = slab, hot
                if hot != wanted[i]:
                    break  # the device is full: no later slab fits either
        finally:
            self._write_page_table()

    def read(self) -> Iterator[tuple[Page, dict[str, torch.Tensor]]]:
        """Every page with copies of its parts in CPU memory (`ops.page_views`), a slab at a time."""
        for page, views, _ in self._staged():
            yield page, views

    def write(self, parts: dict[int, dict[str, torch.Tensor]]) -> None:
        """Overwrites the state of parameters.

        Args:
            parts: for each parameter, flat CPU tensors of the names and dtypes that its layout has; scales of 8-bit
                state one for every 256 elements.
        """
        for page, views, touched in self._staged(write=True):
            if page.parameter not in parts:
                continue
            touched.append(page)
            for name, view in views.items():
                scale = name.endswith("_absmax")
                first = page.first // ops.STATE_BLOCK if scale else page.first
                count = -(-page.count // ops.STATE_BLOCK) if scale else page.count
                view.zero_()[:count] = parts[page.parameter][name][first : first + count]

    def _staged(self, write: bool = False):
        for index, slab in enumerate(self.slabs):
            staged = torch.empty(slab.numel(), dtype=torch.uint8)
            host_memory.copy_bytes(slab, staged)
            touched: list[Page] = []
            for page in (p for p in self.pages if p.slab == index):
                layout = self.layouts[page.parameter]
                yield page, ops.page_views(staged, page.offset, page.count, layout), touched
            if write and touched:
                host_memory.copy_bytes(staged, slab)
