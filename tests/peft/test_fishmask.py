import copy

import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.nn import NF4Linear
from qlora_engine.peft import FishMask
from tests.peft.cases import build, inputs, logits


def disturb(method):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in method.trainable_parameters().values():
            param.copy_(0.1 * torch.randn(param.shape, generator=generator))


def fisher_by_hand(net, paths, batch):
    """Autograd's squared gradients of an unquantized model, sample by sample."""
    sums = dict.fromkeys(paths, 0.0)
    rows = len(batch["labels"])
    for row in range(rows):
        net.zero_grad()
        net(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss.backward()
        for path in paths:
            weight = net.get_submodule(path).weight
            gradient = weight.grad.T if type(net.get_submodule(path)).__name__ == "Conv1D" else weight.grad
            sums[path] = sums[path] + gradient.double() ** 2 / rows
    net.zero_grad()
    return sums


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("memory", [2**30, 1])
def test_the_largest_are_chosen(model, memory):
    net, batch = build(model, False), inputs(model)
    method = peft.apply(net, FishMask(0.01, samples=[batch], memory=memory))
    paths = method._targets
    fisher = fisher_by_hand(build(model, False), paths, batch)
    every = torch.cat([fisher[path].flatten() for path in paths])
    count = round(0.01 * len(every))
    bound = every.topk(count).values[-1]
    chosen = {key.removesuffix(".index"): t for key, t in method.tensors().items() if key.endswith("index")}
    assert sum(len(index) for index in chosen.values()) == count == method.report().trainable
    for path, index in chosen.items():
        assert (fisher[path].flatten()[index.long()] >= bound * 0.999).all()


def test_on_four_bits_it_is_the_fisher_of_the_decoded_weights():
    packed, plain = build("llama", True), build("llama", False)
    for path, layer in packed.named_modules():
        if isinstance(layer, NF4Linear):
            plain.get_submodule(path).weight.data = layer.dequantize(torch.float32)
    config = FishMask(0.02, samples=[inputs("llama")])
    one, other = peft.apply(packed, config), peft.apply(plain, config)
    mine = {f"{k}/{i}" for k, t in one.tensors().items() if k.endswith("index") for i in t.tolist()}
    theirs = {f"{k}/{i}" for k, t in other.tensors().items() if k.endswith("index") for i in t.tolist()}
    assert len(mine & theirs) > 0.99 * len(theirs)  # ties at the bound may fall either way


def test_a_layer_that_is_called_twice_has_one_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    net, x = Twice(), torch.randn(3, 4)
    loss = lambda model, batch: model(batch).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(net, x), net.layer.weight)[0].square().flatten().topk(5).indices
    method = peft.apply(net, FishMask(5 / 16, samples=[x], loss=loss))
    assert method.tensors()["layer.index"].tolist() == sorted(expected.tolist())


def test_samples_may_come_later():
    net = build("llama", False)
    method = peft.apply(net, FishMask(0.01))
    assert method.trainable_parameters() == {}
    with pytest.raises(peft.MethodError, match="select"):
        method.save("nowhere")
    net.train()
    method.select(iter([inputs("llama")]))
    assert all(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in method.trainable_parameters().values()
    }
    with pytest.raises(peft.MethodError, match="already"):
        method.select([inputs("llama")])


@pytest.mark.parametrize("packed", [False, True])
def test_merging(packed):
    net = build("gpt2", packed)
    before = logits(net, "gpt2")
    method = peft.apply(net, FishMask(0.05, samples=[inputs("gpt2")]))
    disturb(method)
    expected = logits(net, "gpt2")
    method.merge()
    if packed:
        assert (logits(net, "gpt2") - expected).norm() < (before - expected).norm()
    else:
        torch.testing.assert_close(logits(net, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_samples_that_do_not_tell_are_refused():
    net = build("llama", False)
    ids = {"input_ids": inputs("llama")["input_ids"]}
    for samples, words in [([], "no sample"), ([ids], "no loss"), ([torch.zeros(2)], "no loss")]:
        with pytest.raises(peft.MethodError, match=words):
            peft.apply(net, FishMask(samples=samples))
    with pytest.raises(peft.MethodError, match="does not depend"):
        peft.apply(net, FishMask(samples=[1], loss=lambda model, batch: torch.zeros(())))
    with pytest.raises(peft.MethodError, match="NaN"):
        peft.apply(net, FishMask(samples=[inputs("llama")], loss=lambda m, b: m(**b).loss * float("nan")))
    with pytest.raises(peft.MethodError, match="no gradient reaches"):
        peft.apply(net, FishMask(samples=[inputs("llama")], loss=lambda m, b: m(**b).loss * 0.0))
    with pytest.raises(peft.MethodError, match="share"):
        FishMask(share=0.0)
    with pytest.raises(ValueError, match="matches no module"):
        peft.apply(net, FishMask(target_modules=["c_attn"]))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_files_of_other_models_are_refused(tmp_path):
    method = peft.apply(build("llama", False), FishMask(0.01, samples=[inputs("llama")]))
    method.save(tmp_path)
    with pytest.raises(peft.MethodError, match="no linear layer of this model"):
        peft.load(build("gpt2", False), tmp_path)
    state = method.state_dict()
    key = next(key for key in state if key.endswith("index"))
    net = build("llama", False)
    other = peft.apply(net, FishMask(0.01, samples=[inputs("gpt2")]))
    before = other.state_dict()
    with pytest.raises(peft.MethodError, match="ascending"):
        other.load_state_dict(state | {key: torch.zeros_like(state[key])})
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    moved = dict(state)
    moved[key] = torch.arange(len(state[key]), dtype=torch.int32)
    moved[key.replace("index", "values")] = torch.ones(len(state[key]))
    expected = logits(net, "llama")
    other.load_state_dict(moved)  # other positions, as many
    assert not torch.equal(logits(net, "llama"), expected)
    other.load_state_dict(state)
    assert torch.equal(logits(net, "llama"), expected)
    fresh = peft.apply(build("llama", False), FishMask(0.01))
    with pytest.raises(peft.MethodError, match="ascending"):
        fresh.load_state_dict(state | {key: state[key].flip(0) + 2**20})
    with pytest.raises(peft.MethodError, match="as many values"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != key})


def test_copies_have_changes_of_their_own():
    net = build("llama", True)
    peft.apply(net, FishMask(0.05, samples=[inputs("llama")]))
    twin = copy.deepcopy(net)
    disturb(peft.applied(twin)[0])
    assert not torch.equal(logits(twin, "llama"), logits(net, "llama"))
    peft.applied(twin)[0].remove()
    assert torch.equal(logits(twin, "llama"), logits(net, "llama"))


def test_on_every_device(device):
    net = build("llama", True).to(device)
    batch = {name: tensor.to(device) for name, tensor in inputs("llama").items()}
    method = peft.apply(net, FishMask(0.05, samples=[batch]))
    here = peft.apply(build("llama", True), FishMask(0.05, samples=[inputs("llama")]))
    mine = {f"{k}/{i}" for k, t in method.tensors().items() if k.endswith("index") for i in t.tolist()}
    theirs = {f"{k}/{i}" for k, t in here.tensors().items() if k.endswith("index") for i in t.tolist()}
    assert len(mine & theirs) > 0.98 * len(theirs)
    optimizer = torch.optim.Adam(method.trainable_parameters().values(), lr=1e-2)
    before = net(**batch).loss.item()
    for _ in range(5):
        net(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert net(**batch).loss.item() < before
