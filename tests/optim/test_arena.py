"""Where state lies: pages, slabs, budgets, moves. What no budget may change is the numbers."""

import gc
import itertools
import os

import pytest
import torch

from qlora_engine.ops import adamw as ops
from qlora_engine.ops import host_memory
from qlora_engine.optim import PagedAdamW
from qlora_engine.optim import arena as arena_module
from qlora_engine.optim.arena import Arena

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20
SHAPES = [(700, 900), (16, 4096), (4096, 16), (5,), (2000, 300)]


@pytest.fixture
def small_slabs(monkeypatch):
    """Slabs of about 1 MiB, so that a few megabytes of state have many."""
    monkeypatch.setattr(arena_module, "SMALLEST_SLAB", MEBIBYTE)


@pytest.mark.parametrize("layout", [0, ops.EIGHT_BIT_STATE, ops.MASTER_COPY, ops.EIGHT_BIT_STATE | ops.MASTER_COPY])
def test_pages_cover_every_element_once_and_do_not_overlap(small_slabs, layout):
    numels = [1, 255, 256, 65_535, 65_536, 65_537, 300_000, 0, 4096]
    arena = Arena(CPU, None, "auto")
    arena.extend(numels[:4], [layout] * 4)
    arena.extend(numels[4:], [layout] * 5)
    elements = dict.fromkeys(range(len(numels)), 0)
    used: dict[int, list[tuple[int, int]]] = {}
    for page in arena.pages:
        assert page.first == elements[page.parameter]
        assert 0 < page.count <= ops.PAGE_ELEMENTS
        elements[page.parameter] += page.count
        size = ops.page_bytes(page.count, layout)
        assert page.offset % 256 == 0
        assert page.offset + size <= arena.slabs[page.slab].numel()
        used.setdefault(page.slab, []).append((page.offset, page.offset + size))
    assert list(elements.values()) == numels
    for ranges in used.values():
        ranges.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert len(arena.slabs) >= 2
    assert arena.page_table.tolist() == [[p.parameter, p.first, p.count, p.slab, p.offset] for p in arena.pages]


def test_small_parameters_share_slabs():
    """448 LoRA factors of 65,536 elements: no slab for each of them, and at most an eighth of a per mille wasted."""
    arena = Arena(CPU, None, "auto")
    arena.extend([65_536] * 64 + [300] * 64, [0] * 128)
    assert len(arena.slabs) <= 20
    assert sum(s.numel() for s in arena.slabs) <= (65_536 * 64 + 512 * 64) * 8


def run(budget, backend="auto", steps=4, dtype=torch.float32, rebalance=None, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in SHAPES]
    optimizer = PagedAdamW(params, lr=1e-2, device_budget=budget, backend=backend, **options)
    for step in range(steps):
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if rebalance:
            optimizer.rebalance(rebalance[step])
    return params, optimizer


def host_backends():
    managed = torch.cuda.is_available() and host_memory.concurrent_managed_access(torch.device("cuda"))
    return ["managed", "pinned"] if managed else ["pinned"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"dtype": torch.bfloat16, "master_weights": True}])
def test_every_budget_and_backend_gives_the_same_bits(small_slabs, options):
    expected, everything = run(None, **options)
    total = everything.device_bytes
    assert everything.host_bytes == 0
    for backend in host_backends():
        for budget in (0, total // 3, total - 1, total):
            params, optimizer = run(budget, backend, **options)
            assert optimizer.device_bytes <= budget
            assert optimizer.device_bytes + optimizer.host_bytes == total
            assert (optimizer.host_bytes > 0) == (budget < total)
            for mine, theirs in zip(params, expected, strict=True):
                assert torch.equal(mine, theirs), (backend, budget)


@pytest.mark.gpu
def test_moving_between_steps_changes_no_number(small_slabs):
    expected, everything = run(None)
    total = everything.device_bytes
    for backend in host_backends():
        params, optimizer = run(0, backend, rebalance=[total // 2, 0, None, total // 4])
        for mine, theirs in zip(params, expected, strict=True):
            assert torch.equal(mine, theirs)
        assert 0 < optimizer.device_bytes <= total // 4


@pytest.mark.gpu
def test_checkpoints_go_between_budgets(small_slabs):
    params, paged = run(0, host_backends()[0], bits=8)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = PagedAdamW(others, lr=1e-2, bits=8)
    resumed.load_state_dict(paged.state_dict())
    assert resumed.host_bytes == 0
    for mine, theirs in zip(params, others, strict=True):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    paged.step()
    resumed.step()
    for mine, theirs in zip(params, others, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_deleting_gives_the_device_memory_back(small_slabs):
    params, optimizer = run(None)
    allocated, state = torch.cuda.memory_allocated(), optimizer.device_bytes
    del optimizer
    gc.collect()
    assert torch.cuda.memory_allocated() <= allocated - state
    del params


@pytest.mark.gpu
def test_deleting_gives_the_host_memory_back():
    """Resident memory of the process: sixteen times 64 MiB must not pile up."""

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    device = torch.device("cuda")
    for backend in host_backends():
        host_memory.host_slab(64 * MEBIBYTE, device, backend == "managed")
        before = resident()
        for _ in range(16):
            host_memory.host_slab(64 * MEBIBYTE, device, backend == "managed")
        assert resident() - before < 256 * MEBIBYTE


@pytest.mark.gpu
def test_a_full_device_spills_with_a_warning(small_slabs, monkeypatch):
    """The allocator's error stands in for a full card, which no test may bring about."""
    zeros, calls = torch.zeros, []

    def full_after_two(*size, **options):
        if options.get("dtype") == torch.uint8 and options.get("device", CPU) != CPU and size[0] >= MEBIBYTE // 2:
            calls.append(size)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("full")
        return zeros(*size, **options)

    expected, _ = run(None)
    monkeypatch.setattr(torch, "zeros", full_after_two)
    with pytest.warns(UserWarning, match="the rest lies in host memory"):
        params, optimizer = run(None)
    assert optimizer.device_bytes > 0
    assert optimizer.host_bytes > 0
    for mine, theirs in zip(params, expected, strict=True):
        assert torch.equal(mine, theirs)
    calls.clear()
    with pytest.raises(torch.OutOfMemoryError):
        run(None, backend="device")


@pytest.mark.gpu
def test_memory_pressure_halves_the_state_on_the_device(small_slabs, monkeypatch):
    retries = [0, 0, 0, 1, 1, 1, 1, 1]
    monkeypatch.setattr(
        torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": retries.pop(0) if len(retries) > 1 else 1}
    )
    expected, everything = run(None)
    params, optimizer = run(None, steps=4, spill_under_pressure=True)
    assert 0 < optimizer.device_bytes <= everything.device_bytes // 2
    for mine, theirs in zip(params, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_a_forked_child_exits_cleanly(small_slabs):
    """The child inherits the tensors, but has no context to give their memory back to."""
    params, optimizer = run(0, host_backends()[0])
    child = os.fork()
    if child == 0:
        del optimizer
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_several_devices():
    expected, _ = run(None)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    params = [torch.nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(params)]
    optimizer = PagedAdamW(params, lr=1e-2, device_budget=0)
    for step in range(4):
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, device="cuda").to(p.device)
        optimizer.step()
    for mine, theirs in zip(params, expected, strict=True):
        assert torch.equal(mine.to("cuda"), theirs)


def test_on_a_cpu_a_budget_means_nothing():
    weight = torch.nn.Parameter(torch.ones(300))
    weight.grad = torch.ones(300)
    optimizer = PagedAdamW([weight], device_budget=0)
    optimizer.step()
    optimizer.rebalance(100)
    optimizer.step()
    assert optimizer.host_bytes == 0
    with pytest.raises(ValueError, match="device_budget is -1"):
        optimizer.rebalance(-1)
