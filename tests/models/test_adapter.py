"""Adapter files: PEFT loads ours, PEFT's load here, and what does not fit is refused whole."""

import json
import re
import warnings

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.adapter import load_adapter, save_adapter
from qlora_engine.models.adapters import adapter_layers
from qlora_engine.models.prepare import saved_modules
from tests.models.tiny import VOCABULARY, bert, gpt2, llama, token_ids


def tied(**options):
    return llama(tie_word_embeddings=True, **options)


MAKERS = {"llama": llama, "gpt2": gpt2, "bert": bert, "tied": tied}


def prepared(make, **config):
    """A prepared model whose adapters do something."""
    model = qe.prepare(make(), qe.QLoRAConfig(**{"r": 4, "alpha": 6, **config})).eval()
    randomize(model)
    return model


def randomize(model):
    for layer in adapter_layers(model).values():
        for name in layer.adapters:
            nn.init.normal_(layer.lora_B[name], std=0.3)


def decoded_twin(make, model):
    """The same model in full precision with the decoded weights: what PEFT wraps."""
    plain = make().eval()
    for path, layer in model.named_modules():
        if isinstance(layer, qe.NF4Linear):
            weight = layer.dequantize(torch.float32)
            plain.get_submodule(path).weight.data.copy_(weight.T if layer.fan_in_fan_out else weight)
    return plain


CASES = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "model.layers.1.mlp.up_proj"}),
    ("llama", {"rslora": True}),
    ("llama", {"rank_pattern": {"q_proj": 2, "re:.*mlp.*": 7}, "alpha_pattern": {"o_proj": 1}}),
    ("gpt2", {}),
    ("bert", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    ("bert", {}),
    ("tied", {"modules_to_save": ["lm_head"]}),
    ("tied", {"modules_to_save": ["embed_tokens"]}),
    ("tied", {"modules_to_save": ["lm_head", "model.embed_tokens"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_peft_loads_ours(kind, config, tmp_path):
    peft = pytest.importorskip("peft")
    model = prepared(MAKERS[kind], **config)
    for path in saved_modules(model):
        nn.init.normal_(model.get_submodule(path).weight)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(decoded_twin(MAKERS[kind], model), tmp_path).eval()
    ids = token_ids()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    count = sum(bool(layer.adapters) for layer in adapter_layers(model).values())
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules()) == count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ],
)
def test_ours_loads_pefts(kind, config, tmp_path):
    peft = pytest.importorskip("peft")
    model = qe.quantize_model(MAKERS[kind]()).eval()
    base = decoded_twin(MAKERS[kind], model)
    lora = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **config)
    theirs = peft.get_peft_model(base, lora).eval()
    for module in theirs.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            nn.init.normal_(module.modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    ids = token_ids()
    torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_round_trip_is_exact_and_trainable(tmp_path):
    model = prepared(llama)
    save_adapter(model, tmp_path)
    other = load_adapter(qe.quantize_model(llama()), tmp_path, adapter_name="again").eval()
    ids = token_ids()
    assert torch.equal(other(ids).logits, model(ids).logits)
    trainable = [n for n, p in other.named_parameters() if p.requires_grad]
    assert len(trainable) == 28
    assert all(".again" in n for n in trainable)
    frozen = load_adapter(qe.quantize_model(llama()), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_modules_that_were_trained_whole_are_saved_again(tmp_path):
    model = prepared(bert, modules_to_save=["classifier"])
    nn.init.normal_(model.classifier.weight)
    save_adapter(model, tmp_path / "first")
    again = load_adapter(qe.quantize_model(bert()), tmp_path / "first")
    assert again.classifier.weight.requires_grad
    save_adapter(again, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_second_adapter_does_not_lose_the_modules_of_the_first(tmp_path):
    model = prepared(bert, modules_to_save=["classifier"])
    save_adapter(model, tmp_path / "before")
    with qe.adapters_disabled(model):
        expected = model(token_ids()).logits
    qe.prepare(model, qe.QLoRAConfig(r=2, adapter_name="second", target_modules="query"))
    assert torch.equal(model(token_ids()).logits, expected)  # the first acts in no layer any more
    save_adapter(model, tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_half_a_module_that_was_trained_whole_is_refused(tmp_path):
    save_adapter(prepared(bert, modules_to_save=["classifier"]), tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    with pytest.raises(ValueError, match=r"the file lacks classifier\.bias"):
        load_adapter(qe.quantize_model(bert()), tmp_path)


def test_a_head_that_is_trained_whole_leaves_the_embeddings_alone(tmp_path):
    model = prepared(tied, modules_to_save=["lm_head"])
    embeddings = model.model.embed_tokens.weight.clone()
    nn.init.normal_(model.lm_head.weight)
    model.tie_weights()
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    save_adapter(model, tmp_path)
    other = load_adapter(qe.quantize_model(tied()), tmp_path).eval()
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)
    assert not other.config.tie_word_embeddings


def test_the_loaded_adapter_acts_alone(tmp_path):
    """Layers that the file says nothing of must not go on with another adapter."""
    save_adapter(prepared(llama, target_modules="q_proj"), tmp_path)
    alone = load_adapter(qe.quantize_model(llama()), tmp_path).eval()
    beside = load_adapter(prepared(llama), tmp_path, adapter_name="second")
    assert torch.equal(beside(token_ids()).logits, alone(token_ids()).logits)


def test_layers_with_and_without_rslora(tmp_path):
    peft = pytest.importorskip("peft")
    model = prepared(llama)
    layer = model.model.layers[0].self_attn.q_proj
    layer.delete_adapter("default")
    layer.add_adapter("default", r=4, alpha=6, rslora=True)
    randomize(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(decoded_twin(llama, model), tmp_path).eval()
    torch.testing.assert_close(theirs(token_ids()).logits, model(token_ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_path_that_is_the_end_of_another(tmp_path):
    """PEFT matches the ends of paths; it must find just the layers "0" and "1.1", with their own ranks."""
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))

    config = {"target_modules": ["re:0", "1.1"], "rank_pattern": {"re:0": 2}, "alpha_pattern": {"re:0": 3}}
    model = prepared(make, **config)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(decoded_twin(make, model), tmp_path).eval()
    x = torch.randn(3, 64)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)
    adapted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert adapted == ["base_model.model.0", "base_model.model.1.1"]


def test_a_compiled_model_has_the_same_names(tmp_path):
    model = prepared(llama)
    compiled = torch.compile(model)
    save_adapter(model, tmp_path / "plain")
    save_adapter(compiled, tmp_path / "compiled")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()
    load_adapter(compiled, tmp_path / "plain")


def test_loads_into_an_adapter_that_is_there(tmp_path):
    model = prepared(llama)
    save_adapter(model, tmp_path)
    expected = model(token_ids()).logits.detach()
    randomize(model)
    load_adapter(model, tmp_path)
    assert torch.equal(model(token_ids()).logits, expected)


def test_config_has_what_servers_read(tmp_path):
    save_adapter(prepared(llama), tmp_path, base_model="some/model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 6, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "some/model"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("trained", "task"), [((), None), ("classifier", "SEQ_CLS")])
def test_the_task_is_named_where_its_head_is_in_the_file(trained, task, tmp_path):
    """PEFT looks for the classifier's weights in the file of every SEQ_CLS adapter."""
    save_adapter(prepared(bert, modules_to_save=trained), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task


@pytest.fixture
def saved(tmp_path):
    model = prepared(llama)
    save_adapter(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "adapter_model.safetensors")


HEAD = "base_model.model.lm_head.weight"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
UP = "model.layers.0.mlp.up_proj"
BREAK = {
    "packed bytes": (
        lambda f: edit_tensors(f, lambda t: t.update({f"base_model.model.{UP}.weight": torch.zeros(3072).byte()})),
        f"replaces {UP}, which is a 4-bit layer",
    ),
    "alpha": (lambda f: edit_config(f, lora_alpha="6"), "lora_alpha is '6' for"),
    "no number": (lambda f: edit_config(f, lora_alpha=float("nan")), "lora_alpha is nan for"),
    "patterns": (lambda f: edit_config(f, rank_pattern=[4]), "rank_pattern holds a list"),
    "regular expression": (lambda f: edit_config(f, alpha_pattern={"(": 4}), "'(' is not a regular expression"),
    "names": (lambda f: edit_config(f, modules_to_save="lm_head"), "modules_to_save is 'lm_head'; expected a list"),
    "another base": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "belongs to a base weight that"),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
        "lora_A torch.int8, lora_B torch.int8; expected floating-point numbers",
    ),
    "integer head": (
        lambda f: edit_tensors(f, lambda t: t.update({HEAD: torch.zeros(VOCABULARY, 64).int()})),
        "lm_head.weight: torch.int32; expected torch.float32",
    ),
    "another vocabulary": (
        lambda f: edit_tensors(f, lambda t: t.update({HEAD: torch.zeros(VOCABULARY + 1, 64)})),
        "lm_head.weight: [129, 64]; expected [128, 64]",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), "is not readable JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "dora": (lambda f: edit_config(f, use_dora=True, bias="all"), "asks for use_dora, bias, which is not supported"),
    "rank": (lambda f: edit_config(f, r=8), "the configuration says rank 8 for"),
    "dropout": (lambda f: edit_config(f, lora_dropout=2.0), "dropout is 2.0"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "there is no adapter_model.safetensors"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "is a pickle, which can run code",
    ),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:900]),
        "cannot be read (damaged or cut short)",
    ),
    "half a pair": (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), "only one of lora_A and lora_B"),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))),
        "belong nowhere in the model: x",
    ),
    "unknown layer": (
        lambda f: edit_tensors(
            f, lambda t: t.update({k.replace("layers.0", "layers.9"): v for k, v in list(t.items())})
        ),
        "the model has no layers model.layers.9",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY: torch.ones(4, 63)})),
        "q_proj: lora_A [4, 63], lora_B [64, 4]; expected ((4, 64), (64, 4))",
    ),
    "no pairs": (lambda f: edit_tensors(f, lambda t: t.clear()), "there is no lora_A or lora_B"),
}


@pytest.mark.parametrize("case", BREAK)
def test_a_bad_file_changes_nothing(saved, case):
    damage, words = BREAK[case]
    damage(saved)
    model = qe.quantize_model(llama()).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        load_adapter(model, saved)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(isinstance(m, qe.QLoRALinear) for m in model.modules())


def test_a_model_that_is_not_quantized_is_told_what_to_do(saved):
    with pytest.raises(ValueError, match=r"are not 4-bit layers; call qlora_engine\.prepare"):
        load_adapter(llama(), saved)


def test_an_adapter_of_other_layers_is_refused(saved):
    model = prepared(llama, r=2, alpha=2)
    with pytest.raises(ValueError, match="the model's adapter 'default' has LoRASettings"):
        load_adapter(model, saved)


def test_saving_what_is_not_there(tmp_path):
    with pytest.raises(KeyError, match="there is no adapter 'nope'"):
        save_adapter(prepared(llama), tmp_path / "a", adapter_name="nope")
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_works_on_a_plain_module(tmp_path):
    model = qe.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), qe.QLoRAConfig(r=2))
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path)
    torch.manual_seed(0)
    other = qe.quantize_model(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)))
    other.load_state_dict({n: t for n, t in model.state_dict().items() if "lora" not in n})
    load_adapter(other, tmp_path)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))
