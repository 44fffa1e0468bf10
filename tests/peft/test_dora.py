import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import DoRA, LoRA
from tests.peft.cases import build, logits
from tests.peft.test_lora import perturb
from tests.peft.test_lora_in_peft import give_values, load_in_peft, theirs


def reference(x, weight, A, B, m, bias, scaling):
    """Equation 5 of the paper in float64; the norm is a constant for the gradient."""
    whole = weight + scaling * B @ A
    return F.linear(x, m[:, None] * whole / whole.detach().norm(dim=1, keepdim=True), bias)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_the_papers(packed, bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 33, bias=bias))
    if packed:
        qe.prepare(net, qe.QLoRAConfig(r=0))
    perturb(peft.apply(net, DoRA(r=5, alpha=7)), 0.2)
    layer, x = net[0], torch.randn(4, 9, 70, requires_grad=True)
    branch = layer.lora_default
    weight = (layer.dequantize(torch.float32) if packed else layer.weight).detach().double()
    grad = torch.randn(4, 9, 33)
    net(x).backward(grad)
    ours = [x.grad, branch.lora_A.grad, branch.lora_B.grad, branch.magnitude.grad]
    leaves = [t.detach().double().requires_grad_() for t in (x, branch.lora_A, branch.lora_B, branch.magnitude)]
    y = reference(leaves[0], weight, *leaves[1:], layer.bias.double() if bias else None, 7 / 5)
    torch.testing.assert_close(net(x).double(), y, rtol=1e-4, atol=1e-5)
    y.backward(grad.double())
    for mine, leaf in zip(ours, leaves, strict=True):
        assert (mine.double() - leaf.grad).norm() < 1e-5 * leaf.grad.norm()


def test_the_norm_without_the_whole_weight():
    torch.manual_seed(0)
    for packed in (False, True):
        net = nn.Sequential(nn.Linear(300, 100), nn.ReLU())
        if packed:
            qe.prepare(net, qe.QLoRAConfig(r=0))
        method = perturb(peft.apply(net, DoRA(r=8)), 0.5)
        site = method._sites["0"]
        exact = (site.base().double() + site.branch.delta().double()).norm(dim=1)
        torch.testing.assert_close(site.branch.norm(site.layer).double(), exact, rtol=1e-5, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(site.branch.norm(site.layer).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions(kind, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(kind(3, 8, 3, stride=2, padding=1), nn.ReLU())

    net = network()
    x = torch.randn(2, 3, *[11] * (1 if kind is nn.Conv1d else 2))
    base = net(x)
    method = peft.apply(net, DoRA(r=3, target_modules=["0"]))
    assert torch.equal(net(x), base)
    learnt = perturb(method, 0.2).model(x)
    method.save(tmp_path)
    torch.testing.assert_close(load_in_peft(network(), tmp_path)(x), learnt, rtol=1e-4, atol=1e-5)
    method.merge()
    torch.testing.assert_close(net(x), learnt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_files_are_pefts_both_ways(name, tmp_path):
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query"]}[name]
    net = build(name, False)
    perturb(peft.apply(net, DoRA(r=4, alpha=8, target_modules=targets))).save(tmp_path / "ours")
    other = load_in_peft(build(name, False), tmp_path / "ours")
    torch.testing.assert_close(logits(other, name), logits(net, name), rtol=1e-4, atol=1e-5)
    config = theirs.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True, use_rslora=True)
    model = theirs.get_peft_model(build(name, False), config).eval()
    give_values(model)
    model.save_pretrained(tmp_path / "theirs")
    for packed in (False, True):
        again = build(name, packed)
        method = peft.load(again, tmp_path / "theirs")
        assert method.name == "dora"
        if not packed:
            torch.testing.assert_close(logits(again, name), logits(model, name), rtol=1e-4, atol=1e-5)


def test_lengths_start_where_the_factors_do():
    net, full = build("llama", True), build("llama", False)
    method = peft.apply(net, DoRA(r=8, init="loftq", reference=full.state_dict()))
    for site in method._sites.values():
        torch.testing.assert_close(site.branch.magnitude, (site.base() + site.branch.delta()).norm(dim=1))
    expected, base = logits(full, "llama"), logits(build("llama", True), "llama")
    assert (logits(net, "llama") - expected).norm() < (base - expected).norm()


def test_a_base_that_changes_under_it():
    net = build("llama", False)
    dora = perturb(peft.apply(net, DoRA(r=4, adapter_name="dora")))
    lora = perturb(peft.apply(net, LoRA(r=4, adapter_name="lora")))
    lora.merge()
    for site in dora._sites.values():
        torch.testing.assert_close(site.branch.base_square, site.base().square().sum(dim=1))
    lora.unmerge()
    for site in dora._sites.values():
        torch.testing.assert_close(site.branch.base_square, site.base().square().sum(dim=1))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="not for DoRA"):
        DoRA(init="pissa")
    with pytest.raises(ValueError, match="'wte' matches no module"):
        peft.apply(build("gpt2", False), DoRA(target_modules=["wte"]))
