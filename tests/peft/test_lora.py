import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.nn import NF4Linear, QLoRALinear
from qlora_engine.optim import lora_plus_groups
from qlora_engine.peft import AdaLoRA, BitFit, DoRA, LoRA, LoRAFA, VeRA
from tests.peft.cases import build, inputs, logits


def perturb(method, sigma=0.05):
    """Gives everything that is trained values that matter."""
    with torch.no_grad():
        for tensor in method.trainable_parameters().values():
            tensor.add_(torch.randn_like(tensor), alpha=sigma)
    return method


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self, **convolution):
        super().__init__()
        self.table = nn.Embedding(17, 6, padding_idx=0)
        self.one = nn.Conv1d(6, 10, 3, **convolution)
        self.two = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(0, 1))
        self.out = nn.Linear(7, 5, bias=False)

    def forward(self, ids):
        x = self.one(self.table(ids).transpose(1, 2))
        x = self.two(x[:, None]).flatten(1)[:, :7]
        return self.out(x)


EVERYTHING = ["table", "one", "two", "out"]


@pytest.mark.parametrize("convolution", [{}, {"dilation": 2}, {"padding": 2, "padding_mode": "circular"}], ids=str)
def test_every_kind_of_layer_computes_what_its_merged_weight_does(convolution):
    torch.manual_seed(0)
    net, ids = Mixed(**convolution).double(), torch.randint(0, 17, (3, 9))
    base = net(ids)
    method = perturb(peft.apply(net, LoRA(r=3, alpha=5, target_modules=EVERYTHING)), 0.3)
    net.double()
    A, B = net.out.lora_default.lora_A, net.out.lora_default.lora_B
    x = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(net.out(x), x @ (net.out.weight + 5 / 3 * B @ A).T)
    table = (
        net.table.weight
        + 5 / 3 * (net.table.lora_default.lora_embedding_B @ net.table.lora_default.lora_embedding_A).T
    )
    torch.testing.assert_close(net.table(ids), F.embedding(ids, table))
    learnt = net(ids)
    assert (learnt - base).abs().max() > 1e-3
    method.merge()
    torch.testing.assert_close(net(ids), learnt, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in net.named_modules())


def test_dropout_is_on_the_branch_alone():
    torch.manual_seed(0)
    for packed in (False, True):
        net = build("llama", packed)
        expected = logits(net, "llama")
        method = peft.apply(net, LoRA(r=4, dropout=0.5, init="gaussian"))
        net.train()
        assert torch.equal(logits(net, "llama"), expected)  # B is zero: what is dropped does not show
        perturb(method)
        assert not torch.equal(logits(net, "llama"), logits(net, "llama"))
        net.eval()
        assert torch.equal(logits(net, "llama"), logits(net, "llama"))


@pytest.mark.parametrize("packed", [False, True])
def test_patterns_of_rank_and_alpha(packed):
    net = build("llama", packed)
    options = {
        "rank_pattern": {"q_proj": 2, "re:.*layers\\.1\\.mlp.*": 0},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 32},
    }
    method = peft.apply(net, LoRA(r=4, alpha=8, exclude_modules=["v_proj"], **options))
    tensors = method.tensors()
    assert tensors["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 64)
    assert tensors["model.layers.0.mlp.up_proj.lora_B.weight"].shape == (96, 4)
    assert not any("layers.1.mlp" in name or "v_proj" in name or "lm_head" in name for name in tensors)
    assert "r=2, scaling=16" in repr(net.model.layers[0].self_attn.q_proj)
    assert "r=2, scaling=4" in repr(net.model.layers[1].self_attn.q_proj)


def test_rank_zero_adds_nothing():
    net = build("llama", True)
    method = peft.apply(net, LoRA(r=0))
    assert method.trainable_parameters() == {}
    assert method.report().trainable == 0
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("packed", [False, True])
def test_named_adapters_add_up_and_leave_one_by_one(packed):
    net = build("gpt2", packed)
    base = logits(net, "gpt2")
    one = perturb(peft.apply(net, LoRA(r=4, adapter_name="one")))
    with_one = logits(net, "gpt2")
    two = perturb(peft.apply(net, LoRA(r=2, adapter_name="two")))
    with_both = logits(net, "gpt2")
    with pytest.raises(peft.MethodError, match=r"already.*another adapter_name"):
        peft.apply(net, LoRA(r=2, adapter_name="two"))
    assert torch.equal(logits(net, "gpt2"), with_both)
    trained = {id(p) for m in (one, two) for p in m.trainable_parameters().values()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained
    with two.disabled():
        assert torch.equal(logits(net, "gpt2"), with_one)
        with one.disabled():
            assert torch.equal(logits(net, "gpt2"), base)
    one.remove()
    with two.disabled():
        assert torch.equal(logits(net, "gpt2"), base)
    assert not torch.equal(logits(net, "gpt2"), base)
    two.remove()
    assert torch.equal(logits(net, "gpt2"), base)
    assert not any(isinstance(m, QLoRALinear) for m in net.modules())


def test_beside_adapters_of_prepare():
    net = qe.prepare(build("llama", False), qe.QLoRAConfig(r=2)).eval()
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    before = logits(net, "llama")
    method = perturb(peft.apply(net, LoRA(r=4, adapter_name="second")))
    assert not torch.equal(logits(net, "llama"), before)
    method.remove()
    assert torch.equal(logits(net, "llama"), before)


@pytest.mark.parametrize("first", ["bitfit", "lora"])
def test_with_another_method_on_the_same_4_bit_layers(first):
    net = build("llama", True)
    base = logits(net, "llama")
    configs = {"bitfit": BitFit(add_missing=True), "lora": LoRA(r=4)}
    order = [first, *(set(configs) - {first})]
    methods = [perturb(peft.apply(net, configs[name])) for name in order]
    both = logits(net, "llama")
    net(**inputs("llama")).loss.backward()
    assert all(p.grad is not None for m in methods for p in m.trainable_parameters().values())
    methods[0].disable()
    assert not torch.equal(logits(net, "llama"), both)
    methods[0].enable()
    assert torch.equal(logits(net, "llama"), both)
    methods[0].remove()
    assert not torch.equal(logits(net, "llama"), base)
    methods[1].remove()
    assert torch.equal(logits(net, "llama"), base)


def test_biases_and_whole_modules_are_trained_and_come_back():
    net = build("bert", True)
    before, base = {n: t.clone() for n, t in net.state_dict().items()}, logits(net, "bert")
    method = peft.apply(net, LoRA(r=2, target_modules=["query"], bias="lora_only", modules_to_save=["classifier"]))
    extra = {name for name in method.trainable_parameters() if "lora" not in name}
    assert extra == {
        "classifier.weight",
        "classifier.bias",
        *(f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)),
    }
    perturb(method)
    with method.disabled():
        assert torch.equal(logits(net, "bert"), base)
    method.remove()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    with pytest.raises(peft.MethodError, match="in 4 bits; give it an adapter"):
        peft.apply(net, LoRA(target_modules=["query"], modules_to_save=["value"]))
    with pytest.raises(peft.MethodError, match=r"lm_head.weight is also transformer.wte"):
        peft.apply(build("gpt2", False), LoRA(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_orthogonal_factors_cancel(rank):
    net = nn.Sequential(nn.Linear(20, 12))
    site = peft.apply(net, LoRA(r=rank, init="orthogonal"))._sites["0"]
    A, B = site.factors
    assert A.norm() > 0.1
    assert B.norm() > 0.1
    assert (B @ A).abs().max() < 1e-6


def test_both_random_says_how_much_it_disturbs():
    net = build("llama", False)
    base = logits(net, "llama")
    with pytest.warns(UserWarning, match=r"\|\|dW\|\| / \|\|W\|\|"):
        method = peft.apply(net, LoRA(r=4, init="both", sigma=0.05))
    assert not torch.equal(logits(net, "llama"), base)
    site = method._sites["model.layers.0.mlp.up_proj"]
    A, B = (f.detach().double() for f in site.factors)
    share = float((4.0 * B @ A).norm() / site.layer.weight.double().norm())
    assert 0 < share <= method.report().notes["disturbance"] * (1 + 1e-5)
    assert f"{method.notes()['disturbance']}" in str(method.report())


def test_pissa_holds_the_largest_singular_vectors():
    net = build("llama", False)
    method = peft.apply(net, LoRA(r=4, alpha=8, init="pissa"))
    site = method._sites["model.layers.1.mlp.gate_proj"]
    A, B = (f.detach().double() for f in site.factors)
    S = torch.linalg.svdvals(site.layer.weight.double())
    torch.testing.assert_close(torch.linalg.svdvals(2 * B @ A)[:4], S[:4], rtol=1e-4, atol=1e-5)
    rest = torch.linalg.matrix_norm(site.layer.weight.double() - 2 * B @ A, ord=2)
    torch.testing.assert_close(rest, S[4], rtol=1e-4, atol=1e-5)
    with pytest.raises(peft.MethodError, match="rank 65 is more than"):
        peft.apply(build("llama", False), LoRA(r=65, init="pissa"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loftq_takes_off_quantization_error(name, tmp_path):
    full = build(name, False)
    expected = logits(full, name)
    errors = []
    for rank in (0, 4, 16):
        net = build(name, True)
        method = peft.apply(net, LoRA(r=rank, init="loftq", reference=full.state_dict()))
        errors.append(float((logits(net, name) - expected).norm()))
        for before, after in method.quantization_errors.values():
            assert after < before < 0.15
    assert errors[0] > errors[1] > errors[2]
    full.save_pretrained(tmp_path)
    again = build(name, True)
    peft.apply(again, LoRA(r=16, init="loftq", reference=str(tmp_path)))
    torch.testing.assert_close(logits(again, name), logits(net, name))


EXCHANGES = {
    "loftq": LoRA(r=8, alpha=16, init="loftq", loftq_iterations=4),
    "pissa": LoRA(r=8, alpha=16, init="pissa"),
    "dora": DoRA(r=8, alpha=16, init="loftq", loftq_iterations=3),
}


@pytest.mark.parametrize("case", EXCHANGES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_4_bit_weights_exchanged_at_the_start_come_back(case, name, tmp_path):
    full, net = build(name, False), build(name, True)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    base, expected = logits(net, name), logits(full, name)
    method = peft.apply(net, dataclasses.replace(EXCHANGES[case], reference=full.state_dict()))
    assert (logits(net, name) - expected).norm() < (base - expected).norm()
    assert all(after < error for error, after in method.quantization_errors.values())
    assert method.report().notes["quantization_error"] < method.report().notes["quantization_error_before"]
    site = next(iter(method._sites.values()))
    wanted = full.state_dict()[f"{site.path}.weight"]
    wanted = wanted.T if name == "gpt2" else wanted
    exact = float((wanted - site.merged()).norm() / wanted.norm())
    assert method.quantization_errors[site.path][1] == pytest.approx(exact, rel=1e-3)
    perturb(method)
    learnt = logits(net, name)
    with method.disabled():
        assert torch.equal(logits(net, name), base)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items() if n in before)
    assert torch.equal(logits(net, name), learnt)
    method.save(tmp_path)
    other = build(name, True)
    loaded = peft.load(other, tmp_path)
    torch.testing.assert_close(logits(other, name), learnt, rtol=1e-5, atol=1e-5)
    for merged, into in ((loaded, None), (method, "fp32")):
        merged.merge(into=into)
        if into:
            torch.testing.assert_close(logits(net, name), learnt, rtol=1e-3, atol=1e-4)
        merged.unmerge()
        torch.testing.assert_close(logits(merged.model, name), learnt, rtol=1e-5, atol=1e-5)
        merged.remove()
        after = merged.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_more_iterations_take_off_more():
    full, errors = build("llama", False), []
    for iterations in (1, 2, 5):
        config = LoRA(r=8, init="loftq", loftq_iterations=iterations, reference=full.state_dict())
        errors.append(peft.apply(build("llama", True), config).notes()["quantization_error"])
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(
    ("config", "packed", "message"),
    [
        (LoRA(target_modules=["q_prj"]), False, "matches no module. Near matches: q_proj"),
        (LoRA(exclude_modules=["re:.*proj"]), True, "leaves no layer; layers that can carry it: .*q_proj"),
        (LoRA(init="loftq"), True, "needs reference"),
        (LoRA(init="loftq", reference={"x": 1}), False, "is not in 4 bits"),
        (LoRA(init="loftq", reference={"x": 1}), True, "has no tensor model.layers.0.self_attn.q_proj.weight"),
        (LoRA(r=1, init="orthogonal"), False, "r must be at least 2"),
    ],
)
def test_what_a_model_cannot_carry_leaves_it_unchanged(config, packed, message):
    net = build("llama", packed)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        peft.apply(net, config)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert not any(isinstance(m, QLoRALinear) for m in net.modules())
    assert peft.applied(net) == []


def test_wrong_settings():
    for options in (
        {"r": -1},
        {"r": 2.5},
        {"dropout": 1.0},
        {"init": "zeros"},
        {"bias": "some"},
        {"adapter_name": "a.b"},
    ):
        with pytest.raises(ValueError, match=r"expected|must not"):
            LoRA(**options)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.raises(peft.MethodError, match="convolution in groups"):
        peft.apply(net, LoRA(target_modules=["0"]))


def test_factors_are_found_by_lora_plus():
    for packed in (False, True):
        net = build("llama", packed)
        method = peft.apply(net, LoRA(r=2, target_modules=["q_proj", "embed_tokens"]))
        groups = lora_plus_groups(net, 1e-3, ratio=4)
        assert [g["lr"] for g in groups] == [1e-3, 4e-3]
        assert {id(p) for p in groups[1]["params"]} == {id(s.factors[1]) for s in method._sites.values()}


SIXTEEN = {
    "lora": LoRA(r=4, target_modules=["all-linear", "embed_tokens"]),
    "pissa": LoRA(r=4, init="pissa"),
    "dora": DoRA(r=4),
    "lora_fa": LoRAFA(r=4),
    "vera": VeRA(r=16),
    "adalora": AdaLoRA(init_r=4, target_r=2, total_steps=5),
}


@pytest.mark.parametrize("config", SIXTEEN.values(), ids=SIXTEEN.keys())
@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_models_in_16_bits_keep_their_dtype(config, packed):
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        net = build("llama", packed).to(torch.bfloat16)
        torch.manual_seed(0)
        method = perturb(peft.apply(net, config))
        assert {p.dtype for p in method.trainable_parameters().values()} == {torch.float32}
        if dtype == torch.float32:
            net.to(dtype)
        output = net(**inputs("llama"))
        assert output.logits.dtype == dtype
        output.loss.backward()
        results.append([output.logits.float(), *(p.grad.float() for p in method.trainable_parameters().values())])
    low, exact = results
    for mine, wanted in zip(low, exact, strict=True):
        assert (mine - wanted).norm() < 0.05 * wanted.norm() + 1e-4


def test_rank_zero_is_saved_and_loaded(tmp_path):
    peft.apply(build("llama", False), LoRA(r=0)).save(tmp_path)
    net = build("llama", False)
    assert peft.load(net, tmp_path).trainable_parameters() == {}


def test_4_bit_layers_are_fused_and_come_back():
    net = build("llama", True)
    layer = net.model.layers[0].self_attn.q_proj
    method = peft.apply(net, LoRA(r=2))
    assert isinstance(net.model.layers[0].self_attn.q_proj, QLoRALinear)
    method.remove()
    assert net.model.layers[0].self_attn.q_proj is layer
    assert type(layer) is NF4Linear
