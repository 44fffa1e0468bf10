"""`adamw_step` and `gradient_norm`: compiled against reference, GPU against CPU, and against torch.optim.AdamW."""

import pytest
import torch
from torch.library import opcheck

from qlora_engine.ops import adamw as ops
from qlora_engine.ops import backend, host_memory
from qlora_engine.ops.schema import OPTIMIZER_SCHEMAS
from qlora_engine.quantization.codebook import dynamic_map, unsigned_dynamic_map
from qlora_engine.reference import adamw as reference
from tests.numerics import assert_close
from tests.ops.adamw_cases import HYPER, new_gradients, problem

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "32-bit": 0,
    "8-bit": ops.EIGHT_BIT_STATE,
    "master": ops.MASTER_COPY,
    "8-bit, master": ops.EIGHT_BIT_STATE | ops.MASTER_COPY,
    "stochastic": ops.STOCHASTIC_ROUNDING,
    "8-bit, stochastic": ops.EIGHT_BIT_STATE | ops.STOCHASTIC_ROUNDING,
}
needs_compiled = pytest.mark.skipif(
    backend.implementation("adamw_step", "cpu") != "compiled", reason="compares the compiled CPU operator"
)


def reference_step(params, grads, steps, memory, pages, cold, table, hyper, groups, layouts, **options):
    order = ("multiplier", "skip", "seed")
    values = {"multiplier": None, "skip": None, "seed": 0, **options}
    multiplier, skip, seed = (values[name] for name in order)
    arguments = (params, grads, steps, memory, pages, cold, table, multiplier, skip, hyper, groups, layouts, seed)
    backend.reference_operator("adamw_step")(*arguments)


def copy_gradients(source, *targets):
    for target in targets:
        for mine, theirs in zip(target.grads, source.grads, strict=True):
            if mine is not None:
                mine.copy_(theirs)


def assert_same(case, twin):
    """Parameters, state and steps are the same bits."""
    one, other = ([*c.params, *c.memory, c.steps] for c in (case, twin))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def moments(case):
    """exp_avg and exp_avg_sq of every page as float32, decoded where they are 8-bit."""
    found = []
    for parameter, _, count, slab, offset in case.pages.tolist():
        views = ops.page_views(case.memory[slab].cpu(), offset, count, case.layouts[parameter])
        for name in ("exp_avg", "exp_avg_sq"):
            values = views[name]
            if values.dtype == torch.uint8:
                values = reference.decode_state(values, views[f"{name}_absmax"], name == "exp_avg")
            found.append(values[:count])
    return found


@needs_compiled
@pytest.mark.parametrize("name", LAYOUTS)
def test_cpu_equals_the_reference(name):
    case = problem(DTYPES, LAYOUTS[name])
    twin = case.to("cpu")
    multiplier = torch.tensor(0.5)
    for step in range(3):
        new_gradients(case)
        copy_gradients(case, twin)
        before = [p.clone() for p in case.params]
        case.step(multiplier=multiplier, seed=3)
        twin.step(operator=reference_step, multiplier=multiplier, seed=3)
        for old, mine, theirs in zip(before, case.params, twin.params, strict=True):
            moved = (theirs.float() - old.float()).abs().max()
            # an ulp of the parameter, and of its step; a whole ulp of 16 bits where rounding goes the other way
            ulp = torch.finfo(mine.dtype).eps * old.float().abs().max()
            assert (mine.float() - theirs.float()).abs().max() <= ulp + 1e-5 * moved, step
            assert (mine != theirs).float().mean() <= 0.05 or mine.numel() < 300
        if LAYOUTS[name] & ops.EIGHT_BIT_STATE == 0:
            for mine, theirs in zip(moments(case), moments(twin), strict=True):
                assert_close("moments", mine, theirs, 1e-6)
        else:  # a moment that lies between two codes may take the other one
            for mine, theirs in zip(moments(case), moments(twin), strict=True):
                assert (mine != theirs).float().mean() <= 0.02 or mine.numel() < 300
        # differences do not add up
        twin = case.to("cpu")
    assert torch.equal(case.steps, torch.tensor([0.0 if g is None else 3.0 for g in case.grads]))


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gpu_equals_cpu(name, cold):
    """The same moments, bit for bit; parameters to their last bit. The rows of host memory come last in the table."""
    case = problem(DTYPES, LAYOUTS[name], cold=cold)
    gpu = case.to("cuda")
    multiplier = torch.tensor(0.5)
    for _ in range(3):
        new_gradients(case)
        copy_gradients(case, gpu)
        case.step(multiplier=multiplier, seed=3)
        gpu.step(multiplier=multiplier.cuda(), seed=3)
        for mine, theirs in zip(gpu.memory, case.memory, strict=True):
            if LAYOUTS[name] & ops.MASTER_COPY == 0:
                assert torch.equal(mine.cpu(), theirs)
        for mine, theirs in zip(gpu.params, case.params, strict=True):
            eps = torch.finfo(mine.dtype).eps
            torch.testing.assert_close(mine.cpu(), theirs, rtol=eps, atol=1e-8)
            assert (mine.cpu() != theirs).float().mean() <= 0.01 or mine.numel() < 300
        gpu = case.to("cuda")
    assert torch.equal(gpu.steps.cpu(), case.steps)


def test_one_parameter_equals_torch(device):
    weight = torch.nn.Parameter(torch.randn(70_001, device=device))
    case = problem([torch.float32], sizes=[70_001]).to(device)
    case.params[0].copy_(weight.detach())
    theirs = torch.optim.AdamW([weight], lr=HYPER[0], weight_decay=HYPER[4])
    for _ in range(20):
        weight.grad = torch.randn_like(weight)
        case.grads = [weight.grad]
        theirs.step()
        case.step()
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(case.params[0], weight.detach(), rtol=4 * ulp, atol=4 * ulp * 0.2)


@pytest.mark.parametrize("layout", [0, ops.EIGHT_BIT_STATE])
def test_skip_and_missing_gradients_change_nothing(device, layout):
    case = problem(DTYPES, layout).to(device)
    before = case.to(device)
    new_gradients(case)
    case.step(skip=torch.ones((), device=device))
    assert_same(case, before)
    case.step(skip=torch.zeros((), device=device))
    for mine, old, grad, step in zip(case.params, before.params, case.grads, case.steps.tolist(), strict=True):
        assert (grad is None) == torch.equal(mine, old) or mine.numel() < 300  # a step may round to nothing
        assert step == (0 if grad is None else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(device, dtype):
    case = problem([dtype]).to(device)
    new_gradients(case)
    table = ops.launch_table(len(case.params), 0, 0, torch.device(device))
    expected = torch.cat([g.double().view(-1) for g in case.grads if g is not None]).norm()
    norm = ops.gradient_norm(case.grads, case.pages, table)
    assert norm.shape == ()
    torch.testing.assert_close(norm.double(), expected, rtol=2e-6, atol=0)
    for bad in (float("nan"), float("inf")):
        case.grads[-2][-1] = bad
        assert not torch.isfinite(ops.gradient_norm(case.grads, case.pages, table))
    nothing = ops.gradient_norm([None] * len(case.params), case.pages, table)
    assert nothing == 0


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_of_the_map(signed):
    levels = torch.tensor(dynamic_map() if signed else unsigned_dynamic_map(), dtype=torch.float64)
    values = torch.randn(256 * 64) * torch.logspace(-9, 0, 256 * 64)
    values = values if signed else values.square()
    codes, absmax = reference.encode_state(values, signed)
    scaled = (values.view(-1, 256).double() / absmax.unsqueeze(1).double()).view(-1)
    best = (scaled.unsqueeze(1) - levels).abs().min(dim=1).values
    error = (scaled - levels[codes.long()]).abs()
    exempt = torch.zeros_like(values, dtype=torch.bool) if signed else codes == 1  # never zero
    assert (error[~exempt] <= best[~exempt] * (1 + 1e-6) + 1e-9).all()
    if not signed:
        assert (codes[values > 0] > 0).all()
    zeros, scale = reference.encode_state(torch.zeros(256), signed)
    assert (reference.decode_state(zeros, scale, signed) == 0).all()


def test_a_nonfinite_gradient_reaches_the_state_visibly(device):
    """8-bit codes of NaN index no table out of bounds, and decode to NaN."""
    case = problem([torch.float32], ops.EIGHT_BIT_STATE, [5000]).to(device)
    case.grads[0][7] = float("nan")
    case.step()
    assert case.params[0][7].isnan()
    assert moments(case)[0][:256].isnan().any()
    assert moments(case)[0][256:].isfinite().all()


def test_stochastic_rounding_is_unbiased():
    """A step of a tenth of an ulp counts on average, where rounding to nearest loses it."""
    count = 1 << 16
    values = torch.full((count,), 1.0 + 0.1 * 2**-7)
    key = reference.random_key(1, 2, 3)
    rounded = reference.stochastic_bfloat16(values, reference.random_bits(key, torch.arange(count)))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    share = (rounded > 1).double().mean().item()
    assert abs(share - 0.1) < 5 * (0.09 / count) ** 0.5


def test_host_slab_and_copies(device):
    managed = host_memory.concurrent_managed_access(torch.device(device))
    for kind in {managed, False}:
        slab = host_memory.host_slab(1 << 20, torch.device(device), kind)
        assert slab.device.type == device
        assert slab.sum() == 0
        numbers = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8)
        host_memory.copy_bytes(numbers, slab)
        assert torch.equal(slab.cpu(), numbers)
        slab += 1
        back = torch.empty_like(numbers)
        host_memory.copy_bytes(slab, back)
        assert torch.equal(back, numbers + 1)
    with pytest.raises(RuntimeError, match="bytes is 0; expected a positive number"):
        host_memory.host_slab(0, torch.device(device), False)
    with pytest.raises(RuntimeError, match="source has 4 bytes, target 5"):
        host_memory.copy_bytes(numbers[:4], torch.empty(5, dtype=torch.uint8))


BAD = {
    "number of gradients": ({"grads": []}, "got 0 gradients; expected 1, one or None a parameter"),
    "gradient dtype": (
        {"grads": [torch.zeros(300).half()]},
        "a gradient is float16; expected its parameter's float32",
    ),
    "gradient size": ({"grads": [torch.zeros(299)]}, "a gradient has 299 elements; expected its parameter's 300"),
    "gradient layout": ({"grads": [torch.zeros(600)[::2]]}, "a gradient or its parameter is not contiguous"),
    "parameter dtype": (
        {"params": [torch.zeros(300).double()], "grads": [None]},
        "a parameter is float64; expected float16, bfloat16 or float32",
    ),
    "steps": ({"steps": torch.zeros(2)}, "steps has 2 elements; expected 1"),
    "pages": ({"pages": torch.zeros(5, dtype=torch.int64)}, "pages has another shape; expected [pages, 5]"),
    "cold pages": ({"cold_pages": 2}, "cold_pages is 2; expected 0 to 1"),
    "memory": ({"memory": [torch.zeros(4096)]}, "memory is float32; expected uint8"),
    "groups": ({"groups": [2]}, "hyper has 12 numbers; expected 6 for every group that groups names"),
    "layouts": ({"layouts": []}, "groups and layouts need one number a parameter, 1"),
    "stochastic float32": ({"layouts": [4]}, "a layout is 4 for float32; expected 0 to 3, or to 7 for bfloat16"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_same_words(name):
    changes, words = BAD[name]
    words = words.replace("[", r"\[").replace("]", r"\]")
    for operator in (ops.adamw_step, reference_step):
        case = problem([torch.float32], sizes=[300], slabs=1)
        for attribute, value in changes.items():
            setattr(case, attribute, value)
        with pytest.raises(RuntimeError, match=words):
            case.step(operator=operator)


@needs_compiled
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [(0, 1, "does not exist"), (3, 1, "does not exist"), (1, 1, "beyond"), (2, 301, "beyond"), (4, 512, "beyond")],
)
def test_a_page_out_of_bounds_is_refused_before_anything_changes(column, value, words):
    case = problem([torch.float32], sizes=[300], slabs=1)
    new_gradients(case)
    before = case.params[0].clone()
    case.pages[0, column] = value
    with pytest.raises(RuntimeError, match=words):
        case.step()
    assert torch.equal(case.params[0], before)
    assert case.steps[0] == 0


def arguments(op, device):
    case = problem([torch.float32, torch.bfloat16], sizes=[300]).to(device)
    new_gradients(case)
    return {
        "adamw_step": (
            *(case.params, case.grads, case.steps, case.memory, case.pages, case.cold_pages, case.table),
            *(None, None, HYPER, case.groups, case.layouts, 0),
        ),
        "gradient_norm": (case.grads, case.pages, ops.launch_table(2, 0, 0, torch.device(device))),
        "concurrent_managed_access": (case.steps,),
        "host_slab": (case.steps, 4096, False),
        "copy_bytes": (case.memory[0], torch.empty_like(case.memory[0])),
    }[op]


@pytest.mark.parametrize("op", OPTIMIZER_SCHEMAS)
def test_opcheck(op, device):
    checks = ("test_schema", "test_faketensor") if op != "concurrent_managed_access" else ("test_schema",)
    opcheck(getattr(torch.ops.qlora_engine, op).default, arguments(op, device), test_utils=checks)


@pytest.mark.gpu
def test_no_synchronisation_and_no_memory():
    case = problem(DTYPES).to("cuda")
    new_gradients(case)
    case.step()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.gpu
def test_in_a_graph_and_on_another_stream():
    case, twin = (problem(DTYPES, ops.EIGHT_BIT_STATE).to("cuda") for _ in range(2))
    new_gradients(case)
    copy_gradients(case, twin)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.step()  # uploads the table
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        twin.step()
    assert_same(case, twin)
