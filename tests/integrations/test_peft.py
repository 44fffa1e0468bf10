"""PEFT over 4-bit layers: against PEFT over the decoded weights, its files both ways, merging."""

import copy
import dataclasses

import pytest
import torch

import qlora_engine as qe
from qlora_engine.nn import NF4Linear
from tests.models import tiny

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from qlora_engine.integrations import peft as integration  # noqa: E402
from qlora_engine.models.skeleton import decode_modules  # noqa: E402

MAKERS = {
    "llama": tiny.llama,
    "gpt2": lambda: tiny.gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "bert": tiny.bert,
    "qwen3_moe": tiny.qwen3_moe,
    "gpt_oss": tiny.gpt_oss,
}


def logits(model, **options):
    return model(tiny.token_ids(), **options).logits


def bases(kind):
    """A model in 4 bits, and the same weights decoded into ordinary layers."""
    packed = qe.quantize_model(MAKERS[kind]())
    plain = copy.deepcopy(packed)
    decode_modules(plain)
    return packed.eval(), plain.eval()


def config(kind="llama", **options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def perturb(model):
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad or "lora_" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def pair(kind, *configs):
    """PEFT on both, with equal adapters: over 4 bits with this package's layer, and over ordinary layers."""
    models = []
    for base, register in zip(bases(kind), (integration.register, copy.deepcopy), strict=True):
        model = None
        torch.manual_seed(0)
        for index, settings in enumerate(configs):
            settings = register(copy.deepcopy(settings))
            if model is None:
                model = peft.get_peft_model(base, settings, "first")
            else:
                model.add_adapter(f"other{index}", settings)
        perturb(model)
        models.append(model.eval())
    return models


def assert_close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def fused(model):
    return [m for m in model.modules() if isinstance(m, integration.FusedLoraLinear)]


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bias": {"bias": "all"},
    "own bias": {"lora_bias": True, "target_modules": ["c_attn"]},
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.compat(
    "PEFT",
    "`get_peft_model` with LoRA: rsLoRA, DoRA, patterns, biases, `modules_to_save`",
)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forward_and_gradients(kind, case):
    options = OPTIONS[case]
    if (case == "own bias" and kind == "llama") or (case in ("head", "patterns") and kind == "gpt2"):
        pytest.skip("the other architecture has those layers")
    mine, theirs = pair(kind, config(**options))
    assert fused(mine)
    assert not fused(theirs)
    grads = []
    for model in (mine.train(), theirs.train()):
        result = logits(model)
        result.square().sum().backward()
        grads.append((result, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(grads[0][0], grads[1][0])
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_fused_product_runs_where_it_can(monkeypatch):
    model, _ = pair("llama", config(lora_dropout=0.5))
    calls = []
    original = integration.functional.qlora_linear
    monkeypatch.setattr(
        integration.functional, "qlora_linear", lambda *args: calls.append(args[6]) or original(*args)
    )
    logits(model)
    assert calls == [0.0] * len(fused(model))
    model.train()
    logits(model)
    assert calls[len(fused(model)) :] == [0.5] * len(fused(model))
    del calls[:]
    with model.disable_adapter():
        logits(model)
    handle = fused(model)[0].lora_A["first"].register_forward_hook(lambda *_: None)
    logits(model)
    handle.remove()
    assert len(calls) == len(fused(model)) - 1


@pytest.mark.compat(
    "PEFT",
    "several adapters, mixed batches, weighted sums, deleting",
)
def test_several_adapters_and_mixed_batches():
    mine, theirs = pair("llama", config(), config(r=2, use_rslora=True), config(target_modules=["v_proj"]))
    for model in (mine, theirs):
        model.base_model.set_adapter(["first", "other1"])
    assert_close(logits(mine), logits(theirs))
    for model in (mine, theirs):
        model.set_adapter("other2")
    assert_close(logits(mine), logits(theirs))
    rows = ["first", "__base__"]
    assert_close(logits(mine, adapter_names=rows), logits(theirs, adapter_names=rows))
    with mine.disable_adapter(), theirs.disable_adapter():
        assert_close(logits(mine), logits(theirs))
    for model in (mine, theirs):
        model.add_weighted_adapter(["first", "other1"], [0.3, 0.7], "sum", combination_type="svd", svd_rank=4)
        model.set_adapter("sum")
        model.delete_adapter("first")
    assert_close(logits(mine), logits(theirs))


@pytest.mark.compat(
    "PEFT",
    "`merge_adapter` into 4 bits, `unmerge_adapter` exactly, DoRA too",
)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_decodes_first_and_comes_back_exactly(kind, options, recwarn):
    mine, theirs = pair(kind, config(**options), config(r=2))
    before = logits(mine)
    packed = {n: t.clone() for n, t in mine.state_dict().items() if "base_layer" in n}
    for model in (mine, theirs):
        model.base_model.set_adapter(["first", "other1"])
    mine.merge_adapter(safe_merge=True)
    theirs.merge_adapter(safe_merge=True)
    for layer, other in zip(fused(mine), _lora_layers(theirs), strict=True):
        # the other's weight, rounded to 4 bits by this package
        exact = other.get_base_layer().weight.T if kind == "gpt2" else other.get_base_layer().weight
        rounded = qe.quantize(exact.contiguous()).dequantize()
        assert (layer.get_base_layer().dequantize() - rounded).norm() < 0.02 * exact.norm()
    assert any("rounds a part" in str(w.message) for w in recwarn)
    mine.unmerge_adapter()
    mine.set_adapter("first")
    for name, tensor in packed.items():
        assert torch.equal(mine.state_dict()[name], tensor), name
    assert torch.equal(logits(mine), before)


def _lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.compat(
    "PEFT",
    "merged export in 16 bits",
)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_merging_into_16_bits(options, tmp_path):
    mine, theirs = pair("llama", config(target_modules=["q_proj", "down_proj"], **options))
    expected = logits(theirs.merge_and_unload())
    merged = integration.merge_and_unload(mine, "fp32")
    assert not any(isinstance(m, NF4Linear) for m in merged.modules())
    assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False)
    assert_close(logits(again), expected)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.compat(
    "PEFT",
    "LoRA on experts in 4 bits (`target_parameters`): gradients, files, merging",
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_experts(kind, tmp_path):
    mine, theirs = pair(kind, config(**EXPERTS))
    assert sum(isinstance(m, integration.FusedExpertsLora) for m in mine.modules()) == 4
    grads = []
    for model in (mine.train(), theirs.train()):
        result = logits(model)
        result.square().sum().backward()
        grads.append((result, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert_close(grads[0][0], grads[1][0])
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grad, grads[1][1][name], rtol=1e-3, atol=1e-4, msg=name)
    mine.eval()
    theirs.eval()
    mine.save_pretrained(tmp_path / "mine", selected_adapters=["first"])
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["first"])
    expected = logits(theirs)
    for folder in (tmp_path / "mine" / "first", tmp_path / "theirs" / "first"):
        packed, plain = bases(kind)
        assert_close(logits(integration.load(packed, folder)), expected)
        assert_close(logits(peft.PeftModel.from_pretrained(plain, folder)), expected)
    with mine.disable_adapter(), theirs.disable_adapter():
        assert_close(logits(mine), logits(theirs))
    before = logits(mine)
    mine.merge_adapter(safe_merge=True)
    assert (logits(mine) - before).norm() < 0.3 * before.norm()
    assert not torch.equal(logits(mine), before)
    mine.unmerge_adapter()
    assert torch.equal(logits(mine), before)
    if kind == "gpt_oss":
        mine.merge_adapter()  # what is exported does not begin at the rounded weights
    assert_close(logits(integration.merge_and_unload(mine, "fp32")), expected)


def test_several_adapters_on_experts():
    mine, theirs = pair("qwen3_moe", config(**EXPERTS), config(**EXPERTS, r=2, use_rslora=True))
    for model in (mine, theirs):
        model.base_model.set_adapter(["first", "other1"])
    assert_close(logits(mine), logits(theirs))
    experts = mine.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    assert not experts._adapters, "nothing of a call is left"


def test_refusals():
    model, _ = bases("llama")
    for start in ("pissa", "olora", "orthogonal"):
        with pytest.raises(ValueError, match="packed in 4 bits"):
            peft.get_peft_model(copy.deepcopy(model), integration.register(config(init_lora_weights=start)))
    wrapped, _ = pair("llama", config())
    fused(wrapped)[0].lora_A["first"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        wrapped.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaN"):
        integration.merge_and_unload(wrapped)
    assert len(fused(wrapped)) == 14, "nothing was changed"


@pytest.mark.compat(
    "PEFT",
    "adapter files go both ways: PEFT over 4 bits, PEFT, this package",
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_files_go_both_ways(kind, tmp_path):
    """PEFT over 4 bits, PEFT over ordinary layers, and this package's own adapters read each other's files."""
    options = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} if kind == "bert" else {}
    mine, theirs = pair(kind, config(alpha_pattern={"q_proj": 3}, **options))
    mine.save_pretrained(tmp_path / "mine", selected_adapters=["first"])
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["first"])
    expected = logits(mine)
    assert_close(expected, logits(theirs))
    for folder in (tmp_path / "mine" / "first", tmp_path / "theirs" / "first"):
        packed, plain = bases(kind)
        loaded = integration.load(packed, folder)
        assert fused(loaded)
        assert_close(logits(loaded), expected)
        assert_close(logits(peft.PeftModel.from_pretrained(plain, folder)), expected)
        model = MAKERS[kind]()
        qe.quantize_model(model, qe.QLoRAConfig(modules_to_save=["classifier"] if kind == "bert" else ()))
        assert_close(logits(qe.load_adapter(model.eval(), folder)), expected)
        qe.save_adapter(model, tmp_path / "own")
        packed, _ = bases(kind)
        assert_close(logits(integration.load(packed, tmp_path / "own")), expected)


@pytest.fixture
def enabled():
    integration.enable()
    yield
    integration.disable()


@pytest.mark.compat(
    "PEFT",
    "`PeftModel.from_pretrained`, transformers' `load_adapter`",
)
def test_enable_reaches_loading_and_transformers(enabled, tmp_path):
    integration.enable()
    mine, _ = pair("llama", config())
    mine.save_pretrained(tmp_path, selected_adapters=["first"])
    packed, _ = bases("llama")
    loaded = peft.PeftModel.from_pretrained(packed, tmp_path / "first")
    assert len(fused(loaded)) == 14
    assert_close(logits(loaded), logits(mine))
    packed, _ = bases("llama")
    packed.load_adapter(tmp_path / "first")
    assert len(fused(packed)) == 14
    assert_close(logits(packed), logits(mine))
    integration.disable()
    packed, _ = bases("llama")
    assert not fused(peft.PeftModel.from_pretrained(packed, tmp_path / "first"))


@pytest.mark.compat(
    "PEFT",
    "`prepare_model_for_kbit_training`",
)
def test_prepare_for_kbit_training_is_harmless():
    mine, _ = bases("llama")
    mine.bfloat16()
    decoded = {n: m.dequantize() for n, m in mine.named_modules() if isinstance(m, NF4Linear)}
    prepared = peft.prepare_model_for_kbit_training(mine)
    for name, weight in decoded.items():
        layer = prepared.get_submodule(name)
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(layer.dequantize(), weight)
    model = peft.get_peft_model(prepared, integration.register(config()))
    logits(model.train()).sum().backward()


# What PEFT 0.21's other methods do over 4-bit layers, on its own: the same as over the decoded weights, or an error.
# OSF and UniLoRA do neither: they pass such layers by without a word.
SAME = [
    "ADALORA",
    "BEFT",
    "BOFT",
    "CPT",
    "FOURIERFT",
    "GRALORA",
    "IA3",
    "LILY",
    "MISS",
    "OFT",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "PVERA",
    "P_TUNING",
    "RANDLORA",
    "ROAD",
    "VERA",
    "WAVEFT",
]
REFUSED = ["DELORA", "FROD", "GLORA", "HIRA", "HRA", "LOHA", "LOKR", "PSOFT", "SHIRA", "TINYLORA"]


def outputs_of(method):
    """Logits over 4-bit layers, and over the decoded weights."""
    if method not in peft.PeftType.__members__:
        pytest.skip(f"PEFT {peft.__version__} does not have it")
    if method == "PREFIX_TUNING" and transformers.__version__ >= "5.24":
        pytest.skip("PEFT 0.21 does not know the cache of this transformers")
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {"target_modules": ["q_proj"]} if "target_modules" in fields else {}
    if "num_virtual_tokens" in fields:
        options = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    options |= {"ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": []}}.get(method, {})
    outputs = []
    for base in bases("llama"):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, kind(**options))
        perturb(model)
        outputs.append(logits(model.eval()))
    return outputs


@pytest.mark.compat(
    "PEFT",
    "PEFT's other methods that need no weight, such as AdaLoRA, IA3, VeRA, OFT, prompts",
)
@pytest.mark.parametrize("method", SAME)
def test_methods_that_need_no_weight(method):
    assert_close(*outputs_of(method))


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_read_the_weight_fail_and_do_not_mislead(method):
    with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
        outputs_of(method)


def test_merging_in_layers_of_peft_does_not_pass_unseen():
    """Only the layer of this package merges into packed bytes; the others must not compute with what they did."""
    base, _ = bases("llama")
    model = peft.get_peft_model(base, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="packed"):
        logits(model)
    base, _ = bases("llama")
    with pytest.raises(RuntimeError, match="size of tensor"):
        peft.get_peft_model(base, config()).merge_adapter()
