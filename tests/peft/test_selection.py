import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import IA3, BitFit, LayerSelection
from tests.models.tiny import t5
from tests.peft.cases import build, inputs, logits


def chosen(model, packed=False, **options):
    net = model if isinstance(model, nn.Module) else build(model, packed)
    return set(peft.apply(net, LayerSelection(**options)).trainable_parameters())


def disturb(method):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in method.trainable_parameters().values():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))


def test_what_is_chosen():
    every = set(build("llama", False).state_dict())
    last = {name for name in every if name.startswith("model.layers.1.")}
    norms = {name for name in every if "norm" in name}
    assert chosen("llama", last=1) == last
    assert chosen("llama", last=2) == {name for name in every if ".layers." in name}
    assert chosen("llama", norms=True) == norms
    assert chosen("llama", head=True) == {"lm_head.weight"}
    assert chosen("llama", embeddings=True) == {"model.embed_tokens.weight"}
    assert chosen("llama", last=1, norms=True) == last | norms
    assert chosen("llama", target_modules=["q_proj"]) == {name for name in every if "q_proj" in name}
    assert chosen("llama", target_modules="re:.*1.mlp") == {name for name in every if ".1.mlp" in name}
    assert chosen("bert", head=True) == {"classifier.weight", "classifier.bias"}
    assert chosen("gpt2", target_modules=["c_fc.bias"]) == {f"transformer.h.{i}.mlp.c_fc.bias" for i in (0, 1)}


def test_every_stack_has_a_last_block():
    names = chosen(t5(), last=1)
    assert {name.split(".block.")[0] for name in names} == {"encoder", "decoder"}
    assert all(".block.1." in name for name in names)


def test_layers_in_four_bits_are_refused_with_the_way_out():
    net = build("gpt2", True)
    with pytest.raises(peft.MethodError, match=r"h\.1\.attn\.c_attn\.weight.*in 4 bits.*skip_quantized"):
        peft.apply(net, LayerSelection(last=1))
    assert peft.applied(net) == []
    left = chosen(net, last=1, skip_quantized=True)
    assert "transformer.h.1.attn.c_attn.bias" in left
    assert "transformer.h.1.ln_1.weight" in left
    assert "transformer.h.1.attn.c_attn.weight" not in left
    with pytest.raises(peft.MethodError, match="no parameters that can be trained"):
        peft.apply(build("llama", True), LayerSelection(target_modules=["q_proj"], skip_quantized=True))


def test_wrong_choices_are_refused():
    net = build("llama", False)
    for options, words in [
        ({}, "nothing is chosen"),
        ({"last": 3}, "more blocks than there are"),
        ({"last": -1}, "whole number"),
    ]:
        with pytest.raises(peft.MethodError, match=words):
            peft.apply(net, LayerSelection(**options))
    with pytest.raises(ValueError, match=r"matches no module.*q_proj"):
        peft.apply(net, LayerSelection(target_modules=["q_prj"]))
    with pytest.raises(peft.MethodError, match="normalization layers of Sequential cannot be found"):
        peft.apply(nn.Sequential(nn.Linear(2, 2)), LayerSelection(norms=True))
    assert all(p.requires_grad for p in net.parameters())


def test_a_tied_head_trains_the_embeddings_and_says_so():
    net = build("gpt2", False)
    method = peft.apply(net, LayerSelection(head=True))
    assert len(method.trainable_parameters()) == 1
    assert method.report().notes == {"tied": {"transformer.wte.weight": "lm_head.weight"}}
    disturb(method)
    assert net.lm_head.weight is net.transformer.wte.weight


def test_merged_values_stay():
    net = build("llama", True)
    method = peft.apply(net, LayerSelection(norms=True))
    disturb(method)
    learnt = logits(net, "llama")
    method.merge()
    assert torch.equal(logits(net, "llama"), learnt)


def test_other_methods_keep_what_is_theirs():
    net = build("gpt2", False)
    first = peft.apply(net, IA3())
    second = peft.apply(net, BitFit())
    third = peft.apply(net, LayerSelection(last=1))
    names = set(third.trainable_parameters())
    assert "transformer.h.1.attn.c_attn.weight" in names
    assert not any(name.endswith(("bias", "ia3_l")) for name in names)
    net(**inputs("gpt2")).loss.backward()
    for method in (first, second, third):
        assert all(p.grad is not None for p in method.trainable_parameters().values())


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_norms_are_exchanged_with_peft(model, tmp_path):
    rival = pytest.importorskip("peft")
    net = build(model, False)
    method = peft.apply(net, LayerSelection(norms=True))
    disturb(method)
    method.save(tmp_path / "ours")
    theirs = rival.PeftModel.from_pretrained(build(model, False), tmp_path / "ours").eval()
    assert torch.equal(logits(theirs, model), logits(net, model))

    theirs.save_pretrained(tmp_path / "theirs")
    other = build(model, False)
    loaded = peft.load(other, tmp_path / "theirs")
    assert loaded.name == "selection"
    assert torch.equal(logits(other, model), logits(net, model))


def test_a_part_of_a_norm_is_saved_in_our_own_format():
    method = peft.apply(build("gpt2", False), LayerSelection(target_modules=["ln_1.bias"]))
    assert method.to_peft() is None
