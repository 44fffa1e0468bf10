import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import VeRA
from tests.peft.cases import build, logits
from tests.peft.test_lora import perturb
from tests.peft.test_lora_in_peft import give_values, load_in_peft, theirs


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_output_and_gradients_are_the_formulas(packed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 41))
    if packed:
        qe.prepare(net, qe.QLoRAConfig(r=0))
    method = perturb(peft.apply(net, VeRA(r=20)), 0.3)
    assert method._shared.vera_A.shape == (20, 70)
    assert method._shared.vera_B.shape == (41, 20)
    for layer, out_size, in_size in ((net[0], 33, 70), (net[2], 41, 33)):
        branch, x, grad = layer.lora_default, torch.randn(5, in_size), torch.randn(5, out_size)
        A, B = method._shared.vera_A[:, :in_size].double(), method._shared.vera_B[:out_size].double()
        b, d = (p.detach().double().requires_grad_() for p in (branch.vera_lambda_b, branch.vera_lambda_d))
        with method.disabled():
            base = layer(x).detach().double()
        y = base + b * (B @ (d[:, None] * (A @ x.double().T))).T
        torch.testing.assert_close(layer(x).double(), y, rtol=1e-4, atol=1e-5)
        layer(x).backward(grad)
        y.backward(grad.double())
        for mine, leaf in ((branch.vera_lambda_b, b), (branch.vera_lambda_d, d)):
            assert (mine.grad.double() - leaf.grad).norm() < 1e-5 * leaf.grad.norm()


def test_one_pair_of_projections_that_is_not_the_models():
    net = build("llama", False)
    before = set(net.state_dict())
    method = peft.apply(net, VeRA(r=16))
    assert len({id(s.branch.shared) for s in method._sites.values()}) == 1
    assert all("vera_lambda" in name for name in set(net.state_dict()) - before)
    out = sum(s.branch.out_size for s in method._sites.values())
    assert method.report().trainable == out + 16 * len(method._sites)
    small = peft.apply(build("llama", False), VeRA(r=16, save_projection=False)).report()
    assert small.saved_bytes == 4 * small.trainable
    assert method.report().saved_bytes == 4 * (small.trainable + 16 * (96 + 96))


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:Specified to not", "ignore:fan_in_fan_out")
def test_files_are_pefts_both_ways(name, save_projection, tmp_path):
    targets = {
        "llama": ["q_proj", "down_proj"],
        "gpt2": ["c_attn", "mlp.c_proj"],
        "bert": ["query", "intermediate.dense"],
    }
    options = {"r": 12, "target_modules": targets[name], "save_projection": save_projection}
    net = build(name, False)
    perturb(peft.apply(net, VeRA(seed=5, **options)), 0.3).save(tmp_path / "ours")
    other = load_in_peft(build(name, False), tmp_path / "ours")
    torch.testing.assert_close(logits(other, name), logits(net, name), rtol=1e-4, atol=1e-5)
    config = theirs.VeraConfig(projection_prng_key=7, bias="none" if name == "llama" else "vera_only", **options)
    model = theirs.get_peft_model(build(name, False), config).eval()
    give_values(model)
    model.save_pretrained(tmp_path / "theirs")
    again = build(name, False)
    method = peft.load(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=1e-4, atol=1e-5)
    assert peft.load(build(name, True), tmp_path / "theirs").report().trainable == method.report().trainable


def test_what_it_refuses():
    with pytest.raises(ValueError, match="at least 1"):
        VeRA(r=0)
    with pytest.raises(ValueError, match="vera_only"):
        VeRA(bias="lora_only")
    with pytest.raises(ValueError, match="'wte' matches no module"):
        peft.apply(build("gpt2", False), VeRA(target_modules=["wte"]))
