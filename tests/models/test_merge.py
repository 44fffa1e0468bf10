"""Merging adapters into the weights, and taking them out again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.models.adapters import adapter_layers
from tests.models.tiny import gpt2, llama, token_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOT = Path(__file__).parents[2]
MAKERS = {"llama": llama, "gpt2": gpt2}


def prepared(make=llama, std=0.1, **config):
    model = qe.prepare(make(), qe.QLoRAConfig(**{"r": 4, "alpha": 8, **config})).eval()
    for layer in adapter_layers(model).values():
        for name in layer.adapters:
            nn.init.normal_(layer.lora_B[name], std=std)
    return model


def logits(model):
    return model(token_ids()).logits.detach().float()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("into", "bound"), [("fp32", 1e-4), ("bf16", 3e-2), ("fp16", 5e-3)])
def test_merged_logits_are_the_adapted_ones(kind, into, bound):
    model = prepared(MAKERS[kind])
    expected = logits(model)
    report = qe.merge(model, into=into)
    assert not any(isinstance(m, qe.NF4Linear) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {
        {"fp32": torch.float32, "bf16": torch.bfloat16}.get(into, torch.float16)
    }
    assert float((logits(model) - expected).norm() / expected.norm()) < bound
    assert min(layer.kept for layer in report.layers) > 0.9
    assert report.bytes_after > report.bytes_before / 2


@pytest.mark.parametrize("into", ["bf16", "nf4", "fp32"])
def test_unmerging_restores_every_bit(into):
    model = prepared()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = logits(model)
    dtype = model.config.dtype
    report = qe.merge(model, into=into)
    assert report.reversible
    qe.unmerge(model, report)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert torch.equal(logits(model), expected)
    assert model.config.dtype == dtype
    with pytest.raises(ValueError, match="unmerge only once"):
        qe.unmerge(model, report)


def test_without_the_originals_there_is_no_way_back():
    model = prepared()
    report = qe.merge(model, keep_original=False)
    assert not report.reversible
    with pytest.raises(ValueError, match="keep_original=True"):
        qe.unmerge(model, report)


def test_the_report_of_another_model_is_refused():
    report = qe.merge(prepared())
    larger = llama()
    larger.resize_token_embeddings(130)
    for other in (gpt2(), larger):
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(ValueError, match="this report is of another model: here, "):
            qe.unmerge(other, report)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    assert report.reversible


def test_report_of_a_merge_into_nf4():
    model = prepared()
    path = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(path)
    weight, delta = layer.dequantize(torch.float32), layer.delta_weight()
    before = layer.nf4_weight.nbytes + 4 * (4 * 64 + 96 * 4)
    report = qe.merge(model, into="nf4")
    merged = model.get_submodule(path)
    assert type(merged) is qe.NF4Linear
    stored = qe.quantize(weight + delta).dequantize()
    assert torch.equal(merged.dequantize(torch.float32), stored)
    entry = next(entry for entry in report.layers if entry.name == path)
    assert entry.delta_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
    assert entry.kept == pytest.approx(float(((stored - weight) * delta).sum() / delta.square().sum()), rel=1e-4)
    assert entry.error == pytest.approx(float((stored - weight - delta).norm() / weight.norm()), rel=1e-5)
    assert (entry.bytes_before, entry.bytes_after) == (before, merged.nf4_weight.nbytes)
    assert report.kept == min(layer.kept for layer in report.layers)
    text = str(report)
    assert path in text
    assert f"every layer kept at least {report.kept:.1%}" in report.summary()
    assert text.endswith(report.summary())
    assert json.loads(report.to_json())["layers"][0]["name"] == report.layers[0].name


def test_a_small_change_is_lost_in_nf4_and_the_report_says_so():
    """A change far below a level's distance rounds away; one of the weights' size survives."""
    small = qe.merge(prepared(std=1e-6), into="nf4")
    large = qe.merge(prepared(std=0.5), into="nf4")
    assert large.kept > 0.9
    assert max(layer.delta_norm for layer in small.layers) < 1e-4
    assert max(layer.error for layer in small.layers) > 10 * max(layer.delta_norm for layer in small.layers)


def test_several_adapters():
    model = prepared()
    qe.prepare(model, qe.QLoRAConfig(r=2, adapter_name="second", target_modules="q_proj"))
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B["second"])
    qe.set_adapters(model, ["default", "second"])
    expected = logits(model)
    report = qe.merge(model, into="fp32")
    assert report.adapters == ("default", "second")
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    qe.unmerge(model, report)
    qe.set_adapters(model, "second")
    expected = logits(model)
    qe.set_adapters(model, "default")
    qe.merge(model, into="fp32", adapter_names="second")
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_a_model_that_is_not_finite_is_refused_unchanged():
    model = prepared()
    layer = model.model.layers[1].mlp.down_proj
    layer.lora_B["default"].data[3, 1] = float("nan")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj has NaN or infinity in bf16; nothing"):
        qe.merge(model)
    assert all(torch.equal(t, model.state_dict()[n]) or t.isnan().any() for n, t in before.items())
    layer.lora_B["default"].data[3, 1] = 1e6
    with pytest.raises(ValueError, match="infinity in fp16"):
        qe.merge(model, into="fp16")
    assert isinstance(layer, qe.QLoRALinear)
    qe.merge(model, into="fp16", safe=False)


def test_a_parameter_that_only_fp16_cannot_hold_is_refused_unchanged():
    model = prepared()
    model.model.norm.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"model\.norm\.weight has NaN or infinity in fp16; nothing was changed"):
        qe.merge(model, into="fp16")
    assert len(adapter_layers(model)) == 14
    assert model.model.norm.weight.dtype == torch.float32
    model = prepared(gpt2)
    model.transformer.h[0].attn.c_attn.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"c_attn\.bias has NaN or infinity in fp16"):
        qe.merge(model, into="fp16")
    qe.merge(model, into="bf16")


def test_an_adapter_is_not_overwritten_by_a_model(tmp_path):
    model = prepared()
    qe.save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for into in ("nf4", "bf16"):
        report = qe.merge(model, into=into)
        with pytest.raises(
            FileExistsError, match=r"holds an adapter \(adapter_config\.json\); save the model to another"
        ):
            qe.save_merged(model, tmp_path)
        qe.unmerge(model, report)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="has no 4-bit layers"):
        qe.merge(llama())
    with pytest.raises(ValueError, match="no layer has an active adapter"):
        qe.merge(qe.quantize_model(llama()), into="nf4")
    with pytest.raises(ValueError, match="expected one of bf16, fp16, fp32, nf4"):
        qe.merge(prepared(), into="int8")
    with pytest.raises(KeyError, match="no adapter 'nope' to merge"):
        qe.merge(prepared(), adapter_names="nope")


def test_without_adapters_a_merge_only_decodes():
    model = qe.quantize_model(llama()).eval()
    expected = logits(model)
    report = qe.merge(model, into="fp32")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert report.kept is None
    assert report.adapters == ()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_model_loads_with_transformers_alone(kind, tmp_path):
    model = prepared(MAKERS[kind])
    qe.merge(model, into="bf16")
    expected = logits(model)
    qe.save_merged(model, tmp_path / "merged")
    torch.save(token_ids(), tmp_path / "ids.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r}, dtype=torch.bfloat16).eval()\n"
        f"logits = model(torch.load({str(tmp_path / 'ids.pt')!r})).logits\n"
        "assert not any(name.startswith('qlora_engine') for name in sys.modules)\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt").float(), expected)


def test_merged_head_of_a_tied_model_keeps_its_own_weight(tmp_path):
    from transformers import AutoModelForCausalLM

    model = prepared(lambda: llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    expected = logits(model)
    qe.merge(model, into="fp32")
    qe.save_merged(model, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-3, atol=1e-3)


def test_merged_into_nf4_saves_and_loads(tmp_path):
    model = prepared()
    qe.merge(model, into="nf4")
    qe.save_merged(model, tmp_path)
    again = qe.load_quantized(tmp_path, progress=False)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("into", ["bf16", "nf4"])
def test_a_process_that_is_killed_while_saving_leaves_the_old_model(into, tmp_path):
    """The process ends without any clean-up when all but the last byte of the weights are written."""
    model = prepared()
    qe.merge(model, into=into)
    qe.save_merged(model, tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    script = (
        "import os, safetensors.torch, transformers.modeling_utils\n"
        "import qlora_engine as qe\n"
        "from tests.models.test_merge import prepared\n"
        "real = safetensors.torch.save_file\n"
        "def killed(tensors, path, **options):\n"
        "    real(tensors, path, **options)\n"
        "    os.truncate(path, os.path.getsize(path) - 1)\n"
        "    os.kill(os.getpid(), 9)\n"
        "safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = killed\n"
        f"model = prepared(std=0.5)\nqe.merge(model, into={into!r})\n"
        f"qe.save_merged(model, {str(tmp_path / 'merged')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before


def test_saving_a_plain_module_is_refused(tmp_path):
    model = qe.prepare(nn.Sequential(nn.Linear(64, 64)), qe.QLoRAConfig(r=2))
    qe.merge(model)
    with pytest.raises(TypeError, match="save its state_dict instead"):
        qe.save_merged(model, tmp_path / "m")


def test_on_every_device(device):
    model = prepared().to(device)
    ids = token_ids().to(device)
    expected = model(ids).logits
    qe.merge(model, into="fp32")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
