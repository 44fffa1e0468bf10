import pytest
import torch

import qlora_engine as qe
from qlora_engine.training import liger
from tests.models import tiny
from tests.numerics import relative_rms


def attention_of(model):
    return model.model.layers[0].self_attn


def outputs_of(model, ids):
    """Loss, logits and gradients of the adapters of one batch."""
    outputs = model(input_ids=ids, labels=ids)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [outputs.logits, *torch.autograd.grad(outputs.loss, parameters)]


def test_a_forward_with_another_rotary_is_its_own():
    model, ids = tiny.llama(), torch.arange(7).unsqueeze(0)
    attention, plain = attention_of(model), model(ids).logits
    calls = []

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(q.shape)
        return original(q, k, cos, sin, unsqueeze_dim)

    original = liger.rotary_of(attention)
    assert liger.rotates_alike(original, rotary, attention)
    assert not liger.rotates_alike(original, lambda q, k, cos, sin: (k, q), attention)
    assert not liger.rotates_alike(original, lambda q, k, cos, sin: (q, k), attention)
    calls.clear()
    attention.forward = liger.with_rotary(attention, rotary)
    assert torch.equal(model(ids).logits, plain)
    assert len(calls) == 1  # the other layer's attention still has its own
    liger.remove_liger(model)
    assert "forward" not in attention.__dict__


def test_the_variant_of_a_norm_is_found_by_numbers():
    norm = tiny.llama().model.norm
    norm.weight.data = torch.randn(64) + 1

    def product(x, weight, eps, offset, casting, in_place):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + offset, eps)

    assert liger.norm_variant(norm, product) in ((0.0, "llama"), (0.0, "gemma"))
    assert liger.norm_variant(norm, lambda x, *_: 2 * x) is None


def test_without_a_gpu_the_reason_is_given():
    with pytest.raises(RuntimeError, match="GPU"):
        liger.use_liger(tiny.llama())


@pytest.mark.gpu
def test_same_numbers_and_reversible():
    pytest.importorskip("liger_kernel")
    model = tiny.llama().cuda().bfloat16()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data = torch.rand(64, device="cuda", dtype=torch.bfloat16) + 0.5
    qe.prepare(model, qe.QLoRAConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    ids = torch.randint(tiny.VOCABULARY, (2, 37), device="cuda")
    plain = outputs_of(model, ids)
    assert liger.use_liger(model) == liger.LigerUse(norms=5, attentions=2)
    for actual, expected in zip(outputs_of(model, ids), plain, strict=True):
        assert relative_rms(actual, expected) < 3e-2
    liger.remove_liger(model)
    for actual, expected in zip(outputs_of(model, ids), plain, strict=True):
        assert torch.equal(actual, expected)
