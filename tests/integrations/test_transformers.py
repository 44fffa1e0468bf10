"""from_pretrained into 4 bits, and back: against quantizing the loaded model, and against bitsandbytes."""

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qlora_engine as qe
from qlora_engine.nn import NF4Experts, NF4Linear, TiedNF4Linear
from tests.models import tiny

transformers = pytest.importorskip("transformers")

from qlora_engine.integrations import transformers as integration  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM

MAKERS = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    "gpt_neox": tiny.gpt_neox,
    "qwen3_moe": tiny.qwen3_moe,
    "gpt_oss": tiny.gpt_oss,
}


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.token_ids().to(model.device)).logits.cpu()


def saved(kind, folder, dtype=None, **options):
    model = MAKERS[kind](**options)
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.compat(
    "Checkpoints",
    "`from_pretrained`, `save_pretrained`, `dequantize`: Llama, GPT-2, GPT-NeoX, Qwen3-MoE, gpt-oss",
)
@pytest.mark.parametrize("kind", MAKERS)
def test_loads_saves_loads_again_and_decodes(kind, device, tmp_path):
    model = saved(kind, tmp_path / "plain")
    loaded = tiny.loaded(tmp_path / "plain", device, quantization_config=qe.NF4Config())
    names = {path: type(m) for path, m in loaded.named_modules() if isinstance(m, NF4Linear | NF4Experts)}
    if not any(kind is NF4Experts for kind in names.values()):
        expected = qe.quantize_model(model.to(device))
        assert names.keys() == {p for p, m in expected.named_modules() if isinstance(m, NF4Linear)}
        assert torch.equal(logits(loaded), logits(expected))
    assert loaded.is_quantized
    assert not any(p.is_meta for p in loaded.parameters())

    loaded.save_pretrained(tmp_path / "packed")
    expected = logits(loaded)
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "qlora_engine"
    assert settings["modules"].keys() == names.keys()
    for again in (
        tiny.loaded(tmp_path / "packed", device),
        qe.load_quantized(tmp_path / "packed", device=device, progress=False),
    ):
        assert torch.equal(logits(again), expected)
        for path, parameter in loaded.state_dict().items():
            assert torch.equal(again.state_dict()[path], parameter), path

    again = tiny.loaded(tmp_path / "packed", device)
    again.dequantize()
    assert not any(isinstance(m, NF4Linear | NF4Experts) for m in again.modules())
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "decoded")
    torch.testing.assert_close(logits(tiny.loaded(tmp_path / "decoded", device)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_and_head(kind, tied, device, tmp_path):
    both = {"quantize_embeddings": True, "quantize_head": True}
    model = saved(kind, tmp_path / "plain", tie_word_embeddings=tied)
    loaded = tiny.loaded(tmp_path / "plain", device, quantization_config=qe.NF4Config(**both))
    expected = qe.quantize_model(model.to(device), qe.QLoRAConfig(**both))
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert isinstance(loaded.get_input_embeddings(), qe.NF4Embedding)
    assert isinstance(loaded.get_output_embeddings(), TiedNF4Linear) == tied
    assert torch.equal(logits(loaded), logits(expected))
    with pytest.raises(ValueError, match="not enough values"):  # transformers' words: packed bytes have no rows
        loaded.resize_token_embeddings(200)

    loaded.save_pretrained(tmp_path / "packed")
    expected = logits(loaded)
    for again in (
        tiny.loaded(tmp_path / "packed", device),
        qe.load_quantized(tmp_path / "packed", device=device, progress=False),
    ):
        assert torch.equal(logits(again), expected)
        assert isinstance(again.get_output_embeddings(), TiedNF4Linear) == tied
    again = tiny.loaded(tmp_path / "packed", device)
    again.dequantize()
    again.save_pretrained(tmp_path / "decoded")
    plain = tiny.loaded(tmp_path / "decoded", device)
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are alive; `peak` is the most at any time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.live.values()))
        return result


@pytest.mark.compat(
    "Checkpoints",
    "peak while loading: the 4-bit model and one tensor, experts included",
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 512}),
        ("qwen3_moe", {"num_hidden_layers": 6, "num_experts": 16}),
    ],
)
def test_peak_is_the_4bit_model_and_one_tensor(kind, options, tmp_path):
    model = saved(kind, tmp_path, torch.bfloat16, **options)
    largest = max(p.numel() for p in model.parameters()) * 4
    total = sum(p.numel() for p in model.parameters()) * 4
    del model
    with LiveBytes() as memory:  # the file is read as bfloat16 and cast, so that what is read counts as made
        loaded = tiny.loaded(tmp_path, "cpu", quantization_config=qe.NF4Config(), dtype=torch.float32)
    packed = sum(t.nbytes for t in loaded.state_dict().values())
    # the tensor as it is in float32, once more while it is stacked (experts) or made contiguous, and its packed form
    assert memory.peak < packed + 2.3 * largest
    assert packed + 2.3 * largest < 0.75 * total


@pytest.mark.compat(
    "Checkpoints",
    "bfloat16 and float16, other block sizes and scales",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_blocks(dtype, device, tmp_path):
    model = saved("llama", tmp_path).to(device)
    config = qe.NF4Config(blocksize=128, double_quant=False, scales="signed")
    loaded = tiny.loaded(tmp_path, device, quantization_config=config, dtype=dtype)
    layer = loaded.model.layers[0].mlp.up_proj
    expected = qe.quantize(model.model.layers[0].mlp.up_proj.weight.to(dtype), 128, False, "signed")
    assert torch.equal(layer.weight, expected.packed)
    assert torch.equal(layer.absmax, expected.absmax)
    assert layer.dequantize().dtype == loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "packed")
    again = tiny.loaded(tmp_path / "packed", device)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.compat(
    "Checkpoints",
    "many shards with an index, in both formats",
)
@pytest.mark.parametrize("save_format", ["qlora_engine", "bitsandbytes"])
def test_shards(save_format, device, tmp_path):
    saved("llama", tmp_path / "plain")
    config = qe.NF4Config(save_format=save_format)
    loaded = tiny.loaded(tmp_path / "plain", device, quantization_config=config)
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="4KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 8
    assert (tmp_path / "packed" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(qe.load_quantized(tmp_path / "packed", device=device, progress=False)), logits(loaded))
    options = {}
    if save_format == "bitsandbytes":
        options["config"] = integration.bitsandbytes_config(tmp_path / "packed")
    assert torch.equal(logits(tiny.loaded(tmp_path / "packed", device, **options)), logits(loaded))


@pytest.mark.compat(
    "Checkpoints",
    "`skip_modules`, experts in 4 or 16 bits",
)
def test_skip_modules_and_experts(tmp_path):
    saved("qwen3_moe", tmp_path)
    config = qe.NF4Config(skip_modules=["lm_head", "model.layers.0.mlp.experts", "v_proj"])
    loaded = tiny.loaded(tmp_path, "cpu", quantization_config=config)
    layers = loaded.model.layers
    assert not isinstance(layers[0].mlp.experts, NF4Experts)
    assert isinstance(layers[1].mlp.experts, NF4Experts)
    assert type(layers[1].self_attn.v_proj) is torch.nn.Linear
    assert isinstance(layers[1].self_attn.q_proj, NF4Linear)
    without = tiny.loaded(tmp_path, "cpu", quantization_config=qe.NF4Config(experts=False))
    assert not any(isinstance(m, NF4Experts) for m in without.modules())
    with pytest.raises(qe.TargetError, match="no_such"):
        tiny.loaded(tmp_path, "cpu", quantization_config=qe.NF4Config(skip_modules=["no_such"]))


@pytest.mark.compat(
    "Checkpoints",
    "tied embeddings and head",
)
def test_tied_weights(device, tmp_path):
    saved("llama", tmp_path, tie_word_embeddings=True)
    loaded = tiny.loaded(tmp_path, device, quantization_config=qe.NF4Config())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "packed")
    again = tiny.loaded(tmp_path / "packed", device)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(loaded))
    with pytest.raises(ValueError, match="shares its weight"):
        tiny.loaded(tmp_path, device, quantization_config=qe.NF4Config(skip_modules=["q_proj"]))


@pytest.mark.compat(
    "Checkpoints",
    "`device_map`: automatic, one device, by module",
)
def test_device_maps(tmp_path):
    model = saved("llama", tmp_path)
    expected = logits(qe.quantize_model(model))
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        loaded = AutoModel.from_pretrained(tmp_path, quantization_config=qe.NF4Config(), device_map=device_map)
        assert logits(loaded).allclose(expected, rtol=1e-4, atol=1e-5)
        if loaded.device.type == "cpu":
            assert torch.equal(logits(loaded), expected)
    with pytest.raises(ValueError, match="on disk"):
        AutoModel.from_pretrained(
            tmp_path, quantization_config=qe.NF4Config(), device_map={"model": "disk", "lm_head": "cpu"}
        )


@pytest.mark.compat(
    "Checkpoints",
    "other heads than language modelling, and adapters of this package on top",
)
def test_other_heads_and_later_adapters(device, tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    loaded = tiny.loaded(tmp_path, device, kind, quantization_config=qe.NF4Config())
    assert type(loaded.classifier) is torch.nn.Linear
    qe.prepare(loaded, qe.QLoRAConfig(r=4, modules_to_save=["classifier"]))
    loaded(tiny.token_ids().to(device), labels=torch.tensor([0, 1], device=device)).loss.backward()
    with pytest.raises(ValueError, match="has adapters"):
        loaded.dequantize()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="blocksize"):
        qe.NF4Config(blocksize=48)
    with pytest.raises(ValueError, match="save_format"):
        qe.NF4Config(save_format="gguf")
    saved("llama", tmp_path / "plain")
    tiny.loaded(tmp_path / "plain", "cpu", quantization_config=qe.NF4Config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.7.mlp.up_proj"] = {"blocksize": 64, "double_quant": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model\.layers\.7"):
        tiny.loaded(tmp_path, "cpu")
