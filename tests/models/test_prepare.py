"""`prepare` on plain modules and on real transformers architectures."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.adapters import adapter_layers
from qlora_engine.nn import NF4Experts
from tests.models import tiny
from tests.models.tiny import bert, gpt2, llama, token_ids


def adapted(model):
    return sorted(path for path, layer in adapter_layers(model).items() if layer.adapters)


def test_all_linear_leaves_head_and_embeddings_alone():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4))
    assert len(adapted(model)) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)


def test_is_near_the_16_bit_model():
    model = llama().eval()
    ids = token_ids()
    expected = model(ids).logits.detach()
    qe.prepare(model, qe.QLoRAConfig(r=4))
    logits = model.eval()(ids).logits.detach()
    assert float((logits - expected).norm() / expected.norm()) < 0.25
    weights = {n: m.dequantize(torch.float32) for n, m in model.named_modules() if isinstance(m, qe.NF4Linear)}
    plain = llama().eval()
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": "o_proj"}, 2),
        ({"target_modules": "self_attn.o_proj"}, 2),
        ({"target_modules": "model.layers.1.mlp.up_proj"}, 1),
        ({"target_modules": r"re:.*layers\.0\..*"}, 7),
        ({"exclude_modules": ["k_proj", r"re:.*layers\.1.*"]}, 6),
        ({"rank_pattern": {"q_proj": 0}}, 12),
    ],
)
def test_patterns(config, expected):
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4, **config))
    assert len(adapted(model)) == expected
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert all(isinstance(m, qe.NF4Linear) for m in linears)  # quantized whether adapted or not


def test_rank_and_alpha_patterns():
    config = qe.QLoRAConfig(r=4, alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={"re:.*mlp.*": 16})
    layers = adapter_layers(qe.prepare(llama(), config))
    assert layers["model.layers.0.self_attn.q_proj"].adapters["default"].r == 2
    assert layers["model.layers.0.self_attn.k_proj"].scaling() == 1.0
    assert layers["model.layers.0.mlp.up_proj"].scaling() == 4.0


def test_head_can_be_quantized_when_asked_for():
    assert isinstance(qe.prepare(llama(), qe.QLoRAConfig(r=4, skip_modules=())).lm_head, qe.QLoRALinear)
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
    assert isinstance(model.lm_head, qe.QLoRALinear)


def test_layers_inside_a_head_stay():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = qe.prepare(RobertaForSequenceClassification(RobertaConfig(vocab_size=128, **sizes)), qe.QLoRAConfig(r=4))
    assert type(model.classifier.dense) is nn.Linear
    assert isinstance(model.roberta.encoder.layer[0].intermediate.dense, qe.QLoRALinear)


def test_preparing_a_quantized_model_adds_adapters_only():
    model = qe.quantize_model(llama(), qe.QLoRAConfig(skip_modules=["up_proj", "lm_head"]))
    qe.prepare(model, qe.QLoRAConfig(r=4))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert len(adapted(model)) == 12


def test_a_merged_model_is_quantized_anew():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4))
    qe.merge(model, into="fp32")
    assert len(adapted(qe.prepare(model, qe.QLoRAConfig(r=4)))) == 14


def test_tied_head_stays():
    model = qe.prepare(llama(tie_word_embeddings=True), qe.QLoRAConfig(r=4))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_modules_to_save_are_trained_whole():
    model = qe.prepare(bert(), qe.QLoRAConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trainable == {"classifier.weight", "classifier.bias"}
    assert type(model.classifier) is nn.Linear


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["qproj"]}, "'qproj' matches no module. Near matches: q_proj"),
        ({"target_modules": ["q_proj", "zzzz"]}, "'zzzz' matches no module. This model's candidates: down_proj"),
        ({"target_modules": "re:("}, "is not a regular expression"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules: 'nothing' matches no module"),
        ({"target_modules": "q_proj", "exclude_modules": "q_proj"}, "no layer is left to adapt"),
        ({"target_modules": "q_proj", "skip_modules": "q_proj"}, "keeps in 16 bits; take it out of one"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module"),
    ],
)
def test_a_target_error_leaves_the_model_unchanged(config, words):
    import re

    model = llama()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(qe.TargetError, match=re.escape(words)):
        qe.prepare(model, qe.QLoRAConfig(r=4, **config))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(isinstance(m, qe.NF4Linear) for m in model.modules())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": -1}, "rank r is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"blocksize": 63}, "blocksize is 63"),
        ({"scales": "max"}, "scales is 'max'"),
        ({"scales": "signed"}, "cannot be double-quantized"),
    ],
)
def test_configuration_out_of_range(config, words):
    with pytest.raises(ValueError, match=words):
        qe.QLoRAConfig(**config)


def test_a_model_without_linear_layers():
    with pytest.raises(qe.TargetError, match="has no linear layer to quantize"):
        qe.prepare(nn.Sequential(nn.Conv2d(3, 3, 1)))


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_architectures_train(make, use_reentrant):
    model = qe.prepare(make(), qe.QLoRAConfig(r=4))
    base = {n: b.clone() for n, b in model.state_dict().items() if "lora" not in n}
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    ids = token_ids()
    labels = torch.tensor([0, 1]) if make is bert else ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, base[name]), name


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for use_reentrant in (None, True, False):
        torch.manual_seed(1)
        model = qe.prepare(llama(), qe.QLoRAConfig(r=4))
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.lora_B["default"], std=0.02)
        if use_reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        ids = token_ids()
        model.train()(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for others in gradients[1:]:
        for plain, checkpointed in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(checkpointed, plain)


def test_16_bit_weights_are_gone():
    model = llama()
    storages = [weakref.ref(m.weight.untyped_storage()) for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert len(storages) == 14
    qe.prepare(model)
    gc.collect()
    assert [s() for s in storages] == [None] * 14


def test_generates_with_a_cache():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4)).eval()
    ids = token_ids()[:1]
    with_cache = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    without = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert with_cache.shape == (1, ids.shape[1] + 6)
    assert torch.equal(with_cache, without)


def test_named_adapters_of_a_model():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4)).eval()
    ids = token_ids()
    base = model(ids).logits
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B["default"])
    first = model(ids).logits
    assert not torch.allclose(first, base)
    qe.prepare(model, qe.QLoRAConfig(r=2, adapter_name="second", target_modules="q_proj"))
    assert qe.adapter_names(model) == ["default", "second"]
    qe.set_adapters(model, "second")
    torch.testing.assert_close(model(ids).logits, base)
    qe.set_adapters(model, ["default", "second"])
    torch.testing.assert_close(model(ids).logits, first)
    with qe.adapters_disabled(model):
        torch.testing.assert_close(model(ids).logits, base)
    torch.testing.assert_close(model(ids).logits, first)
    qe.delete_adapter(model, "second")
    assert qe.adapter_names(model) == ["default"]
    with pytest.raises(KeyError, match=r"no adapter 'second'; the model has \['default'\]"):
        qe.set_adapters(model, "second")
    with pytest.raises(ValueError, match=r"call qlora_engine\.prepare"):
        qe.set_adapters(llama(), "default")


def test_copies_and_casts_of_a_model():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4)).eval()
    ids = token_ids()
    expected = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)
    other = qe.prepare(llama(seed=9), qe.QLoRAConfig(r=4)).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(ids).logits, expected)
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).logits.dtype == torch.bfloat16
    error = (half(ids).logits.float() - expected).norm() / expected.norm()
    assert error < 0.05


def test_conv1d_becomes_a_transposed_layer():
    model = gpt2().eval()
    ids = token_ids()
    expected = model(ids).logits
    qe.prepare(model, qe.QLoRAConfig(r=4, target_modules="c_attn"))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, qe.QLoRALinear)
    assert layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert float((model(ids).logits - expected).norm().detach() / expected.norm().detach()) < 0.25


def test_moves_to_the_device_layer_by_layer(device):
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4), device=device)
    assert {t.device.type for t in model.state_dict().values()} == {device}
    ids = token_ids().to(device)
    model(ids, labels=ids).loss.backward()


def test_multihead_attention_is_left_alone():
    model = nn.TransformerEncoderLayer(64, 4, 128)
    qe.prepare(model, qe.QLoRAConfig(r=4))
    assert sorted(adapted(model)) == ["linear1", "linear2"]
    assert model(torch.randn(3, 2, 64)).shape == (3, 2, 64)


def test_a_layer_in_two_places_stays_one():
    """Quantizing, adapting, merging and unmerging replace it everywhere."""
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Linear(64, 8)))
    x = torch.randn(3, 64)

    def check(kind):
        assert type(model[0]) is kind
        assert model[2][0] is model[0]
        return model(x)

    qe.quantize_model(model)
    check(qe.NF4Linear)
    qe.prepare(model, qe.QLoRAConfig(r=2))
    nn.init.normal_(model[0].lora_B["default"])
    expected = check(qe.QLoRALinear)
    report = qe.merge(model, into="fp32")
    torch.testing.assert_close(check(nn.Linear), expected, rtol=1e-4, atol=1e-4)
    qe.unmerge(model, report)
    assert torch.equal(check(qe.QLoRALinear), expected)


def test_a_4_bit_layer_cannot_be_trained_whole():
    model = qe.quantize_model(llama())
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for names in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp"):
        with pytest.raises(qe.TargetError, match=r"layers\.0\.mlp\.\w+.* whole, already in 4 bits"):
            qe.prepare(model, qe.QLoRAConfig(r=2, modules_to_save=names))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_the_same_adapter_twice_changes_nothing():
    model = qe.prepare(llama(), qe.QLoRAConfig(r=2))
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        qe.prepare(model, qe.QLoRAConfig(r=4, target_modules="q_proj"))
    for name, parameter in model.named_parameters():
        value, trainable = before[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == trainable


@pytest.mark.parametrize("make", [tiny.qwen3_moe, tiny.gpt_oss])
def test_experts(make):
    """Stacked experts are quantized too, stay what they are when adapters come, and are decoded by merging."""
    model = make().eval()
    bytes_before = sum(p.nbytes for p in model.parameters())
    qe.prepare(model, qe.QLoRAConfig(r=4))
    experts = [m for m in model.modules() if isinstance(m, NF4Experts)]
    assert len(experts) == 2
    assert sum(p.nbytes for p in model.parameters() if not p.requires_grad) < 0.45 * bytes_before
    assert not any(p.requires_grad for m in experts for p in m.parameters())
    model(tiny.token_ids(), labels=tiny.token_ids()).loss.backward()
    expected = model(tiny.token_ids()).logits
    report = qe.merge(model, into="fp32")
    assert not any(isinstance(m, NF4Experts) for m in model.modules())
    torch.testing.assert_close(model(tiny.token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    qe.unmerge(model, report)
    assert [m for m in model.modules() if isinstance(m, NF4Experts)] == experts
    assert torch.equal(model(tiny.token_ids()).logits, expected)


def test_experts_that_stay():
    config = qe.QLoRAConfig(r=0, skip_modules=["lm_head", "model.layers.1.mlp"], experts=True)
    with pytest.raises(qe.TargetError, match=r"layers\.1\.mlp"):
        qe.prepare(tiny.qwen3_moe(), config)
    model = qe.prepare(tiny.qwen3_moe(), qe.QLoRAConfig(r=0, skip_modules=["lm_head", "layers.1.mlp.experts"]))
    kinds = [isinstance(layer.mlp.experts, NF4Experts) for layer in model.model.layers]
    assert kinds == [True, False]
    qe.prepare(model, qe.QLoRAConfig(r=4))
    assert [isinstance(layer.mlp.experts, NF4Experts) for layer in model.model.layers] == kinds
    without = qe.prepare(tiny.qwen3_moe(), qe.QLoRAConfig(r=0, experts=False))
    assert not any(isinstance(m, NF4Experts) for m in without.modules())
