"""What holds for every method with virtual tokens."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import BitFit, PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.models.tiny import t5
from tests.peft.cases import build, inputs, logits
from tests.peft.virtual import disturb

METHODS = {
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "p_tuning_v2": PTuningV2,
}
every = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
causal = pytest.mark.parametrize("name", ["llama", "gpt2"])
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def applied(name, config, **options):
    torch.manual_seed(3)
    net = build(name, False)
    method = peft.apply(net, config(num_virtual_tokens=4, **options))
    disturb(method.trainable_parameters().values())
    return net, method


@every
@causal
def test_padding_on_the_left_changes_nothing(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"][:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1)
    mask = (padded != 0).long()
    alone = net.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)
    beside = net.generate(padded, attention_mask=mask, **GENERATE)
    assert torch.equal(beside[:, 3:], alone)
    cold = net.generate(padded, attention_mask=mask, use_cache=False, **GENERATE)
    assert torch.equal(cold, beside)


@every
@causal
def test_a_cache_goes_on_where_it_was_left(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"]
    with torch.no_grad():
        whole = net(ids).logits
        first = net(ids[:, :7], use_cache=True)
        rest = net(ids[:, 7:], past_key_values=first.past_key_values)
        assert first.past_key_values.get_seq_length() == 4 + ids.shape[1]
        torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-4, atol=1e-5)
        first = net(ids[:, :7], use_cache=True)
        mask, positions = torch.ones_like(ids), torch.arange(7, ids.shape[1])[None]
        rest = net(ids[:, 7:], past_key_values=first.past_key_values, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-4, atol=1e-5)


@every
@causal
def test_generate_goes_on_from_an_earlier_cache(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"]
    more = torch.cat([ids, ids.flip(1)], 1)
    expected = net.generate(more, attention_mask=torch.ones_like(more), **GENERATE)

    def start():
        with torch.no_grad():
            return net(ids, use_cache=True).past_key_values

    mask = torch.ones_like(more)
    found = net.generate(more[:, 12:], attention_mask=mask, past_key_values=start(), **GENERATE)
    assert torch.equal(found, expected[:, 12:])
    # given the whole text, `generate` takes the virtual tokens in the cache for the text's: this is noticed
    with pytest.raises(peft.MethodError, match="pass the tokens that are not in it yet"):
        net.generate(more, attention_mask=mask, past_key_values=start(), **GENERATE)


@every
@causal
def test_other_ways_to_generate(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"][:1]
    options = GENERATE | {"attention_mask": torch.ones_like(ids)}
    expected = net.generate(ids, **options)
    assert torch.equal(net.generate(ids, prefill_chunk_size=5, **options), expected)
    assert torch.equal(net.generate(ids, prompt_lookup_num_tokens=2, **options), expected)


@every
@causal
def test_compiled(name, config):
    torch._dynamo.reset()
    net, method = applied(name, config)
    batch = inputs(name)
    whole = name == "llama" and config is not PTuning  # an LSTM, or a warning of transformers, breaks the graph
    compiled = torch.compile(net, backend="aot_eager", fullgraph=whole)

    def gradients(model):
        net.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in method.trainable_parameters().values()]

    for mine, expected in zip(gradients(compiled), gradients(net), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@every
@causal
def test_a_failed_pass_leaves_nothing_behind(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"]
    expected = net(ids).logits
    table = net.get_input_embeddings()
    rows = table(ids)
    with pytest.raises(IndexError):
        net(torch.full_like(ids, 500))
    with pytest.raises(Exception, match=r"labels|shape|size|batch"):
        net(ids, labels=torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(table(ids), rows)
    assert torch.equal(net(ids).logits, expected)


@every
@causal
def test_beams_and_several_answers(name, config):
    net, _ = applied(name, config)
    ids = inputs(name)["input_ids"]
    options = GENERATE | {"attention_mask": torch.ones_like(ids), "num_beams": 3, "num_return_sequences": 2}
    cached = net.generate(ids, **options)
    assert cached.shape == (6, ids.shape[1] + 5)
    assert torch.equal(cached, net.generate(ids, use_cache=False, **options))


@every
@causal
def test_outputs_are_of_the_text(name, config):
    net, _ = applied(name, config)
    batch = inputs(name)
    with torch.no_grad():
        output = net(**batch)
        assert output.logits.shape[:2] == batch["input_ids"].shape
        torch.testing.assert_close(net(batch["input_ids"]).logits, output.logits)  # by position, and without a mask
        embeds = net.get_input_embeddings()(batch["input_ids"])
        torch.testing.assert_close(net(inputs_embeds=embeds).logits, output.logits)
        pair = net(**batch, return_dict=False)
        torch.testing.assert_close(pair[0], output.loss)
        torch.testing.assert_close(pair[1], output.logits)
        last = net(batch["input_ids"], logits_to_keep=1).logits
        torch.testing.assert_close(last, output.logits[:, -1:])
        positions = torch.arange(12).expand(3, -1)
        torch.testing.assert_close(net(**batch, position_ids=positions).logits, output.logits)


@every
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_padding_on_the_right_is_not_seen(name, config, attention):
    net, _ = applied(name, config)
    net.set_attn_implementation(attention)
    batch = inputs(name)
    batch["attention_mask"][:, 8:] = 0
    short = {k: v[:, :8] if v.ndim == 2 else v for k, v in batch.items()}
    with torch.no_grad():
        found, expected = net(**batch).logits, net(**short).logits
    found = found if name == "bert" else found[:, :8]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every
def test_a_classifier_finds_the_last_token_of_each_text(config):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    settings = build("llama", False).config
    settings.num_labels = 3
    net = LlamaForSequenceClassification(settings).eval()
    method = peft.apply(net, config(num_virtual_tokens=4))
    assert "score.weight" in method.trainable_parameters()
    disturb(method.trainable_parameters().values())
    ids = inputs("llama")["input_ids"]
    alone = net(ids[:1, :6], attention_mask=torch.ones(1, 6, dtype=torch.long)).logits
    ids[0, 6:] = 0
    together = net(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@every
def test_answers_are_found_in_the_text(config):
    from transformers import BertForQuestionAnswering

    settings = build("bert", False).config
    settings.num_labels = 2
    net = BertForQuestionAnswering(settings).eval()
    method = peft.apply(net, config(num_virtual_tokens=4))
    assert "qa_outputs.weight" in method.trainable_parameters()
    disturb(method.trainable_parameters().values())
    ids = inputs("bert")["input_ids"]
    kinds = torch.ones_like(ids)
    places = torch.tensor([2, 5, 11])
    output = net(ids, token_type_ids=kinds, start_positions=places, end_positions=places)
    found = [output.start_logits, output.end_logits]
    assert all(scores.shape == ids.shape for scores in found)
    short = net(ids, token_type_ids=kinds, return_dict=False)
    torch.testing.assert_close(short[0], output.start_logits)
    one = net(ids[:1], token_type_ids=kinds[:1], start_positions=places[:1], end_positions=places[:1]).loss
    other = net(ids[:1], token_type_ids=kinds[:1], start_positions=places[1:2], end_positions=places[1:2]).loss
    # whatever else is in the sum over positions, the places' own scores make the difference
    scores = (output.start_logits + output.end_logits)[0] / 2
    torch.testing.assert_close(one - other, scores[places[1]] - scores[places[0]], rtol=1e-4, atol=1e-5)


@every
def test_the_head_is_optional_and_comes_back(config):
    net = build("bert", False)
    head = net.classifier.weight.detach().clone()
    method = peft.apply(net, config(num_virtual_tokens=4, train_head=False))
    assert not any(name.startswith("classifier") for name in method.tensors())
    method.remove()
    method = peft.apply(net, config(num_virtual_tokens=4))
    disturb(method.trainable_parameters().values())
    assert not torch.equal(net.classifier.weight, head)
    with method.disabled():
        assert torch.equal(net.classifier.weight, head)
    method.remove()
    assert torch.equal(net.classifier.weight, head)


@every
def test_a_copy_is_a_model_of_its_own(config):
    net, method = applied("llama", config)
    net(**inputs("llama")).loss.backward()  # leaves tensors with a history behind
    expected = logits(net, "llama")
    twin = copy.deepcopy(net)
    (other,) = peft.applied(twin)
    disturb(other.trainable_parameters().values())
    assert not torch.equal(logits(twin, "llama"), expected)
    assert torch.equal(logits(net, "llama"), expected)
    other.remove()
    assert torch.equal(logits(twin, "llama"), logits(build("llama", False), "llama"))
    assert not twin._forward_pre_hooks
    assert net._forward_pre_hooks
    method.remove()
    assert not net._forward_pre_hooks


@every
def test_too_long_is_refused(config):
    with pytest.raises(peft.MethodError, match=r"64 virtual tokens leave no room.*at most 63"):
        peft.apply(build("gpt2", False), config(num_virtual_tokens=64))
    net, _ = applied("gpt2", config)
    with pytest.raises(peft.MethodError, match=r"4 virtual tokens and 61 of the text are more .* 64"):
        net(torch.ones(1, 61, dtype=torch.long))
    net(torch.ones(1, 60, dtype=torch.long))


@every
def test_models_that_cannot_carry_it(config):
    with pytest.raises(peft.MethodError, match="an encoder and a decoder"):
        peft.apply(t5(), config())
    with pytest.raises(peft.MethodError, match="needs a transformers model"):
        peft.apply(torch.nn.Linear(3, 3), config())
    net, _ = applied("llama", config)
    with pytest.raises(peft.MethodError, match="has the virtual tokens of"):
        peft.apply(net, config())
    with pytest.raises(peft.MethodError, match="caches that grow"):
        net.generate(inputs("llama")["input_ids"], cache_implementation="static", **GENERATE)


@every
def test_beside_another_method(config):
    net = build("llama", True)
    bias = peft.apply(net, BitFit(add_missing=True))
    prompt = peft.apply(net, config(num_virtual_tokens=4))
    net(**inputs("llama")).loss.backward()
    for method in (bias, prompt):
        assert all(p.grad is not None for p in method.trainable_parameters().values())
    prompt.remove()
    bias.remove()
    assert torch.equal(logits(net, "llama"), logits(build("llama", True), "llama"))


@every
def test_beside_lora(config):
    net = build("llama", False)
    qe.prepare(net, qe.QLoRAConfig(r=4))
    method = peft.apply(net, config(num_virtual_tokens=4))
    assert {id(p) for p in net.parameters() if p.requires_grad} == {
        id(p) for p in method.trainable_parameters().values()
    }
    net(**inputs("llama")).loss.backward()


@every
def test_works_in_sixteen_bits(config):
    net = build("llama", False).bfloat16()
    method = peft.apply(net, config(num_virtual_tokens=4))
    net(**inputs("llama")).loss.backward()
    assert all(p.dtype == torch.float32 for p in method.trainable_parameters().values())
    assert all(torch.isfinite(p.grad).all() for p in method.trainable_parameters().values())
    ids = inputs("llama")["input_ids"]
    assert net.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE).shape == (3, 17)


@every
def test_files_that_do_not_fit_are_refused(config, tmp_path):
    _, method = applied("bert", config)
    method.save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    longer = build("bert", False)
    with pytest.raises(peft.MethodError, match="unexpected: classifier"):
        peft.load(build("llama", False), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"prompt_embeddings": torch.zeros(4, 7)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(peft.MethodError, match="this model needs"):
        peft.load(longer, tmp_path)
    save_file({"nonsense": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(peft.MethodError, match="holds no prompt_embeddings"):
        peft.load(longer, tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"num_transformer_submodules": 2}))
    with pytest.raises(peft.MethodError, match="an encoder and a decoder"):
        peft.load(longer, tmp_path)
    assert peft.applied(longer) == []
    assert not longer._forward_pre_hooks


@every
def test_a_head_in_four_bits_is_refused(config):
    net = build("bert", False)
    qe.prepare(net, qe.QLoRAConfig(r=0, skip_modules=["query"]))
    with pytest.raises(peft.MethodError, match=r"classifier is in 4 bits.*train_head=False"):
        peft.apply(net, config(num_virtual_tokens=4))
    peft.apply(net, config(num_virtual_tokens=4, train_head=False))
