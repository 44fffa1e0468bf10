"""Fifty steps of a tiny model beside PEFT on bitsandbytes: the same weights, adapters and data, the same losses."""

import copy

import pytest
import torch
from torch import nn

import qlora_engine as qe
from tests.models import tiny

STEPS, RANK, ALPHA = 50, 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama():
    """Widths are multiples of a block: bitsandbytes' CPU backend decodes others wrongly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def on_bitsandbytes(model):
    """PEFT's LoRA on bitsandbytes' 4-bit layers, computing in float32."""
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.rpartition(".")[2] in TARGETS:
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(
                layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            model.set_submodule(path, new.to("cpu"))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    return peft.get_peft_model(model, config)


def train(model, batches):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


@pytest.mark.filterwarnings("ignore")
def test_fifty_steps_as_peft_on_bitsandbytes():
    base = llama()
    theirs = on_bitsandbytes(copy.deepcopy(base))
    ours = qe.prepare(base, qe.QLoRAConfig(r=RANK, alpha=ALPHA))
    with torch.no_grad():
        for path, layer in ours.named_modules():
            if isinstance(layer, qe.QLoRALinear):
                twin = theirs.base_model.model.get_submodule(path)
                layer.lora_A["default"].copy_(twin.lora_A["default"].weight)
                layer.lora_B["default"].copy_(twin.lora_B["default"].weight)
    generator = torch.Generator().manual_seed(0)
    corpus = torch.randint(3, tiny.VOCABULARY, (16, 12), generator=generator)  # few enough to be learned by heart
    batches = [corpus[torch.randint(16, (4,), generator=generator)] for _ in range(STEPS)]
    expected, actual = train(theirs, batches), train(ours, batches)
    assert abs(float(actual[0] - expected[0])) < 1e-3
    assert float(expected[-5:].mean()) < float(expected[:5].mean()) - 0.3  # something was learned
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
