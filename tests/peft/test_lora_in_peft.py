"""Files of the LoRA family are PEFT's, in both directions."""

import json
import warnings

import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import LoRA
from tests.peft.cases import build, logits
from tests.peft.test_lora import EVERYTHING, Mixed, perturb

theirs = pytest.importorskip("peft")


def load_in_peft(net, folder):
    """PEFT's model, without a warning that a tensor is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        warnings.filterwarnings("error", message=".*Unexpected.*")
        return theirs.PeftModel.from_pretrained(net, folder).eval()


def give_values(model):
    """Values that matter for all that PEFT trains."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


OURS = {
    "plain": ("llama", LoRA(r=4, alpha=8)),
    "rslora": ("gpt2", LoRA(r=4, alpha=8, rslora=True)),
    "pissa": ("gpt2", LoRA(r=4, alpha=8, init="pissa")),
    "pissa, rslora": ("llama", LoRA(r=3, alpha=8, rslora=True, init="pissa")),
    "patterns": ("llama", LoRA(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3})),
    "embeddings": ("bert", LoRA(r=4, target_modules=["word_embeddings", "query"])),
    "classification": ("bert", LoRA(r=4, modules_to_save=["classifier"])),
    "biases": ("gpt2", LoRA(r=4, bias="all")),
    "own biases": ("bert", LoRA(r=4, target_modules=["query"], bias="lora_only")),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case, tmp_path):
    name, config = OURS[case]
    net = build(name, False)
    method = perturb(peft.apply(net, config))
    method.save(tmp_path)
    other = load_in_peft(build(name, False), tmp_path)
    torch.testing.assert_close(logits(other, name), logits(net, name), rtol=1e-4, atol=1e-5)
    again = build(name, False)
    loaded = peft.load(again, tmp_path)
    torch.testing.assert_close(logits(again, name), logits(net, name), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert loaded.config.bias == config.bias


THEIRS = {
    "plain": ("llama", {"target_modules": "all-linear"}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1.*(q|up)_proj", "use_rslora": True}),
    "patterns": (
        "gpt2",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "rank_pattern": {"c_attn": 3},
            "alpha_pattern": {"h.0.mlp.c_proj": 2},
        },
    ),
    "embeddings": ("gpt2", {"target_modules": ["wte", "wpe", "c_fc"]}),
    "classification": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "biases": ("bert", {"target_modules": ["value"], "bias": "lora_only"}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
}


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Careful")
def test_theirs_here(case, tmp_path):
    name, options = THEIRS[case]
    model = theirs.get_peft_model(build(name, False), theirs.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    give_values(model)
    model.save_pretrained(tmp_path)
    net = build(name, False)
    method = peft.load(net, tmp_path)
    torch.testing.assert_close(logits(net, name), logits(model, name), rtol=1e-4, atol=1e-5)
    base = build(name, False)
    with method.disabled():
        assert torch.equal(logits(net, name), logits(base, name))
    packed = build(name, True)
    assert peft.load(packed, tmp_path).report().trainable == method.report().trainable


def test_convolutions_and_tables_both_ways(tmp_path):
    ids = torch.randint(0, 17, (3, 9))
    torch.manual_seed(0)
    net = Mixed(padding=1)
    perturb(peft.apply(net, LoRA(r=3, alpha=5, target_modules=EVERYTHING)), 0.3).save(tmp_path / "ours")
    torch.manual_seed(0)
    other = load_in_peft(Mixed(padding=1), tmp_path / "ours")
    torch.testing.assert_close(other(ids), net(ids), rtol=1e-4, atol=1e-5)
    give_values(other)
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        for parameter_name, parameter in other.named_parameters():
            if "lora" in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    other.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    again = Mixed(padding=1)
    peft.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(ids), other(ids), rtol=1e-4, atol=1e-5)


def test_convolutions_that_peft_computes_otherwise_are_saved_in_the_own_format(tmp_path):
    ids = torch.randint(0, 17, (3, 9))
    torch.manual_seed(0)
    net = Mixed(dilation=2)
    perturb(peft.apply(net, LoRA(r=3, target_modules=EVERYTHING))).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QLORA_ENGINE"
    torch.manual_seed(0)
    again = Mixed(dilation=2)
    peft.load(again, tmp_path)
    torch.testing.assert_close(again(ids), net(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qalora": True}, "asks for use_qalora"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"r": 9}, "says rank 9"),
        ({"lora_alpha": "x"}, "lora_alpha"),
    ],
)
def test_files_that_cannot_be_carried_are_refused(change, message, tmp_path):
    perturb(peft.apply(build("llama", False), LoRA(r=4))).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    net = build("llama", True)
    with pytest.raises(peft.MethodError, match=message):
        peft.load(net, tmp_path)
    assert peft.applied(net) == []
