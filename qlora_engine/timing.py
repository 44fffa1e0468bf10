"""Times functions on a GPU or a CPU; what the benchmarks and `qlora bench` measure with."""

import time
from collections.abc import Callable

import torch

# Read between runs to push everything else out of the L2 (50 MB on an H100). Read, not written: a flush by writing
# leaves dirty lines whose write-back is then charged to what is measured.
FLUSH_BYTES = 128 << 20


class Timer:
    """Times functions on one device, in microseconds.

    On a GPU: CUDA events around single calls, the L2 flushed by reading before each, the median. On a CPU: the best
    of several means over at least `min_seconds`, which other programs on the machine disturb least.
    """

    def __init__(self, device: str, quick: bool = False):
        self.device = device
        self.repeats = (15 if quick else 50) if device == "cuda" else (3 if quick else 7)
        self.min_seconds = 0.02 if quick else 0.08
        self.flush = torch.ones(FLUSH_BYTES // 4, device=device) if device == "cuda" else None
        if device == "cuda":  # an idle card's clocks need a moment to rise
            square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
            for _ in range(1000):  # a quarter of a second
                square @ square
            torch.cuda.synchronize()

    def __call__(self, function: Callable[[], object]) -> float:
        for _ in range(3):
            function()
        return self._cuda(function) if self.device == "cuda" else self._cpu(function)

    def _cuda(self, function) -> float:
        events = []
        for _ in range(self.repeats):
            self.flush.max()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) * 1e3 for begin, end in events)
        return times[len(times) // 2]

    def _cpu(self, function) -> float:
        best = float("inf")
        for _ in range(self.repeats):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < self.min_seconds:
                function()
                count += 1
            best = min(best, (time.perf_counter() - start) / count)
        return best * 1e6

    def graph(self, function: Callable[[], object]) -> float:
        """Like calling, but replaying a CUDA graph of the function: without the host's part."""
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self._cuda(graph.replay)
