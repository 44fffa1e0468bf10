import json

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import AdaLoRA
from tests.peft.cases import build, inputs, logits
from tests.peft.test_lora import perturb
from tests.peft.test_lora_in_peft import give_values, load_in_peft, theirs

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "bert": ["query", "value"]}


def train(net, method, name, steps):
    optimizer = torch.optim.AdamW(method.trainable_parameters().values(), lr=1e-2, weight_decay=0.0)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (net(**inputs(name)).loss + method.penalty()).backward()
        optimizer.step()
        method.after_step(step)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_output_gradients_and_penalty_are_the_formulas(packed):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(70, 33))
    if packed:
        qe.prepare(net, qe.QLoRAConfig(r=0))
    method = perturb(peft.apply(net, AdaLoRA(init_r=5, target_r=2, alpha=7, total_steps=3, orthogonality=0.3)), 0.3)
    branch, x, grad = net[0].lora_default, torch.randn(4, 70), torch.randn(4, 33)
    with method.disabled():
        base = net(x).detach().double()
    A, E, B = (p.detach().double().requires_grad_() for p in branch.triplet)
    y = base + 7 / (5 + 1e-5) * x.double() @ (B @ torch.diag(E.flatten()) @ A).T
    torch.testing.assert_close(net(x).double(), y, rtol=1e-4, atol=1e-5)
    one = torch.eye(5, dtype=torch.float64)
    penalty = 0.3 * ((A @ A.T - one).norm() + (B.T @ B - one).norm()) / 2
    torch.testing.assert_close(method.penalty().double(), penalty, rtol=1e-5, atol=0)
    ((net(x) * grad).sum() + method.penalty()).backward()
    ((y * grad).sum() + penalty).backward()
    for mine, leaf in zip(branch.triplet, (A, E, B), strict=True):
        assert (mine.grad.double() - leaf.grad).norm() < 1e-5 * leaf.grad.norm()


def test_the_budget_falls_as_a_cubic():
    method = peft.apply(build("llama", True), AdaLoRA(init_r=10, target_r=4, total_steps=100, t_init=20, t_final=30))
    layers = len(method._sites)
    assert [method.budget(step) for step in (1, 20, 70, 71, 100)] == [10 * layers] * 2 + [4 * layers] * 3
    assert method.budget(45) == int(6 * layers * 0.5**3 + 4 * layers)
    budgets = [method.budget(step) for step in range(1, 101)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_ranks_are_taken_where_they_matter_least(packed, tmp_path):
    net = build("gpt2", packed)
    config = AdaLoRA(init_r=6, target_r=2, total_steps=14, t_init=3, t_final=4, delta_t=2)
    method = peft.apply(net, config)
    base = net(**inputs("gpt2")).loss.item()
    train(net, method, "gpt2", 3)
    assert all(site.branch.lora_E.count_nonzero() == 6 for site in method._sites.values())
    train(net, method, "gpt2", 14)
    ranks = method.ranks()
    assert sum(ranks.values()) == 2 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert method.report().notes["mean_rank"] == 2
    for path, site in method._sites.items():
        assert site.branch.lora_E.count_nonzero() == ranks[path]
        assert not site.branch.lora_E[~site.branch.kept].any()
    assert net(**inputs("gpt2")).loss.item() < base - 0.05
    method.save(tmp_path)
    again = build("gpt2", packed)
    loaded = peft.load(again, tmp_path)
    assert loaded.ranks() == ranks
    torch.testing.assert_close(logits(again, "gpt2"), logits(net, "gpt2"), rtol=1e-5, atol=1e-5)
    if not packed:
        other = load_in_peft(build("gpt2", False), tmp_path)
        torch.testing.assert_close(logits(other, "gpt2"), logits(net, "gpt2"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pefts_allocator_takes_the_same(name, tmp_path):
    steps = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}
    config = theirs.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=6, target_modules=TARGETS[name], **steps)
    model = theirs.get_peft_model(build(name, False), config)
    model.save_pretrained(tmp_path / "start")
    model.eval()
    net = build(name, False)
    method = peft.load(net, tmp_path / "start")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(1, 13):
        optimizer.zero_grad()
        model.base_model(**inputs(name)).loss.backward()  # with its penalty; PeftModel without a task leaves it out
        optimizer.step()
        model.base_model.update_and_allocate(step)
    train(net, method, name, 12)
    pattern = model.peft_config["default"].rank_pattern
    for path, site in method._sites.items():
        assert site.branch.kept.tolist() == pattern[f"{path}.lora_E.default"]
    assert set(method.ranks().values()) != {3}
    torch.testing.assert_close(logits(net, name), logits(model, name), rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "end")
    again = build(name, False)
    assert peft.load(again, tmp_path / "end").ranks() == method.ranks()
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_files_before_ranks_are_fixed(name, tmp_path):
    net = build(name, False)
    options = {"init_r": 5, "target_r": 2, "target_modules": TARGETS[name]}
    perturb(peft.apply(net, AdaLoRA(total_steps=9, **options)), 0.2).save(tmp_path / "ours")
    other = load_in_peft(build(name, False), tmp_path / "ours")
    torch.testing.assert_close(logits(other, name), logits(net, name), rtol=1e-4, atol=1e-5)
    model = theirs.get_peft_model(build(name, False), theirs.AdaLoraConfig(total_step=9, **options)).eval()
    give_values(model)
    model.save_pretrained(tmp_path / "theirs")
    again = build(name, False)
    peft.load(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again, name), logits(model, name), rtol=1e-4, atol=1e-5)


def test_what_it_refuses(tmp_path):
    for options, message in (
        ({}, "number of steps"),
        ({"total_steps": 5, "t_init": 3, "t_final": 2}, "no step is left"),
        ({"total_steps": 5, "target_r": 13}, "0 to init_r"),
        ({"total_steps": 5, "beta1": 1.0}, "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaLoRA(**options)
    method = peft.apply(build("llama", False), AdaLoRA(init_r=3, target_r=1, total_steps=5))
    with pytest.raises(peft.MethodError, match="needs gradients"):
        method.after_step(1)
    method.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for pattern, message in ([True], "has 1 entries"), ([True, False, True], "does not fit"):
        name = "model.layers.0.mlp.up_proj.lora_E"
        path.write_text(json.dumps(config | {"rank_pattern": {name: pattern}}))
        net = build("llama", False)
        with pytest.raises(peft.MethodError, match=message):
            peft.load(net, tmp_path)
        assert peft.applied(net) == []


def test_importances_go_on_from_where_they_were():
    config = AdaLoRA(init_r=4, target_r=1, total_steps=8, t_final=2)
    whole = peft.apply(build("llama", True), config)
    train(whole.model, whole, "llama", 3)
    parts = peft.apply(build("llama", True), config)
    parts.load_state_dict(whole.state_dict())
    parts.resume(3, {name: mean.clone() for name, mean in whole.progress().items()})
    anew = peft.apply(build("llama", True), config)
    anew.load_state_dict(whole.state_dict())
    anew.resume(3)
    assert not anew.progress()
    for method in (whole, parts, anew):
        method.model.zero_grad()
        method.model(**inputs("llama")).loss.backward()
        method.after_step(4)
    expected, got, other = (method.progress() for method in (whole, parts, anew))
    assert expected.keys() == got.keys()
    assert all(torch.equal(mean, got[name]) for name, mean in expected.items())
    assert any(not torch.equal(mean, other[name]) for name, mean in expected.items())
    small = peft.apply(build("llama", True), AdaLoRA(init_r=2, target_r=1, total_steps=8))
    with pytest.raises(peft.MethodError, match="missing, or of another rank"):
        small.resume(3, expected)
