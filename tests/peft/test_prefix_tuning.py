import math

import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import PrefixTuning
from tests.models.tiny import gpt_neox
from tests.peft.cases import build, inputs, logits
from tests.peft.virtual import Words, check_peft_reads, check_reads_peft, disturb

theirs = pytest.importorskip("peft")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reparametrise", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_peft_reads_its_files(name, reparametrise, packed, tmp_path):
    config = PrefixTuning(num_virtual_tokens=5, reparametrise=reparametrise)
    method = check_peft_reads(config, name, packed, tmp_path)
    kept = sum(p.numel() for p in method._head.parameters().values())
    heads = {"llama": 2, "gpt2": 4, "bert": 4}[name]  # llama's attention is grouped
    assert method.report().saved_bytes == (5 * 2 * 2 * heads * 16 + kept) * 4


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_reads_files_of_peft(name, task, projection, tmp_path):
    config = theirs.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=4, prefix_projection=projection, encoder_hidden_size=16
    )
    method = check_reads_peft(config, name, tmp_path)
    assert method.config == PrefixTuning(num_virtual_tokens=4, train_head=name == "bert")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_layer_attends_to_the_prefix(attention):
    """GPT-2's first layer by hand: softmax over prefix and text, in float64."""
    net = build("gpt2", False).double()
    net.set_attn_implementation(attention)
    method = peft.apply(net, PrefixTuning(num_virtual_tokens=3))
    disturb(method.trainable_parameters().values())
    ids = inputs("gpt2")["input_ids"]
    found = net(ids, output_hidden_states=True).hidden_states[1]
    keys, values = method.prefix()[0].detach().double()  # [heads, P, head_dim]

    block, length = net.transformer.h[0], ids.shape[1]
    hidden = net.transformer.wte(ids) + net.transformer.wpe(torch.arange(length) + 3)
    q, k, v = block.attn.c_attn(block.ln_1(hidden)).view(3, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
    k = torch.cat([keys.expand(3, -1, -1, -1), k], 2)
    v = torch.cat([values.expand(3, -1, -1, -1), v], 2)
    scores = q @ k.transpose(2, 3) / math.sqrt(16)
    seen = torch.arange(length + 3) <= torch.arange(length)[:, None] + 3
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    hidden = hidden + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + block.mlp(block.ln_2(hidden))
    torch.testing.assert_close(found, hidden, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_is_its_own_prefix(name):
    """A prefix that begins at a text's keys and values makes the model go on from the text."""
    net = build(name, False)
    ids, words = inputs(name)["input_ids"], "as real-words do"
    text = torch.tensor(Words()(words, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        expected = net(torch.cat([text.expand(3, -1), ids], 1)).logits[:, len(text) :]
    net.train()
    config = PrefixTuning(num_virtual_tokens=0, init="text", init_text=words, tokenizer=Words())
    method = peft.apply(net, config)
    assert net.training
    assert method.config.num_virtual_tokens == len(text) == 4
    torch.testing.assert_close(logits(net.eval(), name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_two_losses_under_gradient_checkpointing(name):
    """Layers are computed anew with the values of their own forward pass, also after passes without gradients."""
    net = build(name, False)
    method = peft.apply(net, PrefixTuning(num_virtual_tokens=4, reparametrise=True))
    batch = inputs(name)
    other = {k: v.flip(0) for k, v in batch.items()} | {"input_ids": batch["input_ids"].flip(1)}

    def gradients(between=False):
        net.zero_grad()
        loss = net(**batch).loss + net(**other).loss
        if between:
            with torch.no_grad():
                net(**{k: v[:1] for k, v in batch.items()})
        loss.backward()
        return [p.grad.clone() for p in method.trainable_parameters().values()]

    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    net.train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for mine, expected in zip(gradients(between=True), plain, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_reentrant_checkpointing_is_refused(name):
    net = build(name, False).train()
    peft.apply(net, PrefixTuning(num_virtual_tokens=4))
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(peft.MethodError, match="use_reentrant"):
        net(**inputs(name))


def test_parts_of_the_model_called_alone_have_no_prefix():
    net = build("llama", False)
    ids = inputs("llama")["input_ids"]
    expected = net.model(ids).last_hidden_state
    peft.apply(net, PrefixTuning(num_virtual_tokens=4))
    net(ids)
    assert torch.equal(net.model(ids).last_hidden_state, expected)


def test_no_cache_is_returned_that_was_not_asked_for():
    net = build("llama", False)
    peft.apply(net, PrefixTuning(num_virtual_tokens=4))
    ids = inputs("llama")["input_ids"]
    assert "past_key_values" not in net(ids, use_cache=False)
    assert len(net(ids, use_cache=False, return_dict=False)) == 1
    assert net(ids, use_cache=True).past_key_values.get_seq_length() == 16


def test_another_architecture():
    net = gpt_neox().eval()
    ids = inputs("llama")["input_ids"]
    method = peft.apply(net, PrefixTuning(num_virtual_tokens=4))
    disturb(method.trainable_parameters().values())
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(net.generate(ids, **options), net.generate(ids, use_cache=False, **options))
    loss = net.train()(ids, labels=ids).loss
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(net(ids, labels=ids).loss, loss)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"init": "zero"}, "expected one of random, vocabulary, text"),
        ("llama", {"init": "text"}, "needs init_text"),
        ("llama", {"init": "text", "init_text": "a", "reparametrise": True}, "reparametrise=False"),
        ("llama", {"init": "text", "init_text": "a"}, "needs a tokenizer"),
        ("bert", {"init": "text", "init_text": "a", "tokenizer": Words()}, "keeps no keys and values"),
        ("bert", {"init": "vocabulary"}, 'use init="random"'),
        ("llama", {"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
    ],
)
def test_wrong_settings_are_refused(name, options, message):
    net = build(name, False)
    with pytest.raises(peft.MethodError, match=message):
        peft.apply(net, PrefixTuning(**options))
    assert not net._forward_pre_hooks


def test_a_model_without_attention_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    net = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(peft.MethodError, match=r"0 of the 1 layers.*Prompt tuning needs none"):
        peft.apply(net, PrefixTuning(num_virtual_tokens=2))


def test_layers_of_another_shape_are_refused():
    net = build("llama", False)
    net.config.num_key_value_heads = 4  # not what its layers have
    peft.apply(net, PrefixTuning(num_virtual_tokens=2))
    with pytest.raises(peft.MethodError, match="2 heads of 16, the prefix is for 4 heads"):
        net(inputs("llama")["input_ids"], use_cache=False)
