"""Diff pruning's second stage: the entries that are kept are chosen at `fix_at`, and trained on."""

import copy

import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.optim import PagedAdamW
from qlora_engine.peft import DiffPruning
from qlora_engine.peft.gates import GatedDelta
from tests.peft.cases import build, inputs, logits

STRUCTURES = pytest.mark.parametrize("structured", ["none", "matrix", "block"])


class Training:
    """A method on a small model with an optimizer whose momentum moves what has no gradient."""

    def __init__(self, config, packed=False, device="cpu", optimizer=torch.optim.Adam, first=1):
        self.net = build("llama", packed).to(device).train()
        self.batch = {name: tensor.to(device) for name, tensor in inputs("llama").items()}
        self.method = peft.apply(self.net, config)
        self.kind, self.first = optimizer, first
        self.make_optimizer()

    def make_optimizer(self):
        self.optimizer = self.kind(self.method.parameter_groups(1e-2))

    def run(self, until):
        """Steps up to `until`; the last one's loss."""
        for step in range(self.first, until + 1):
            loss, penalty = self.net(**self.batch).loss, self.method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            self.optimizer.step()
            self.method.after_step(step)
            self.optimizer.zero_grad()
        self.first = until + 1
        return loss.item()

    def changes(self):
        return {path: part.change() for path, part in self.method._attached.parts.items()}


@pytest.mark.parametrize("packed", [False, True])
@STRUCTURES
def test_the_largest_changes_of_all_layers_are_kept(structured, packed):
    settings = {"share": 0.02, "structured": structured, "open_at": 1.0}
    training, without = Training(DiffPruning(**settings, fix_at=4), packed), Training(DiffPruning(**settings), packed)
    without.run(4)  # what there is to choose from
    changes = without.changes()
    training.run(3)
    method = training.method
    assert not method.fixed
    assert method.penalty() is not None
    identity = {name: id(param) for name, param in method.trainable_parameters().items()}
    training.run(4)
    every = torch.cat([change.flatten() for change in changes.values()])
    count = round(0.02 * len(every))
    bound = every.abs().topk(count).values[-1]
    assert method.fixed
    assert method.penalty() is None
    assert sum(len(part.kept()) for part in method._attached.parts.values()) == count
    for path, part in method._attached.parts.items():
        # inside, gated values go on; outside, there is zero
        assert torch.equal(part.change(), torch.where(changes[path].abs() >= bound, changes[path], 0.0))
        assert torch.equal(part.change(), part.delta)
    assert {name: id(param) for name, param in method.trainable_parameters().items()} == identity
    assert method.report().notes["expected share of open gates"] == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, PagedAdamW])
@STRUCTURES
def test_entries_outside_stay_zero_and_those_inside_are_trained_on(structured, optimizer):
    training = Training(DiffPruning(share=0.02, fix_at=3, structured=structured), optimizer=optimizer)
    training.run(3)
    method = training.method
    kept, before = {path: part.kept() for path, part in method._attached.parts.items()}, training.changes()
    begun = training.run(4)
    assert training.run(12) < begun - 0.01
    after = training.changes()
    for path, part in method._attached.parts.items():
        outside = torch.ones(part.delta.numel(), dtype=torch.bool)
        outside[kept[path]] = False
        assert torch.equal(part.kept(), kept[path])
        assert not part.delta.detach().flatten()[outside].any()
        inside = after[path].flatten()[kept[path]]
        assert bool((inside != before[path].flatten()[kept[path]]).any()) == (len(inside) > 0)
    # the gates are gone: no noise in training mode, and no gradient
    noisy, quiet = logits(training.net, "llama"), logits(training.net.eval(), "llama")
    assert torch.equal(noisy, quiet)
    training.net(**training.batch).loss.backward()
    gates = {n: p for n, p in method.trainable_parameters().items() if n.endswith((".gate", ".group"))}
    assert all(p.isinf().all() and not p.grad.any() for p in gates.values())


@STRUCTURES
def test_finish_leaves_exactly_what_was_chosen(structured, tmp_path):
    training = Training(DiffPruning(share=0.02, fix_at=3, structured=structured))
    training.run(8)
    method = training.method
    chosen = {path: part.kept() for path, part in method._attached.parts.items() if len(part.kept())}
    path = next(path for path, index in chosen.items() if len(index) > 2)
    with torch.no_grad():  # an entry that has become nothing is kept as well
        method._attached.parts[path].delta.view(-1)[chosen[path][1]] = 0.0
    training.net.eval()
    changes, expected = training.changes(), logits(training.net, "llama")
    method.finish()
    assert {path: part.index.tolist() for path, part in method._attached.parts.items()} == {
        path: index.tolist() for path, index in chosen.items()
    }
    for path, part in method._attached.parts.items():
        assert torch.equal(part.values, changes[path].flatten()[chosen[path]])
    torch.testing.assert_close(logits(training.net, "llama"), expected, rtol=1e-4, atol=1e-5)
    method.save(tmp_path)
    other = build("llama", False)
    assert peft.load(other, tmp_path).pruned
    assert torch.equal(logits(other, "llama"), logits(training.net, "llama"))


@pytest.mark.parametrize("stop", [2, 4, 7])
@STRUCTURES
def test_resumed_it_gives_the_same_bits(structured, stop, tmp_path):
    config = DiffPruning(share=0.02, fix_at=4, structured=structured, open_at=1.0)
    whole, parts, rest = (Training(config) for _ in range(3))
    parts.run(stop)
    parts.method.save(tmp_path)
    rest.method.load_state_dict(parts.method.state_dict())
    rest.method.resume(stop, parts.method.progress())
    assert rest.method.fixed == (stop >= 4)
    rest.make_optimizer()
    rest.optimizer.load_state_dict(parts.optimizer.state_dict())
    rest.first = stop + 1
    assert rest.run(9) == whole.run(9)
    # the file of a dense change says so as well
    assert peft.load(build("llama", False), tmp_path).fixed == (stop >= 4)
    for training in (whole, rest):
        training.method.finish()
    expected, found = whole.method.state_dict(), rest.method.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_earlier_state_brings_the_gates_back():
    training = Training(DiffPruning(share=0.02, fix_at=3, structured="matrix"))
    training.run(2)
    state = training.method.state_dict()
    training.run(5)
    assert training.method.fixed
    training.method.load_state_dict(state)
    training.method.resume(2)
    assert not training.method.fixed
    assert training.method.penalty() is not None
    # they are random again
    assert not torch.equal(logits(training.net.train(), "llama"), logits(training.net.eval(), "llama"))


def test_gradient_checkpointing_autocast_and_merging():
    training = Training(DiffPruning(share=0.02, fix_at=2, structured="block"))
    training.run(3)
    net, method = training.net, training.method

    def gradients(**options):
        net.zero_grad()
        with torch.autocast("cpu", **options) if options else torch.enable_grad():
            loss = net(**training.batch).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in method.trainable_parameters().items()}

    plain = gradients()
    for path, part in method._attached.parts.items():
        assert not plain[f"{path}.delta"][part.gate < 0].any()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
    net.gradient_checkpointing_disable()
    for name, gradient in gradients(dtype=torch.bfloat16).items():
        assert (gradient - plain[name]).norm() <= 0.2 * plain[name].norm() + 1e-4
    net.eval()
    expected = logits(net, "llama")
    method.merge()
    torch.testing.assert_close(logits(net, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_compiled_anew_once():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)).train()
    method = peft.apply(net, DiffPruning(share=0.3, fix_at=2, structured="matrix"))
    optimizer = torch.optim.Adam(method.parameter_groups(1e-2))
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(3, 5)
    for step in range(1, 6):
        with torch._dynamo.config.patch(error_on_recompile=step not in (1, 3)):
            found = compiled(x)
        torch.testing.assert_close(found, net(x))
        found.square().sum().backward()
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
    assert method.fixed


def test_on_every_device(device):
    training = Training(DiffPruning(share=0.02, fix_at=3, structured="matrix"), packed=True, device=device)
    training.run(3)
    begun = training.run(4)
    assert training.run(8) < begun
    training.method.finish()


def test_copies_are_fixed_by_themselves():
    training = Training(DiffPruning(share=0.02, fix_at=3))
    training.run(3)
    twin = peft.applied(copy.deepcopy(training.net))[0]
    assert twin.fixed
    assert all(module.fixed for module in twin.model.modules() if isinstance(module, GatedDelta))


def test_two_thirds_of_the_steps_are_before_it_unless_said_otherwise():
    for steps, fix_at in [(1, 1), (2, 1), (3, 2), (40, 26), (120, 80)]:
        method = peft.apply(nn.Sequential(nn.Linear(2, 2)), DiffPruning())
        method.plan(steps)
        assert method.config.fix_at == fix_at
    method = peft.apply(nn.Sequential(nn.Linear(2, 2)), DiffPruning(fix_at=5))
    method.plan(5)
    assert method.config.fix_at == 5
    with pytest.raises(peft.MethodError, match="fix_at is 5, but there are 4 steps; expected at most as many"):
        method.plan(4)


def test_without_it_nothing_is_chosen_before_the_end():
    training = Training(DiffPruning(share=0.02))
    training.run(6)
    assert not training.method.fixed


@pytest.mark.parametrize("value", [0, -3, 2.5, "ten", True])
def test_a_wrong_number_of_steps_is_refused(value):
    with pytest.raises(peft.MethodError, match=f"fix_at is {value!r}; expected a number of steps, at least 1"):
        DiffPruning(fix_at=value)


def test_nothing_learnt_is_said_when_it_is_to_be_chosen_from():
    method = peft.apply(build("llama", False), DiffPruning(fix_at=2))
    method.after_step(1)
    with pytest.raises(peft.MethodError, match="every change is zero"):
        method.after_step(2)
    assert not method.fixed
