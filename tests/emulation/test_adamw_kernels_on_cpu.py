"""The AdamW kernels' own text, run on a CPU, gives the CPU operator's bits."""

import ctypes

import pytest
import torch

from qlora_engine.ops import adamw as ops
from qlora_engine.ops import backend
from tests.emulation.build import ALIGNED, build, needs_compiler
from tests.emulation.test_cuda_kernels_on_cpu import integer, pointer
from tests.ops.adamw_cases import HYPER, new_gradients, problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of csrc/cuda/kernels.h
pytestmark = [
    needs_compiler,
    pytest.mark.skipif(
        backend.implementation("adamw_step", "cpu") != "compiled", reason="compared with the compiled CPU operator"
    ),
]


class AdamWTensor(ctypes.Structure):
    """AdamWTensor of csrc/cuda/adamw_kernels.h."""

    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("group", ctypes.c_int32),
        ("dtype", ctypes.c_int16),
        ("layout", ctypes.c_int16),
        ("numel", ctypes.c_int64),
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return build(tmp_path_factory, "entry_adamw.cpp", ALIGNED, only="adamw.cpp")


@pytest.fixture(params=[False, True], ids=["rising", "falling"])
def kernels(request, compiled):
    compiled.run_threads_in_falling_order(ctypes.c_bool(request.param))
    return compiled


def tensor_array(params, grads, groups, layouts):
    rows = [
        AdamWTensor(
            p.data_ptr(), None if g is None else g.data_ptr(), group, DTYPES.index(p.dtype), layout, p.numel()
        )
        for p, g, group, layout in zip(params, grads, groups, layouts, strict=True)
    ]
    return (AdamWTensor * len(rows))(*rows)


def emulated_step(kernels, case, multiplier=None, skip=None, seed=0):
    hyper = (ctypes.c_double * len(HYPER))(*HYPER)
    slabs = (ctypes.c_void_p * len(case.memory))(*(s.data_ptr() for s in case.memory))
    error = kernels.run_adamw_step(
        integer(len(case.params)),
        tensor_array(case.params, case.grads, case.groups, case.layouts),
        integer(len(HYPER) // 6),
        hyper,
        integer(len(case.memory)),
        slabs,
        pointer(case.pages),
        integer(len(case.pages) - case.cold_pages),
        integer(case.cold_pages),
        pointer(multiplier),
        pointer(skip),
        pointer(case.steps),
        integer(seed),
        ctypes.c_bool(any(layout & ops.EIGHT_BIT_STATE for layout in case.layouts)),
    )
    assert error == 0


@pytest.mark.parametrize("cold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "layout",
    [
        0,
        ops.EIGHT_BIT_STATE,
        ops.MASTER_COPY,
        ops.EIGHT_BIT_STATE | ops.MASTER_COPY,
        ops.EIGHT_BIT_STATE | ops.STOCHASTIC_ROUNDING,
        ops.STOCHASTIC_ROUNDING,
    ],
)
def test_step(kernels, layout, cold):
    sizes = [1, 257, 5000, 70_001] if cold == 0.5 else [1, 300]
    case = problem(DTYPES, layout, sizes, cold=cold)
    multiplier = torch.tensor(0.5)
    emulated = case.to("cpu")
    for _ in range(2):
        new_gradients(case)
        for mine, theirs in zip(emulated.grads, case.grads, strict=True):
            if mine is not None:
                mine.copy_(theirs)
        case.step(multiplier=multiplier, seed=7)
        emulated_step(kernels, emulated, multiplier, seed=7)
    assert torch.equal(emulated.steps, case.steps)
    for mine, theirs in zip(emulated.params + emulated.memory, case.params + case.memory, strict=True):
        assert torch.equal(mine, theirs)


def test_mixed_bits_and_misaligned_parameters(kernels):
    case = problem([torch.float32, torch.bfloat16], ops.EIGHT_BIT_STATE, [400, 300])
    case.layouts[0] = 0
    rows = case.pages.tolist()
    rows[0][3:] = [3, 0]  # its larger page, in a slab of its own
    case.pages = torch.tensor(rows)
    case.memory.append(torch.zeros(ops.page_bytes(400, 0), dtype=torch.uint8))
    emulated = case.to("cpu")
    emulated.params = [torch.cat([p[:1], p])[1:] for p in emulated.params]
    new_gradients(case)
    emulated.grads = [None if g is None else g.clone() for g in case.grads]
    case.step()
    emulated_step(kernels, emulated)
    for mine, theirs in zip(emulated.params, case.params, strict=True):
        assert torch.equal(mine, theirs)
    for _, _, count, slab, offset in rows[:1]:
        mine, theirs = (ops.page_views(c.memory[slab], offset, count, 0) for c in (emulated, case))
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_skip_changes_nothing(kernels):
    case = problem(DTYPES, 0, [300])
    new_gradients(case)
    before = case.to("cpu")
    emulated_step(kernels, case, skip=torch.tensor(1.0))
    assert torch.equal(case.steps, before.steps)
    for mine, theirs in zip(case.params + case.memory, before.params + before.memory, strict=True):
        assert torch.equal(mine, theirs)


def test_norm(kernels):
    case = problem(DTYPES, 0, [1, 300, 9000, 20_001])
    new_gradients(case)
    array = tensor_array(case.params, case.grads, case.groups, case.layouts)
    norm = torch.zeros(())
    assert kernels.run_gradient_norm(integer(len(case.params)), array, pointer(norm)) == 0
    expected = torch.cat([g.double().view(-1) for g in case.grads if g is not None]).norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
