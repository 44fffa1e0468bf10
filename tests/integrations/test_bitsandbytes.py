"""Checkpoints of bitsandbytes load here, and ours there, with bit-equal weights and equal logits."""

import json

import pytest
import torch

import qlora_engine as qe
from qlora_engine.nn import NF4Linear
from tests.models import tiny

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
AutoModel = transformers.AutoModelForCausalLM

# widths that are multiples of a block: bitsandbytes' CPU kernel decodes others wrongly (0.50.2)
MAKERS = {
    "llama": lambda: tiny.llama(intermediate_size=128),
    "gpt2": lambda: tiny.gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
}


def logits(model):
    """In training mode: in the other, bitsandbytes multiplies in bfloat16 on a CPU, whatever the dtype."""
    return model.train()(tiny.token_ids().to(model.device)).logits.cpu()


def config_of_theirs(double_quant=True, kind="nf4"):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )


def weights(model):
    """Decoded 4-bit weights of either kind."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            found[path] = module.dequantize()
        elif isinstance(module, bitsandbytes.nn.Linear4bit):
            found[path] = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
    return found


def assert_equal(ours, theirs):
    mine, other = weights(ours), weights(theirs)
    assert mine.keys() == other.keys()
    assert mine
    for path, weight in mine.items():
        assert torch.equal(weight, other[path]), path
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.compat(
    "Checkpoints",
    "bitsandbytes' NF4 checkpoints load here: equal weights and logits",
)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_theirs_here(kind, double_quant, device, tmp_path):
    MAKERS[kind]().save_pretrained(tmp_path / "plain")
    theirs = tiny.loaded(tmp_path / "plain", device, quantization_config=config_of_theirs(double_quant))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    from qlora_engine.integrations.transformers import bitsandbytes_config

    folder = tmp_path / "theirs"
    ours = tiny.loaded(folder, device, config=bitsandbytes_config(folder))
    assert_equal(ours, theirs)
    assert_equal(qe.load_quantized(folder, device=device, progress=False), theirs)
    ours.save_pretrained(tmp_path / "ours")
    assert_equal(tiny.loaded(tmp_path / "ours", device), theirs)


@pytest.mark.compat(
    "Checkpoints",
    "checkpoints of this package load in bitsandbytes: equal weights and logits",
)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_ours_there(kind, double_quant, device, tmp_path):
    model = MAKERS[kind]().to(device)
    model.save_pretrained(tmp_path / "plain")
    config = qe.NF4Config(double_quant=double_quant, save_format="bitsandbytes")
    ours = tiny.loaded(tmp_path / "plain", device, quantization_config=config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = tiny.loaded(tmp_path / "ours", device)
    assert_equal(ours, theirs)
    prepared = qe.quantize_model(model, qe.QLoRAConfig(double_quant=double_quant))
    qe.save_quantized(prepared, tmp_path / "quantized", file_format="bitsandbytes")
    assert_equal(prepared, tiny.loaded(tmp_path / "quantized", device))
    assert_equal(qe.load_quantized(tmp_path / "quantized", device=device, progress=False), theirs)


@pytest.mark.compat(
    "Checkpoints",
    "bitsandbytes' FP4 checkpoints load here, decoded: equal weights and logits",
)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MAKERS)
def test_their_fp4_here(kind, double_quant, device, tmp_path):
    MAKERS[kind]().save_pretrained(tmp_path / "plain")
    theirs = tiny.loaded(tmp_path / "plain", device, quantization_config=config_of_theirs(double_quant, "fp4"))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    from qlora_engine.integrations.transformers import bitsandbytes_config

    folder = tmp_path / "theirs"
    ours = tiny.loaded(folder, device, config=bitsandbytes_config(folder))
    for path, weight in weights(theirs).items():
        layer = ours.get_submodule(path)
        assert torch.equal(layer.weight.T if kind == "gpt2" else layer.weight, weight), path
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not ours.is_quantized
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(tiny.loaded(tmp_path / "ours", device)), logits(ours))
    with pytest.raises(ValueError, match="fp4"):
        qe.load_quantized(folder, device=device, progress=False)


def test_errors(tmp_path):
    from qlora_engine.integrations.transformers import bitsandbytes_config

    tiny.llama(intermediate_size=128).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="not a 4-bit checkpoint"):
        bitsandbytes_config(tmp_path / "plain")
    tiny.qwen3_moe().save_pretrained(tmp_path / "moe")
    config = qe.NF4Config(save_format="bitsandbytes")
    moe = tiny.loaded(tmp_path / "moe", "cpu", quantization_config=config)
    with pytest.raises(ValueError, match="experts"):
        moe.save_pretrained(tmp_path / "packed")


def test_a_damaged_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.llama(intermediate_size=128)
    qe.save_quantized(qe.quantize_model(model), tmp_path, file_format="bitsandbytes")
    tensors = load_file(tmp_path / "model.safetensors")
    absmax = tensors.pop("model.layers.0.mlp.up_proj.weight.absmax")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="incomplete"):
        qe.load_quantized(tmp_path, progress=False)
    tensors["model.layers.0.mlp.up_proj.weight.absmax"] = absmax[:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit"):
        qe.load_quantized(tmp_path, progress=False)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["load_in_4bit"]
