import copy

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import IA3
from tests.peft.cases import build, inputs, logits


def disturb(method, seed=3):
    """Factors away from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in method.trainable_parameters().values():
            param.copy_(1 + 0.3 * torch.randn(param.shape, generator=generator))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, groups=2)
        self.plane = nn.Conv2d(1, 5, 2, bias=False)

    def forward(self, x):
        return self.plane(self.line(x)[:, None])


def test_the_paper_layers_are_found():
    names = {
        model: {key.rsplit(".", 2)[-2] for key in peft.apply(build(model, False), IA3()).tensors()}
        for model in ("llama", "gpt2", "bert")
    }
    assert names["llama"] == {"k_proj", "v_proj", "down_proj"}
    assert names["gpt2"] == {"c_attn", "c_proj"}
    net = build("bert", False)
    method = peft.apply(net, IA3())
    assert [key for key in method.tensors() if "layer.0" in key] == [
        f"bert.encoder.layer.0.{path}.ia3_l"
        for path in ("attention.self.key", "attention.self.value", "output.dense")
    ]
    assert method.tensors()["bert.encoder.layer.0.output.dense.ia3_l"].shape == (96,)


def test_it_is_the_formula():
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    reference = copy.deepcopy(net)
    method = peft.apply(net, IA3(["0", "1"], ["1"]))
    disturb(method)
    first, second = (p.detach().double() for p in method.trainable_parameters().values())
    hidden = first * reference[0](x)
    assert torch.equal(net(x), reference[1](second * hidden))


@pytest.mark.parametrize("feedforward", [[], ["line", "plane"]])
def test_convolutions_merge(feedforward):
    net, x = Convolutions(), torch.randn(2, 4, 9)
    method = peft.apply(net, IA3(["line", "plane"], feedforward))
    disturb(method)
    expected = net(x)
    method.merge()
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_merging_keeps_the_output(model):
    net = build(model, False)
    method = peft.apply(net, IA3())
    disturb(method)
    expected = logits(net, model)
    method.merge()
    assert not peft.applied(net)
    torch.testing.assert_close(logits(net, model), expected, rtol=1e-4, atol=1e-5)


def test_merging_into_four_bits_is_near():
    net = build("llama", True)
    before = logits(net, "llama")
    method = peft.apply(net, IA3())
    disturb(method)
    expected = logits(net, "llama")
    method.merge()
    assert (logits(net, "llama") - expected).norm() < 0.5 * (expected - before).norm()


def test_wrong_targets_are_refused():
    net = build("llama", False)
    with pytest.raises(ValueError, match=r"target_modules: 'key' matches no module.*"):
        peft.apply(net, IA3(["key"]))
    with pytest.raises(ValueError, match="feedforward_modules"):
        peft.apply(net, IA3(["k_proj"], ["down_proj"]))
    with pytest.raises(peft.MethodError, match=r"not known.*name them.*among 0"):
        peft.apply(nn.Sequential(nn.Linear(2, 2)), IA3())


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_peft_loads_ours(model, tmp_path):
    rival = pytest.importorskip("peft")
    net = build(model, False)
    method = peft.apply(net, IA3())
    disturb(method)
    method.save(tmp_path)
    theirs = rival.PeftModel.from_pretrained(build(model, False), tmp_path).eval()
    torch.testing.assert_close(logits(theirs, model), logits(net, model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_ours_loads_peft(model, tmp_path):
    rival = pytest.importorskip("peft")
    names = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        "bert": (["key", "value"], []),
    }
    targets, ends = names[model]
    config = rival.IA3Config(target_modules=targets, feedforward_modules=ends)
    theirs = rival.get_peft_model(build(model, False), config).eval()
    generator = torch.Generator().manual_seed(5)
    for name, param in theirs.named_parameters():
        if "ia3_l" in name:
            param.data.copy_(1 + 0.3 * torch.randn(param.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    net = build(model, False)
    method = peft.load(net, tmp_path)
    assert method.name == "ia3"
    torch.testing.assert_close(logits(net, model), logits(theirs, model), rtol=1e-5, atol=1e-5)
    packed = build(model, True)
    peft.load(packed, tmp_path)
    assert not torch.equal(logits(packed, model), logits(build(model, True), model))


def test_two_of_them_multiply():
    net = build("llama", False)
    first = peft.apply(net, IA3(["k_proj"]))
    second = peft.apply(net, IA3(["k_proj"], ["k_proj"]))
    disturb(first)
    alone = logits(net, "llama")
    disturb(second, 4)
    assert not torch.equal(logits(net, "llama"), alone)
    second.remove()
    assert torch.equal(logits(net, "llama"), alone)
    assert all(p.requires_grad for p in first.trainable_parameters().values())


def test_copies_have_parts_of_their_own():
    net = build("llama", True)
    method = peft.apply(net, IA3())
    twin = copy.deepcopy(net)
    disturb(peft.applied(twin)[0])
    assert not torch.equal(logits(twin, "llama"), logits(net, "llama"))
    assert torch.equal(logits(net, "llama"), logits(build("llama", True), "llama"))
    peft.applied(twin)[0].remove()
    assert torch.equal(logits(twin, "llama"), logits(net, "llama"))
    assert peft.applied(net) == [method]


def test_half_precision_stays():
    net = qe.prepare(build("llama", False).bfloat16(), qe.QLoRAConfig(r=0))
    method = peft.apply(net, IA3())
    batch = inputs("llama")
    out = net(**batch)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.norm() > 0 for p in method.trainable_parameters().values())
