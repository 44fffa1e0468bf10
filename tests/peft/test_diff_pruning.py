import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import DiffPruning
from qlora_engine.peft.gates import GatedDelta, Stretch, _GatedLinear, gates, logistic_noise
from tests.peft.cases import build, inputs, logits

STRETCH = Stretch(-0.1, 1.1)


def train(net, method, model="llama", steps=6):
    net.train()
    optimizer = torch.optim.Adam(method.parameter_groups(1e-2))
    for step in range(1, steps + 1):
        loss = net(**inputs(model)).loss
        penalty = method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    net.eval()


@pytest.mark.parametrize("location", [-2.0, 0.0, 1.5])
def test_gates_are_open_as_often_as_the_formula_says(location):
    a = torch.full((200_000,), location, dtype=torch.float64)
    z, _ = gates(a, STRETCH, torch.tensor(7))
    expected = 1 / (1 + math.exp(-(location - math.log(0.1 / 1.1))))
    assert (z > 0).double().mean().item() == pytest.approx(expected, abs=4e-3)
    assert z.min() >= 0
    assert z.max() <= 1
    assert torch.equal(gates(a, STRETCH, torch.tensor(7))[0], z)
    assert not torch.equal(gates(a, STRETCH, torch.tensor(8))[0], z)


def test_gates_without_noise():
    z, slope = gates(torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64), STRETCH, None)
    torch.testing.assert_close(z, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("seeds", [(None, None), (torch.tensor(3), torch.tensor(4))], ids=["quiet", "noisy"])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_the_formula(seeds, grouped):
    x, w, a = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 5), (4, 5), (4, 5)))
    group = torch.tensor(0.3, dtype=torch.float64, requires_grad=True) if grouped else None

    def formula(x, w, a, *group):
        def gate(a, seed):
            if seed is not None:
                u = torch.rand(a.shape, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float32)
                a = a + u.logit(1e-6)
            return (torch.sigmoid(a) * 1.2 - 0.1).clamp(0, 1)

        change = gate(a, seeds[0]) * w
        return x @ (change * gate(group[0], seeds[1]) if group else change).T

    inputs_ = (x, w, a, group) if grouped else (x, w, a)
    expected = formula(*inputs_)
    found = _GatedLinear.apply(x, w, a, group, STRETCH, *seeds)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(found)
    mine = torch.autograd.grad(found, inputs_, gradient)
    theirs = torch.autograd.grad(expected, inputs_, gradient)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_penalty_is_the_expected_share_of_open_gates():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    method = peft.apply(net, DiffPruning(structured="matrix", penalty=2.0, low=-0.1, high=1.1))
    named = method.trainable_parameters()
    with torch.no_grad():
        for param in named.values():
            param.copy_(torch.randn(param.shape))
    shift = math.log(0.1 / 1.1)
    expected = 0.0
    for path in ("0", "1"):
        open_ = torch.sigmoid(named[f"{path}.gate"].double() - shift)
        expected = expected + open_.sum() * torch.sigmoid(named[f"{path}.group"].double() - shift)
    expected = 2.0 * expected / 20
    torch.testing.assert_close(method.penalty().double(), expected)
    mine = torch.autograd.grad(method.penalty(), [named["0.gate"], named["1.group"]])
    theirs = torch.autograd.grad(expected, [named["0.gate"], named["1.group"]])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_gates_are_random_in_training_alone_and_new_after_a_step():
    net = build("llama", False)
    method = peft.apply(net, DiffPruning(open_at=0.0))
    with torch.no_grad():
        for name, param in method.trainable_parameters().items():
            if name.endswith("delta"):
                param.normal_(std=0.1)
    quiet = logits(net, "llama")
    assert torch.equal(logits(net, "llama"), quiet)
    net.train()
    first = logits(net, "llama")
    assert not torch.equal(first, quiet)
    assert torch.equal(logits(net, "llama"), first)
    method.after_step(1)
    assert not torch.equal(logits(net, "llama"), first)


def test_a_group_has_one_gate():
    net = build("llama", False)
    method = peft.apply(net, DiffPruning(structured="block"))
    groups = [name for name in method.tensors() if name.endswith(".group")]
    assert groups == ["model.layers.0.group", "model.layers.1.group"]
    parts = [module for module in net.modules() if isinstance(module, GatedDelta)]
    assert len(parts) == 14
    assert len({id(part.group) for part in parts}) == 2
    # all its matrices see the same noise
    assert len({int(part.seeds[1]) for part in parts}) == 2
    assert len({int(part.seeds[0]) for part in parts}) == 14
    train(net, method)
    with torch.no_grad():  # a closed gate takes the whole block's change away
        method.tensors()["model.layers.1.group"].fill_(-50.0)
    method.finish()
    assert all(name.startswith("model.layers.0.") for name in method.tensors())


@pytest.mark.parametrize("structured", ["none", "matrix", "block"])
@pytest.mark.parametrize("packed", [False, True])
def test_pruned_to_the_share_saved_sparse_and_trained_on(packed, structured, tmp_path):
    net = build("llama", packed)
    base = logits(net, "llama")
    method = peft.apply(net, DiffPruning(share=0.02, structured=structured))
    train(net, method)
    assert not method.report().notes["pruned"]
    changes = {path: part.change() for path, part in method._attached.parts.items()}
    every = torch.cat([change.flatten() for change in changes.values()])
    method.finish()
    report = method.report()
    assert report.trainable == round(0.02 * len(every))
    assert report.notes == {"pruned": True, "share": pytest.approx(0.02, rel=1e-3)}
    assert method.penalty() is None
    bound = every.abs().topk(report.trainable).values[-1]
    for path, part in method._attached.parts.items():
        flat = changes[path].flatten()
        assert torch.equal(part.values, flat[part.index.long()])
        assert part.values.abs().min() >= bound
    with pytest.raises(peft.MethodError, match="pruned already"):
        method.finish()
    before = net(**inputs("llama")).loss.item()
    assert {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in method.trainable_parameters().values()
    }
    train(net, method)
    assert net(**inputs("llama")).loss.item() < before

    method.save(tmp_path)
    assert sum(t.nbytes for t in load_file(tmp_path / "adapter_model.safetensors").values()) == 8 * report.trainable
    other = build("llama", packed)
    loaded = peft.load(other, tmp_path)
    assert loaded.pruned
    assert torch.equal(logits(other, "llama"), logits(net, "llama"))
    loaded.remove()
    assert torch.equal(logits(other, "llama"), base)


def test_the_penalty_closes_gates():
    net = build("llama", False)
    method = peft.apply(net, DiffPruning(penalty=10.0, open_at=1.0))
    before = method.report().notes["expected share of open gates"]
    train(net, method, steps=10)
    assert method.report().notes["expected share of open gates"] < 0.8 * before


@pytest.mark.parametrize("pruned", [False, True])
def test_merging(pruned):
    net = build("gpt2", False)
    method = peft.apply(net, DiffPruning(share=0.1, structured="matrix"))
    train(net, method, "gpt2")
    if pruned:
        method.finish()
    expected = logits(net, "gpt2")
    method.merge()
    torch.testing.assert_close(logits(net, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_wrong_settings_are_refused():
    for options, words in [
        ({"share": 2.0}, "share"),
        ({"structured": "rows"}, "one of none, matrix, block"),
        ({"low": 0.1}, "low < 0"),
        ({"penalty": -1.0}, "penalty"),
    ]:
        with pytest.raises(peft.MethodError, match=words):
            DiffPruning(**options)
    method = peft.apply(build("llama", False), DiffPruning())
    with pytest.raises(peft.MethodError, match="every change is zero"):
        method.finish()
    with pytest.raises(peft.MethodError, match="missing"):
        method.load_state_dict({})


def test_copies_have_gates_of_their_own():
    net = build("llama", True)
    peft.apply(net, DiffPruning(structured="block"))
    twin = copy.deepcopy(net)
    method = peft.applied(twin)[0]
    train(twin, method)
    assert not torch.equal(logits(twin, "llama"), logits(net, "llama"))
    parts = [module for module in twin.modules() if isinstance(module, GatedDelta)]
    assert {id(part.group) for part in parts} == {id(gate) for gate in method._group_gates.values()}
    method.finish()
    method.remove()
    assert torch.equal(logits(twin, "llama"), logits(net, "llama"))


def test_compiled_it_draws_new_noise_without_being_compiled_again():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)).train()
    method, x = peft.apply(net, DiffPruning(open_at=0.5, structured="matrix")), torch.randn(3, 5)
    with torch.no_grad():
        for name, param in method.trainable_parameters().items():
            if name.endswith("delta"):
                param.normal_()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    seen = []
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = compiled(x)
        torch.testing.assert_close(found, net(x))
        found.sum().backward()
        seen.append(found.detach())
        method.after_step(step + 1)
    assert not torch.equal(seen[0], seen[1])
    assert all(p.grad is not None for p in method.trainable_parameters().values())


def test_the_noise_is_an_operator(device):
    torch.library.opcheck(logistic_noise, (torch.randn(3, 4, device=device), torch.tensor(5)))


@pytest.mark.parametrize("structured", ["none", "block"])
def test_on_every_device(device, structured):
    net = build("llama", True).to(device)
    method = peft.apply(net, DiffPruning(share=0.02, structured=structured))
    batch = {name: tensor.to(device) for name, tensor in inputs("llama").items()}
    optimizer = torch.optim.Adam(method.parameter_groups(1e-2))
    before = net(**batch).loss.item()
    for step in range(1, 6):
        (net(**batch).loss + method.penalty()).backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    method.finish()
    assert net(**batch).loss.item() < before
