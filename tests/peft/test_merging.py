"""Merging methods of the LoRA family into the base weights, and the way back."""

import pytest
import torch

from qlora_engine import peft
from qlora_engine.nn import NF4Linear
from qlora_engine.peft import AdaLoRA, DoRA, LoRA, LoRAFA, VeRA
from tests.peft.cases import build, logits
from tests.peft.test_lora import EVERYTHING, Mixed, perturb

CONFIGS = {
    "lora": LoRA(r=4, alpha=8),
    "pissa": LoRA(r=4, init="pissa"),
    "dora": DoRA(r=4, alpha=8),
    "vera": VeRA(r=16),
    "adalora": AdaLoRA(init_r=6, total_steps=9, target_r=4),
    "lora_fa": LoRAFA(r=4, alpha=8),
}
METHODS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
BASES = pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@METHODS
@BASES
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("into", [None, "fp32", "bf16"])
def test_merged_computes_the_same_and_unmerge_is_exact(config, packed, name, into):
    torch.manual_seed(0)
    net = build(name, packed)
    before, base, dtype = state(net), logits(net, name), net.config.dtype
    method = perturb(peft.apply(net, config))
    applied, learnt = state(net), logits(net, name)
    assert method.merge(into=into) is net
    assert peft.applied(net) == []
    merged = logits(net, name).float()
    exact = into == "fp32" or (into is None and not packed)
    bound = 1e-4 if exact else 0.15
    assert (merged - learnt).norm() < bound * (learnt - base).norm() + bound * learnt.norm()
    if into:
        assert not any(isinstance(m, NF4Linear) for m in net.modules())
        assert {p.dtype for p in net.parameters()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[into]}
    else:
        assert state(net).keys() == before.keys()
    for layer in method.merge_report.layers:
        assert layer.delta_norm > 0
        assert layer.error < (1e-6 if exact else 0.12) * (1 + layer.delta_norm)
        if exact or layer.delta_norm > 0.2:  # smaller changes drown in 4 bits
            assert layer.kept == pytest.approx(1, abs=1e-3 if exact else 0.5)
    assert method.unmerge() is net
    same(state(net), applied)
    assert torch.equal(logits(net, name), learnt)
    assert peft.applied(net) == [method]
    method.remove()
    same(state(net), before)
    assert torch.equal(logits(net, name), base)
    assert net.config.dtype == dtype


def test_merged_in_16_bits_loads_without_this_package(tmp_path):
    from transformers import AutoModelForCausalLM

    net = build("gpt2", True)
    method = perturb(peft.apply(net, LoRA(r=4)))
    method.merge(into="bf16").save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert type(other) is type(build("gpt2", False))
    assert torch.equal(logits(other, "gpt2"), logits(net, "gpt2"))


def test_a_shared_weight_becomes_the_layers_own():
    net = build("gpt2", False)
    method = perturb(peft.apply(net, LoRA(r=4, target_modules=["wte"])))
    head, learnt = net.lm_head.weight, logits(net, "gpt2")
    method.merge()
    torch.testing.assert_close(logits(net, "gpt2"), learnt, rtol=1e-4, atol=1e-5)
    assert net.lm_head.weight is head
    assert net.transformer.wte.weight is not head
    assert not net.config.tie_word_embeddings
    method.unmerge()
    assert net.transformer.wte.weight is net.lm_head.weight
    assert net.config.tie_word_embeddings
    assert net.all_tied_weights_keys


@BASES
def test_what_is_not_finite_is_refused_before_anything_changes(packed):
    net = build("llama", packed)
    method = perturb(peft.apply(net, LoRA(r=4)))
    with torch.no_grad():
        method._sites["model.layers.1.mlp.up_proj"].factors[1][3, 2] = float("inf")
    before = state(net)
    for into in (None, "bf16"):
        with pytest.raises(peft.MethodError, match=r"layers.1.mlp.up_proj has NaN or infinity"):
            method.merge(into=into)
    same(state(net), before)
    assert peft.applied(net) == [method]


def test_an_overflow_in_16_bits_is_refused():
    net = build("llama", True)
    method = peft.apply(net, LoRA(r=1, alpha=1))
    with torch.no_grad():
        A, B = method._sites["model.layers.0.mlp.up_proj"].factors
        A.fill_(300.0)
        B.fill_(300.0)
    with pytest.raises(peft.MethodError, match="NaN or infinity"):
        method.merge(into="fp16")
    method.merge(into="bf16")


def test_what_merge_refuses():
    net = build("llama", True)
    one, two = (peft.apply(net, LoRA(r=2, adapter_name=name)) for name in ("one", "two"))
    with pytest.raises(peft.MethodError, match="expected None or one of bf16"):
        one.merge(into="int8")
    with pytest.raises(peft.MethodError, match="other methods are on the model"):
        one.merge(into="bf16")
    one.merge(keep_original=False)
    with pytest.raises(peft.MethodError, match="holds no weights"):
        one.unmerge()
    with pytest.raises(peft.MethodError, match="not on this model"):
        one.merge()
    two.merge(into="bf16")
    assert not any(isinstance(m, NF4Linear) for m in net.modules())


def test_every_kind_of_layer_comes_back():
    torch.manual_seed(0)
    net, ids = Mixed(padding=1), torch.randint(0, 17, (3, 9))
    before = state(net)
    method = perturb(peft.apply(net, LoRA(r=3, target_modules=EVERYTHING)), 0.3)
    learnt = net(ids)
    method.merge()
    torch.testing.assert_close(net(ids), learnt, rtol=1e-4, atol=1e-5)
    method.unmerge()
    assert torch.equal(net(ids), learnt)
    method.remove()
    same(state(net), before)


def test_biases_and_whole_modules_stay_and_come_back():
    net = build("bert", True)
    before = state(net)
    config = LoRA(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    method = perturb(peft.apply(net, config))
    learnt, classifier = logits(net, "bert"), net.classifier.weight.detach().clone()
    method.merge()
    assert torch.equal(net.classifier.weight, classifier)
    method.unmerge()
    assert torch.equal(logits(net, "bert"), learnt)
    method.remove()
    same(state(net), before)
