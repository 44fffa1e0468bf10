"""Loading and saving whole models."""

import gc
import json
import re
import weakref

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qlora_engine as qe
from qlora_engine.models import checkpoint
from qlora_engine.models.checkpoint import load_quantized, save_quantized
from tests.models.tiny import bert, gpt2, gpt_neox, llama, t5, token_ids

MAKERS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def logits(model):
    return model.eval()(token_ids()).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_streaming_equals_loading_and_preparing(kind, tied, tmp_path):
    model = MAKERS[kind](tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    streamed = load_quantized(tmp_path, qe.QLoRAConfig(r=4), progress=False)
    expected = logits(qe.prepare(model, qe.QLoRAConfig(r=4)))
    assert torch.equal(logits(streamed), expected)
    assert not streamed.training
    trainable = {n for n, p in streamed.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora" in n for n in trainable)


def test_classification_model_and_modules_to_save(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    config = qe.QLoRAConfig(r=2, modules_to_save=["classifier"])
    streamed = load_quantized(tmp_path, config, progress=False)
    assert type(streamed).__name__ == "BertForSequenceClassification"
    assert torch.equal(logits(streamed), logits(qe.prepare(model, config)))
    assert streamed.classifier.weight.requires_grad


def test_names_of_older_files(tmp_path):
    model = gpt_neox()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118 - a reader, not a dict
    streamed = load_quantized(tmp_path, qe.QLoRAConfig(r=4), progress=False)
    assert torch.equal(logits(streamed), logits(qe.prepare(model, qe.QLoRAConfig(r=4))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_transformers_keeps_in_float32_stays(dtype, tmp_path):
    model = t5()
    model.save_pretrained(tmp_path)
    streamed = load_quantized(tmp_path, qe.QLoRAConfig(r=4), dtype=dtype, progress=False).eval()
    expected = qe.prepare(type(model).from_pretrained(tmp_path, dtype=dtype), qe.QLoRAConfig(r=4)).eval()
    layer = "encoder.block.0.layer.1.DenseReluDense"
    assert isinstance(streamed.get_submodule(layer).wi, qe.QLoRALinear)
    assert type(streamed.get_submodule(layer).wo) is nn.Linear
    assert {n: p.dtype for n, p in streamed.named_parameters()} == {
        n: p.dtype for n, p in expected.named_parameters()
    }
    ids = token_ids()
    a, b = (m(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.float() for m in (streamed, expected))
    # in 16 bits the streamed scales are those of the file's float32, not of its rounding
    assert float(((a - b).norm() / b.norm()).detach()) < {torch.float32: 1e-6}.get(dtype, 0.05)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_models_load_exactly(kind, double_quant, tmp_path):
    model = qe.quantize_model(MAKERS[kind](), qe.QLoRAConfig(blocksize=128, double_quant=double_quant))
    expected = logits(model)
    save_quantized(model, tmp_path)
    again = load_quantized(tmp_path, progress=False)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype, name


def test_searched_scales_load_as_they_were_made(tmp_path):
    """On the way in from 16 bits, and again from 4 bits, whose files do not say how scales were found."""
    config = qe.QLoRAConfig(r=0, scales="search")
    llama().save_pretrained(tmp_path / "plain")
    model = load_quantized(tmp_path / "plain", config, progress=False)
    prepared = qe.quantize_model(llama(), config)
    by_absmax = load_quantized(tmp_path / "plain", progress=False)
    path = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(path).weight, prepared.get_submodule(path).weight)
    assert not torch.equal(model.get_submodule(path).weight, by_absmax.get_submodule(path).weight)
    save_quantized(model, tmp_path / "nf4")
    assert torch.equal(logits(load_quantized(tmp_path / "nf4", progress=False)), logits(model))


def test_saved_base_has_no_adapters_and_takes_new_ones(tmp_path):
    model = qe.prepare(llama(), qe.QLoRAConfig(r=4))
    save_quantized(model, tmp_path / "base")
    qe.save_adapter(model, tmp_path / "adapter")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.layers.0.mlp.up_proj.absmax" in names
    assert not any("lora" in name for name in names)
    again = load_quantized(tmp_path / "base", adapter=tmp_path / "adapter", progress=False)
    assert torch.equal(logits(again), logits(model))
    fresh = load_quantized(tmp_path / "base", qe.QLoRAConfig(r=2, target_modules="q_proj"), progress=False)
    assert sum(p.numel() for p in fresh.parameters() if p.requires_grad) == 2 * (2 * 64 * 2)


def test_layers_that_were_left_in_16_bits_are_left_again(tmp_path):
    model = qe.quantize_model(llama(), qe.QLoRAConfig(skip_modules=["up_proj", "lm_head"]))
    save_quantized(model, tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path, progress=False)), logits(model))
    again = load_quantized(tmp_path, qe.QLoRAConfig(r=2), progress=False)
    assert torch.equal(logits(again), logits(model))
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(again.model.layers[0].mlp.down_proj, qe.QLoRALinear)
    asked = load_quantized(tmp_path, qe.QLoRAConfig(r=2, target_modules="up_proj"), progress=False)
    assert isinstance(asked.model.layers[0].mlp.up_proj, qe.QLoRALinear)
    assert type(asked.lm_head) is nn.Linear


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = qe.quantize_model(llama())
    save_quantized(torch.compile(model), tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path, progress=False)), logits(model))


def test_quantized_head_of_a_tied_model(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    config = qe.QLoRAConfig(r=4, target_modules=["lm_head"])
    streamed = load_quantized(tmp_path, config, progress=False)
    assert isinstance(streamed.lm_head, qe.QLoRALinear)
    expected = logits(qe.prepare(model, config))
    assert torch.equal(logits(streamed), expected)
    streamed.tie_weights()
    assert torch.equal(logits(streamed), expected)


def test_dtype(tmp_path):
    llama().save_pretrained(tmp_path)
    model = load_quantized(tmp_path, dtype=torch.bfloat16, progress=False)
    assert logits(model).dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    assert layer.dequantize().dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_device(device, tmp_path):
    llama().save_pretrained(tmp_path)
    model = load_quantized(tmp_path, qe.QLoRAConfig(r=4), device=device, progress=False)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {device}
    ids = token_ids().to(device)
    model(ids, labels=ids).loss.backward()


def test_a_model_may_stay_in_host_memory(device, tmp_path):
    llama().save_pretrained(tmp_path)
    model = load_quantized(tmp_path, qe.QLoRAConfig(r=4), device=device, progress=False, on_host=True)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    there = load_quantized(tmp_path, device=device, progress=False)
    state = model.state_dict()
    for name, tensor in there.state_dict().items():
        assert torch.equal(state[name], tensor.cpu()), name


def test_no_more_than_one_16_bit_weight_is_alive(tmp_path, monkeypatch):
    """Of all weights that were handed to the quantizer, only the last is still there when the next one comes."""
    llama().save_pretrained(tmp_path)
    seen, alive = [], []

    def watched(weight, *arguments):
        gc.collect()
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(weight))
        return qe.quantize(weight, *arguments)

    monkeypatch.setattr(checkpoint, "quantize", watched)
    load_quantized(tmp_path, progress=False)
    assert len(seen) == 14
    assert max(alive) <= 1


def test_progress_bar(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    load_quantized(tmp_path)
    assert "loading" in capsys.readouterr().err
    load_quantized(tmp_path, progress=False)
    assert "loading" not in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def rewrite(folder, change):
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def swap_in_tensor(folder, name, tensor):
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})


NORM = "model.norm.weight"
BREAK = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "no configuration": (lambda f: (f / "config.json").write_text("[]"), "it is []; expected a dict"),
    "no model type": (lambda f: rewrite(f, lambda s: s.pop("model_type")), "model_type is None; expected a str"),
    "unknown model": (
        lambda f: rewrite(f, lambda s: s.update(model_type="llamma", architectures=[])),
        "model_type 'llamma' is not known",
    ),
    "other quantization": (
        lambda f: rewrite(f, lambda s: s.update(quantization_config={"quant_method": "gptq"})),
        "is already quantized (gptq)",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), "is missing; the index says it holds"),
    "cut short": (
        lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-100]),
        "cannot be read (damaged or cut short)",
    ),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not a readable index"),
    "index without names": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "is not a readable index",
    ),
    "index leads outside": (
        lambda f: (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}})),
        "points outside its folder",
    ),
    "shape": (
        lambda f: swap_in_tensor(f, NORM, torch.ones(63)),
        "model.norm.weight has shape [63]; the model expects [64]",
    ),
    "whole numbers": (
        lambda f: swap_in_tensor(f, NORM, torch.ones(64, dtype=torch.int32)),
        "model.norm.weight is torch.int32; expected torch.float32",
    ),
    "architectures": (
        lambda f: rewrite(f, lambda s: s.update(architectures=5)),
        "architectures is 5; expected a list",
    ),
    "weight shape": (
        lambda f: swap_in_tensor(f, "model.layers.0.mlp.up_proj.weight", torch.ones(96, 63)),
        "up_proj.weight has shape [96, 63]; the model expects [96, 64]",
    ),
    "another model's tensor": (lambda f: swap_in_tensor(f, NORM + "s", torch.ones(64)), "norm.weights"),
    "fewer layers": (
        lambda f: rewrite(f, lambda s: s.update(num_hidden_layers=3)),
        "missing model.layers.2",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BREAK)
def test_a_bad_folder_is_explained(folder, case):
    damage, words = BREAK[case]
    if case == "another model's tensor":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][NORM + "s"] = index["weight_map"][NORM]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        load_quantized(folder, progress=False)


LISTED = {"model.layers.0.mlp.up_proj": {"blocksize": 64, "double_quant": True}}
BREAK_OURS = {
    "another format": (
        {"format": "nf5", "modules": LISTED},
        "format 'nf5' and dict modules; expected what save_quant",
    ),
    "no modules": ({"format": "nf4"}, "format 'nf4' and no modules"),
    "not a linear layer": (
        {"format": "nf4", "modules": {"model.norm": {}}},
        "'model.norm'; this LlamaForCausalLM has",
    ),
    "no such layer": (
        {"format": "nf4", "modules": {"nowhere": {}}},
        "'nowhere'; this LlamaForCausalLM has no linear",
    ),
    "blocks of 0": (
        {"format": "nf4", "modules": {"lm_head": {"blocksize": 0, "double_quant": True}}},
        "'lm_head' has {'blocksize': 0, 'double_quant': True}; expected a blocksize",
    ),
    "other options": ({"format": "nf4", "modules": {"lm_head": {"r": 4}}}, "'lm_head' has {'r': 4}; expected"),
}


@pytest.mark.parametrize("case", BREAK_OURS)
def test_a_bad_list_of_4_bit_layers_is_explained(folder, case):
    damage, words = BREAK_OURS[case]
    rewrite(folder, lambda s: s.update(quantization_config={"quant_method": "qlora_engine", **damage}))
    with pytest.raises(ValueError, match=re.escape(words)):
        load_quantized(folder, progress=False)


def test_the_architecture_must_be_a_model(folder):
    """A configuration cannot make this package call another name of transformers."""
    rewrite(folder, lambda s: s.update(architectures=["pipeline", 3, "AutoModel"]))
    assert type(load_quantized(folder, progress=False)).__name__ == "LlamaForCausalLM"


def test_pickled_weights_are_refused(tmp_path):
    llama().config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="reading a pickle can run code"):
        load_quantized(tmp_path)


def test_paths_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match=f"there is no model folder .*there is {folder}"):
        load_quantized(folder.parent / "mode")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_quantized(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        load_quantized("nobody/no-such-model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, from which only the files are had that were asked for."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    remote, local = tmp_path / "remote", tmp_path / "local"
    llama().save_pretrained(remote)

    def download(name, *, allow_patterns, ignore_patterns):
        files = [str(p.relative_to(remote)) for p in remote.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            (local / file).write_bytes((remote / file).read_bytes())
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return remote, local


def test_from_the_hub(hub, tmp_path):
    remote, local = hub
    (remote / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "tokenizer.json"):
        (remote / name).write_bytes(b"x")
    model = load_quantized("someone/model", qe.QLoRAConfig(r=2), progress=False)
    downloaded = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    assert downloaded == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    qe.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"


def test_a_hub_model_without_safetensors_is_explained(hub):
    remote, _ = hub
    (remote / "model.safetensors").rename(remote / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"someone/model has no safetensors on the hub; .*reading a pickle"):
        load_quantized("someone/model")


def test_saving_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="has no 4-bit layers"):
        save_quantized(llama(), tmp_path / "m")
    with pytest.raises(TypeError, match="has no transformers configuration"):
        save_quantized(qe.quantize_model(nn.Sequential(nn.Linear(64, 64))), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_large_models_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_SIZE", 30_000)
    model = qe.quantize_model(llama())
    save_quantized(model, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load_quantized(tmp_path, progress=False)), logits(model))
    monkeypatch.undo()
    save_quantized(model, tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_crash_leaves_the_old_model(tmp_path, monkeypatch):
    import safetensors.torch

    model = qe.quantize_model(llama())
    save_quantized(model, tmp_path / "m")
    expected = logits(model)

    def crash(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(qe.quantize_model(llama(seed=5)), tmp_path / "m")
    assert torch.equal(logits(load_quantized(tmp_path / "m", progress=False)), expected)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
