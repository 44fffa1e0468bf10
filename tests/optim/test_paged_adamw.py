"""PagedAdamW as an optimizer: torch's numbers, torch's checkpoints, and its own promises."""

import copy
import gc
import re

import pytest
import torch

from qlora_engine import QLoRALinear
from qlora_engine.optim import PagedAdamW, lora_plus_groups
from tests.numerics import assert_close

SHAPES = [(5,), (300, 700), (64, 16), (1,), (3, 17, 5)]
EPS = torch.finfo(torch.float32).eps


def parameters(device="cpu", dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(*lists, seed, without=()):
    """The same random gradients for parameters of every list."""
    generator = torch.Generator().manual_seed(seed)
    for index, same in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(same[0].shape, generator=generator)
        for param in same:
            param.grad = None if index in without else grad.to(param.device, param.dtype)


def assert_ulps(mine, theirs, ulps, step=0.0):
    """Within so many units in the last place of the larger of a number and a step's size."""
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=ulps * EPS, atol=ulps * EPS * step)


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.99)}]


@pytest.mark.parametrize("maximize", [False, True])
def test_equals_torch_over_many_steps(device, maximize):
    mine = parameters(device)
    theirs = clones(mine)
    ours = PagedAdamW(groups(mine), lr=1e-3, weight_decay=0.1, maximize=maximize)
    torchs = torch.optim.AdamW(groups(theirs), lr=1e-3, weight_decay=0.1, maximize=maximize)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 200) for o in (ours, torchs)]
    for step in range(200):
        set_gradients(mine, theirs, seed=step, without=(2,) if step % 3 == 0 else ())
        ours.step()
        torchs.step()
        for scheduler in schedulers:
            scheduler.step()
    # each of 200 roundings is right to half an ulp on both sides, and they wander apart as their root
    assert_ulps(mine, theirs, 16, step=1.0)
    for state, b in zip(ours.state_dict()["state"].values(), theirs, strict=True):
        assert_close("moment", state["exp_avg"], torchs.state[b]["exp_avg"], 1e-6)
        assert_close("square", state["exp_avg_sq"], torchs.state[b]["exp_avg_sq"], 1e-6)
        assert state["step"] == torchs.state[b]["step"]


@pytest.mark.gpu
def test_equals_torch_fused_over_many_steps():
    """Its kernel rounds 1 - beta2 to float32 before it multiplies: 1.3e-5 of exp_avg_sq at 0.999.

    It also subtracts lr * weight_decay * p where torch's other implementations multiply by 1 - lr * weight_decay; the
    two round a number apart by up to an ulp, and the same way at every step. So without decay here.
    """
    mine = parameters("cuda")
    theirs = clones(mine)
    ours = PagedAdamW(mine, lr=1e-3, weight_decay=0.0)
    torchs = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(200):
        set_gradients(mine, theirs, seed=step)
        ours.step()
        torchs.step()
    assert_ulps(mine, theirs, 16, step=1.0)
    for state, b in zip(ours.state_dict()["state"].values(), theirs, strict=True):
        assert_close("moment", state["exp_avg"], torchs.state[b]["exp_avg"], 1e-6)
        assert_close("square", state["exp_avg_sq"], torchs.state[b]["exp_avg_sq"], 2e-5)


def test_one_step_is_within_two_ulps(device):
    mine = parameters(device)
    theirs = clones(mine)
    set_gradients(mine, theirs, seed=0)
    PagedAdamW(mine, lr=1e-2).step()
    torch.optim.AdamW(theirs, lr=1e-2).step()
    assert_ulps(mine, theirs, 2, step=1e-2)


def test_checkpoints_go_both_ways(device):
    mine = parameters(device)
    theirs = clones(mine)
    ours, torchs = PagedAdamW(groups(mine)), torch.optim.AdamW(groups(theirs))
    for step in range(5):
        set_gradients(mine, seed=step)
        ours.step()
    with torch.no_grad():
        for a, b in zip(mine, theirs, strict=True):
            b.copy_(a)
    saved = ours.state_dict()
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert saved["state"][1]["exp_avg"].shape == (300, 700)
    torchs.load_state_dict(copy.deepcopy(saved))
    set_gradients(mine, theirs, seed=9)
    ours.step()
    torchs.step()
    assert_ulps(mine, theirs, 2, step=1e-3)

    third = clones(mine)
    resumed = PagedAdamW(groups(third))
    resumed.load_state_dict(torchs.state_dict())
    with torch.no_grad():
        for a, b in zip(third, theirs, strict=True):
            a.copy_(b)
    set_gradients(third, theirs, seed=10)
    resumed.step()
    torchs.step()
    assert_ulps(third, theirs, 2, step=1e-3)
    assert resumed.param_groups[1]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8},
        {"bits": 8, "master_weights": True},
        {"bits": 8, "stochastic_rounding": True},
        {"max_grad_norm": 1.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_exactly(device, dtype, options, tmp_path):
    mine = parameters(device, dtype)
    ours = PagedAdamW(groups(mine), **options)
    for step in range(3):
        set_gradients(mine, seed=step)
        ours.step()
    torch.save({"optimizer": ours.state_dict(), "params": [p.detach() for p in mine]}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    others = [torch.nn.Parameter(p) for p in loaded["params"]]
    resumed = PagedAdamW(groups(others), **options)
    resumed.load_state_dict(loaded["optimizer"])
    for step in range(3, 6):
        set_gradients(mine, others, seed=step)
        ours.step()
        resumed.step()
    for a, b in zip(mine, others, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours.state_dict()["state"].values(), resumed.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_bits_convert_through_a_checkpoint(device):
    mine = parameters(device)
    eight = PagedAdamW(mine, bits=8)
    for step in range(3):
        set_gradients(mine, seed=step)
        eight.step()
    assert "exp_avg_codes" in eight.state_dict()["state"][1]
    assert "exp_avg" in eight.state_dict()["state"][0], "small parameters keep 32 bits"
    decoded = eight.torch_state_dict()
    assert set(decoded["state"][1]) == {"step", "exp_avg", "exp_avg_sq"}
    full = PagedAdamW(clones(mine))
    full.load_state_dict(eight.state_dict())
    for a, b in zip(full.state_dict()["state"].values(), decoded["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    again = PagedAdamW(clones(mine), bits=8)
    again.load_state_dict(full.state_dict())
    assert again.param_groups[0]["bits"] == 8
    for a, b in zip(again.torch_state_dict()["state"].values(), decoded["state"].values(), strict=True):
        assert_close("moment", a["exp_avg"], b["exp_avg"], 1e-2)


def test_8bit_stays_near_32bit(device):
    """Over a quadratic bowl both arrive; the paths differ by the quantization error."""
    target = torch.randn(128, 256, device=device)
    results = {}
    for bits in (32, 8):
        weight = torch.nn.Parameter(torch.zeros(128, 256, device=device))
        optimizer = PagedAdamW([weight], lr=3e-2, weight_decay=0.0, bits=bits)
        for _ in range(200):
            weight.grad = (weight - target).detach()
            optimizer.step()
        results[bits] = ((weight - target).square().mean().item(), weight.detach())
    assert results[32][0] < 1e-3
    assert results[8][0] < 1e-3
    assert_close("weight", results[8][1], results[32][1], 5e-2)


def test_8bit_is_as_near_to_32bit_as_bitsandbytes(device):
    """After 50 steps of a noisy gradient, relative to how far the steps went."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    start = torch.randn(256, 300, device=device)
    params = {name: torch.nn.Parameter(start.clone()) for name in ("ours", "theirs", "exact")}
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizers = {
        "ours": PagedAdamW([params["ours"]], bits=8, **options),
        "theirs": bitsandbytes.optim.AdamW8bit([params["theirs"]], **options),
        "exact": torch.optim.AdamW([params["exact"]], **options),
    }
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(256, 300, generator=generator) * torch.logspace(-3, 0, 300)
    for _ in range(50):
        grad = (slope + torch.randn(256, 300, generator=generator) * slope.abs()).to(device)
        for name, optimizer in optimizers.items():
            params[name].grad = grad.clone()
            optimizer.step()
    way = (params["exact"] - start).detach().norm()
    errors = {name: float((p - params["exact"]).detach().norm() / way) for name, p in params.items()}
    assert errors["ours"] <= 1.1 * errors["theirs"]
    assert 0 < errors["ours"] < 0.3


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding", None])
def test_small_steps_of_bfloat16(device, option):
    """Steps of a fiftieth of an ulp are lost when rounded to nearest, and kept by the two answers to that."""
    weight = torch.nn.Parameter(torch.ones(8192, device=device, dtype=torch.bfloat16))
    options = {option: True} if option else {}
    optimizer = PagedAdamW([weight], lr=2**-7 / 50, weight_decay=0.0, **options)
    for _ in range(100):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    moved = (weight.float() - 1).mean().item()
    if option is None:
        assert moved == 0
    else:
        assert abs(moved - 2 * 2**-7) < 2**-9


def test_nonfinite_gradients(device):
    for bad in (float("nan"), float("inf"), -float("inf")):
        mine = parameters(device)
        before = clones(mine)
        set_gradients(mine, seed=0)
        mine[1].grad[3, 4] = bad
        skipping = PagedAdamW(mine)
        skipping.step()
        assert skipping.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
        assert all(skipping.state[p]["step"] == 0 for p in mine)
        raising = PagedAdamW(mine, nonfinite="raise")
        with pytest.raises(FloatingPointError, match="the step was not made"):
            raising.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, before, strict=True))
        set_gradients(mine, seed=1)
        skipping.step()
        assert skipping.skipped_steps == 1
        assert all(skipping.state[p]["step"] == 1 for p in mine)
        mine[1].grad[3, 4] = bad
        PagedAdamW(mine, nonfinite="propagate").step()
        assert not torch.isfinite(mine[1][3, 4])


def test_clipping_equals_torch(device):
    mine = parameters(device)
    theirs = clones(mine)
    ours, torchs = PagedAdamW(mine, max_grad_norm=0.5), torch.optim.AdamW(theirs)
    for step in range(5):
        set_gradients(mine, theirs, seed=step)
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        torch.testing.assert_close(ours.last_grad_norm, norm, rtol=1e-5, atol=0)
    assert_ulps(mine, theirs, 64, step=1e-3)


def test_gradient_scaler(device):
    mine = parameters(device)
    theirs = clones(mine)
    ours, torchs = PagedAdamW(mine), torch.optim.AdamW(theirs)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for step in range(3):
        set_gradients(mine, theirs, seed=step)
        torchs.step()
        scaler.scale(torch.zeros((), device=device))  # makes its scale
        for p in mine:
            p.grad *= scaler.get_scale()
        if step == 1:  # an overflow: the step is left out, and the scale falls
            mine[0].grad[0] = float("inf")
        scaler.step(ours)
        scaler.update()
        if step == 1:
            with torch.no_grad():
                for a, b in zip(mine, theirs, strict=True):
                    b.copy_(a)
            torchs.load_state_dict(ours.state_dict())
    assert scaler.get_scale() == 512.0
    assert_ulps(mine, theirs, 4, step=1e-3)


def test_closure_and_no_gradients(device):
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = PagedAdamW([weight], lr=0.1)
    assert optimizer.step() is None
    assert torch.equal(weight, torch.ones(3, device=device))

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert (weight < 1).all()


def test_any_dense_layout(device):
    """Channels-last and transposed parameters, with gradients of other strides; state has the parameter's shape."""
    torch.manual_seed(0)
    mine = [
        torch.nn.Parameter(torch.randn(4, 6, 5, 3, device=device).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(7, 9, device=device).T),
    ]
    theirs = clones(mine)
    ours, torchs = PagedAdamW(mine), torch.optim.AdamW(theirs)
    for step in range(3):
        set_gradients(mine, theirs, seed=step)
        ours.step()
        torchs.step()
    assert_ulps(mine, theirs, 4, step=1e-3)
    assert_close("moment", ours.state_dict()["state"][1]["exp_avg"], torchs.state[theirs[1]]["exp_avg"], 1e-6)
    again = PagedAdamW(clones(mine))
    again.load_state_dict(ours.state_dict())
    for a, b in zip(again.state_dict()["state"].values(), ours.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_groups_may_be_added_later(device):
    mine = parameters(device)
    theirs = clones(mine)
    ours, torchs = PagedAdamW(mine[:2]), torch.optim.AdamW(theirs[:2])
    for step in range(4):
        if step == 2:
            ours.add_param_group({"params": mine[2:], "lr": 1e-2})
            torchs.add_param_group({"params": theirs[2:], "lr": 1e-2})
        set_gradients(mine, theirs, seed=step)
        ours.step()
        torchs.step()
    assert_ulps(mine, theirs, 4, step=1e-2)
    assert ours.state[mine[0]]["step"] == 4
    assert ours.state[mine[4]]["step"] == 2


def test_memory_is_returned(device):
    weight = torch.nn.Parameter(torch.zeros(1 << 16, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = PagedAdamW([weight])
    optimizer.step()
    slabs = optimizer._buckets[weight.device].arena.slabs
    assert sum(s.numel() for s in slabs) == 8 << 16
    storages = [torch.multiprocessing.reductions.StorageWeakRef(s.untyped_storage()) for s in slabs]
    del slabs
    optimizer.close()
    gc.collect()
    assert all(s.expired() for s in storages)
    optimizer.step()  # from zeros again
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas are (0.9, 1.0)"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"bits": 16}, "bits is 16; expected 32 or 8"),
        ({"device_budget": -1}, "device_budget is -1"),
        ({"backend": "disk"}, "backend is 'disk'; expected one of auto, managed, pinned, device"),
        ({"backend": "pinned"}, "backend='pinned' is for CUDA parameters"),
        ({"backend": "device", "device_budget": 5}, "give one of them"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"master_weights": True, "stochastic_rounding": True}, "give one of them"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], **options)


def test_bad_parameters_and_gradients():
    with pytest.raises(ValueError, match="float64; expected float32, float16 or bfloat16"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3).double())])
    with pytest.raises(ValueError, match="has gaps or overlaps"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(6)[::2])])
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = PagedAdamW([weight])
    weight.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="a gradient is sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="4 elements, its parameter of shape"):
        other = PagedAdamW([torch.nn.Parameter(torch.zeros(4))])
        other.param_groups[0]["params"][0].grad = torch.zeros(4)
        other.step()
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(torch.optim.AdamW([weight], amsgrad=True).state_dict())
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(optimizer)


def test_lora_plus_groups():
    layer = QLoRALinear(64, 32, r=4)
    found = lora_plus_groups(layer, lr=1e-4, ratio=8.0, weight_decay=0.0)
    assert [group["lr"] for group in found] == [1e-4, 8e-4]
    assert [p.shape for p in found[1]["params"]] == [(32, 4)]
    assert sum(p.numel() for g in found for p in g["params"]) == sum(
        p.numel() for p in layer.parameters() if p.requires_grad
    )
    PagedAdamW(found)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        lora_plus_groups(layer.requires_grad_(False), lr=1e-4)
