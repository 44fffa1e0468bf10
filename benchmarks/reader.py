"""The least time to read so many bytes: a kernel that only reads, the best of several shapes of launch."""

import torch
import triton
import triton.language as tl


@triton.jit
def _read(words, count, never, BLOCK: tl.constexpr):
    step = tl.num_programs(0) * BLOCK
    seen = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(tl.program_id(0) * BLOCK, count, step, loop_unroll_factor=4):
        at = start + tl.arange(0, BLOCK)
        seen ^= tl.load(words + at, mask=at < count, other=0)
    total = tl.sum(seen)
    if total == 0x5EED5EED:  # so that the loads are not dropped
        tl.store(never, total)


# thread blocks a multiprocessor, elements that a block reads at a time, warps
SHAPES = [(1, 4096, 8), (2, 2048, 4), (2, 4096, 8), (4, 1024, 4), (4, 2048, 4), (8, 1024, 4), (16, 512, 4)]


def read_microseconds(timer, nbytes: int) -> float:
    """Microseconds to read `nbytes` of device memory, with `timer` (harness.Timer on a GPU)."""
    words = torch.randint(1, 1 << 30, (nbytes // 4,), dtype=torch.int32, device="cuda")
    never = torch.zeros(1, dtype=torch.int32, device="cuda")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return min(
        timer(lambda b=b, n=n, w=w: _read[(processors * b,)](words, words.numel(), never, BLOCK=n, num_warps=w))
        for b, n, w in SHAPES
    )
