"""Embeddings and head in 4 bits: which layers, tied weights kept once, files, merging, adapters."""

import copy
import json

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.adapters import adapter_layers
from qlora_engine.models.targets import left_by_default
from qlora_engine.nn import NF4Embedding, NF4Linear, TiedNF4Linear
from tests.models.tiny import bert, gpt2, gpt_neox, llama, token_ids

BOTH = {"quantize_embeddings": True, "quantize_head": True}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def decoded(model, plain):
    """A 16-bit model with the weights that a 4-bit one decodes to."""
    for path, layer in model.named_modules():
        if isinstance(layer, (NF4Linear, NF4Embedding)):
            weight = layer.dequantize(torch.float32)
            plain.get_submodule(path).weight.data.copy_(weight.T if getattr(layer, "fan_in_fan_out", 0) else weight)
    return plain


def tensor_bytes(model):
    return sum(t.nbytes for t in model.state_dict().values())


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
@pytest.mark.parametrize("tied", [False, True])
def test_computes_with_the_decoded_weights(make, tied):
    model = qe.prepare(make(tie_word_embeddings=tied), qe.QLoRAConfig(r=4, **BOTH))
    assert isinstance(model.get_input_embeddings(), NF4Embedding)
    assert type(model.get_output_embeddings()) is (TiedNF4Linear if tied else NF4Linear)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)
    torch.testing.assert_close(
        logits_of(model), logits_of(decoded(model, make(tie_word_embeddings=tied))), rtol=1e-4, atol=1e-4
    )


def test_generates():
    model = qe.prepare(llama(tie_word_embeddings=True), qe.QLoRAConfig(r=4, **BOTH)).eval()
    plain = decoded(model, llama(tie_word_embeddings=True)).eval()
    expected, found = (m.generate(token_ids(), max_new_tokens=4, do_sample=False) for m in (plain, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"quantize_embeddings": True}, (NF4Embedding, nn.Linear)),
        ({"quantize_head": True}, (nn.Embedding, NF4Linear)),
        ({"quantize_head": True, "target_modules": "lm_head"}, (nn.Embedding, qe.QLoRALinear)),
        (BOTH, (NF4Embedding, NF4Linear)),
    ],
)
def test_one_or_both(options, kinds):
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4, **options))
    assert (type(model.model.embed_tokens), type(model.lm_head)) == kinds


def test_adapters_reach_the_head_by_name_alone():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4, **BOTH))
    qe.prepare(model, qe.QLoRAConfig(r=2, adapter_name="second"))
    assert "lm_head" not in adapter_layers(model)
    qe.prepare(model, qe.QLoRAConfig(r=2, adapter_name="third", target_modules="lm_head"))
    assert list(adapter_layers(model)["lm_head"].adapters) == ["third"]
    assert left_by_default(qe.quantize_model(llama(), qe.QLoRAConfig(**BOTH))) == {"lm_head"}, "for other methods too"


def test_a_tied_weight_is_there_once():
    tied = qe.quantize_model(llama(tie_word_embeddings=True), qe.QLoRAConfig(**BOTH))
    apart = qe.quantize_model(llama(), qe.QLoRAConfig(**BOTH))
    assert tensor_bytes(apart) - tensor_bytes(tied) == apart.lm_head.nf4_weight.nbytes
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.tie_weights()  # as transformers does now and then
    assert isinstance(tied.lm_head, TiedNF4Linear)
    other = copy.deepcopy(tied)
    assert other.lm_head.embedding is other.model.embed_tokens


def scaled():
    model = llama()

    class Scaled(nn.Embedding):
        pass

    model.model.embed_tokens.__class__ = Scaled
    return model


def shared_with_another():
    model = llama()
    model.other = nn.Embedding(128, 64)
    model.other.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: llama(tie_word_embeddings=True), {"quantize_embeddings": True}, "quantize both"),
        (lambda: llama(tie_word_embeddings=True), {**BOTH, "target_modules": "lm_head"}, "that of the embeddings"),
        (llama, {"quantize_head": True, "skip_modules": "lm_head"}, "skip_modules keeps lm_head"),
        (llama, {"quantize_head": True, "modules_to_save": "lm_head"}, "modules_to_save keeps lm_head"),
        (llama, {"quantize_embeddings": True, "modules_to_save": "embed_tokens"}, "train model.embed_tokens whole"),
        (bert, {"quantize_head": True}, "names no linear output head"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {"quantize_embeddings": True}, "names no input embeddings"),
        (scaled, {"quantize_embeddings": True}, "Scaled is not a table"),
        (shared_with_another, {"quantize_embeddings": True}, "shares its weight with other"),
    ],
)
def test_what_cannot_be_is_said_before_anything_changes(make, options, words):
    model = make()
    with pytest.raises(qe.TargetError, match=words):
        qe.prepare(model, qe.QLoRAConfig(r=4, **options))
    assert not any(isinstance(m, (NF4Linear, NF4Embedding)) for m in model.modules())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_files(tmp_path, tied, double_quant):
    """Streaming equals preparing in place, and what is saved comes back byte for byte."""
    config = qe.QLoRAConfig(double_quant=double_quant, **BOTH)
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "plain")
    prepared = qe.quantize_model(llama(tie_word_embeddings=tied), config)
    streamed = qe.load_quantized(tmp_path / "plain", qe.QLoRAConfig(r=0, double_quant=double_quant, **BOTH))
    qe.save_quantized(streamed, tmp_path / "small")
    again = qe.load_quantized(tmp_path / "small", qe.QLoRAConfig(r=4), dtype=torch.float32)
    for other in (streamed, again):
        state = {n: t for n, t in other.state_dict().items() if "lora" not in n}
        assert state.keys() == prepared.state_dict().keys()
        assert all(torch.equal(state[n], t) for n, t in prepared.state_dict().items())
        assert type(other.lm_head) is (TiedNF4Linear if tied else NF4Linear)
        torch.testing.assert_close(logits_of(other), logits_of(prepared))
    assert "lm_head" not in adapter_layers(again)
    settings = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["modules"]
    assert settings["lm_head"].get("tied_to") == ("model.embed_tokens" if tied else None)
    half = qe.load_quantized(tmp_path / "small", dtype=torch.bfloat16)
    assert half.model.embed_tokens(token_ids()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"embed_tokens are embeddings in 4 bits.*bitsandbytes"):
        qe.save_quantized(again, tmp_path / "bnb", file_format="bitsandbytes")


def test_a_file_that_holds_a_tied_weight_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    model = qe.load_quantized(tmp_path, qe.QLoRAConfig(r=0, **BOTH))
    assert isinstance(model.lm_head, TiedNF4Linear)


def test_a_quantized_model_gets_its_embeddings_quantized_later(tmp_path):
    qe.save_quantized(qe.quantize_model(llama(tie_word_embeddings=True)), tmp_path)
    model = qe.load_quantized(tmp_path, qe.QLoRAConfig(r=4, **BOTH))
    assert isinstance(model.lm_head, TiedNF4Linear)
    assert isinstance(model.model.embed_tokens, NF4Embedding)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_and_back(tmp_path, tied):
    model = qe.prepare(llama(tie_word_embeddings=tied), qe.QLoRAConfig(r=4, **BOTH))
    before, bytes_before = logits_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    report = qe.merge(model, into="fp32")
    assert {layer.name for layer in report.layers} >= {"model.embed_tokens", *(() if tied else ("lm_head",))}
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)
    qe.save_merged(model, tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits_of(loaded), before, rtol=1e-4, atol=1e-4)
    qe.unmerge(model, report)
    assert model.state_dict().keys() == bytes_before.keys()
    assert all(torch.equal(t, bytes_before[n]) for n, t in model.state_dict().items())
    model.tie_weights()
    assert torch.equal(logits_of(model), before)
    qe.merge(model, into="nf4")
    assert torch.equal(model.model.embed_tokens.weight, bytes_before["model.embed_tokens.weight"])
