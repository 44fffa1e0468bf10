"""What all methods share that hang parts on layers."""

import copy
import itertools

import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import IA3, BitFit, Bottleneck, DiffPruning, FishMask, LayerSelection
from qlora_engine.peft.parts import Attached, Part
from tests.peft.cases import build, inputs, logits


def configs():
    return [
        IA3(),
        Bottleneck(size=4, parallel=True),
        FishMask(0.02, samples=[inputs("llama")]),
        DiffPruning(structured="matrix"),
        LayerSelection(norms=True),
    ]


def disturb(method, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in method.trainable_parameters().values():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))


class Double(Part):
    def before(self, x):
        return 2 * x


class Shift(Part):
    def after(self, x, y):
        return y + x.sum()


class Tuples(nn.Module):
    """Returns what attention layers do, and may be called by keyword."""

    def forward(self, hidden_states, scale=1.0):
        return hidden_states * scale, "weights"


def test_inputs_by_position_and_keyword_and_outputs_in_tuples():
    net = nn.Sequential(Tuples())
    layer, x = net[0], torch.ones(2)
    parts = Attached(net, {"0": Double()}, "twice"), Attached(net, {"0": Shift()}, "shift")
    for found in (layer(x, 3.0), layer(x, scale=3.0), layer(hidden_states=x, scale=3.0)):
        assert found[1] == "weights"
        assert found[0].tolist() == [10.0, 10.0]  # 2 * 1 * 3, and the sum of what the layer saw
    parts[0].enable(False)
    assert layer(x)[0].tolist() == [3.0, 3.0]
    for part in parts:
        part.detach()
    assert layer(x)[0].tolist() == [1.0, 1.0]
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not list(net.named_modules())[2:]


def test_a_call_without_a_tensor_is_refused():
    net = nn.Sequential(Tuples())
    Attached(net, {"0": Double()}, "twice")
    with pytest.raises(peft.MethodError, match="without a tensor"):
        net[0](1.0)


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.name)
def test_compiled_in_one_graph(config):
    net = build("llama", True)
    method = peft.apply(net, config)
    disturb(method)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    batch = inputs("llama")
    found, expected = compiled(**batch), net(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    params = list(method.trainable_parameters().values())
    mine, theirs = torch.autograd.grad(found.loss, params), torch.autograd.grad(expected.loss, params)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("pair", list(itertools.permutations(range(5), 2)), ids=str)
def test_two_methods_share_a_model(pair):
    net = build("llama", True)
    base, flags = logits(net, "llama"), {name: p.requires_grad for name, p in net.named_parameters()}
    first, second = (peft.apply(net, configs()[number]) for number in pair)
    disturb(first)
    alone = logits(net, "llama")
    disturb(second, 4)
    both = logits(net, "llama")
    assert not torch.equal(alone, base)
    assert not torch.equal(both, alone)
    net(**inputs("llama")).loss.backward()
    for method in (first, second):
        assert all(p.grad is not None for p in method.trainable_parameters().values())
    trained = [p for method in (first, second) for p in method.trainable_parameters().values()]
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in trained}
    with second.disabled():
        assert torch.equal(logits(net, "llama"), alone)
    if sum(pair) % 2:  # in either order
        second.remove()
        assert torch.equal(logits(net, "llama"), alone)
        first.remove()
    else:
        first.remove()
        assert {id(p) for p in net.parameters() if p.requires_grad} == {
            id(p) for p in second.trainable_parameters().values()
        }
        second.remove()
    assert torch.equal(logits(net, "llama"), base)
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.name)
def test_moves_and_casts_with_the_model(config):
    net = build("llama", False)
    method = peft.apply(net, config)
    disturb(method)
    expected = logits(net, "llama")
    net.double()
    torch.testing.assert_close(logits(net, "llama").float(), expected, rtol=1e-3, atol=1e-4)
    net.bfloat16()
    found = logits(net, "llama")
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    net(**inputs("llama")).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.trainable_parameters().values())


def test_a_copy_is_undone_by_its_own_handle():
    net = build("gpt2", True)
    for config in (BitFit(), IA3(), Bottleneck()):
        peft.apply(net, config)
    twin = copy.deepcopy(net)
    for method in reversed(peft.applied(twin)):
        disturb(method)
        method.remove()
    base = build("gpt2", True)
    assert twin.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(logits(twin, "gpt2"), logits(base, "gpt2"))
    assert len(peft.applied(net)) == 3
