"""`NF4Experts` against the module it replaces, over the decoded weights."""

import copy

import pytest
import torch

from qlora_engine.nn import NF4Experts
from tests.models import tiny

CASES = {"qwen3_moe": tiny.qwen3_moe, "gpt_oss": tiny.gpt_oss}


def experts_of(kind, dtype=torch.float32):
    model = CASES[kind]().to(dtype)
    model.config._experts_implementation = "eager"
    experts = model.model.layers[0].mlp.experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts


def inputs(tokens, dtype=torch.float32):
    x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]) if tokens else torch.empty(0, 2).long()
    return x, chosen, torch.rand(tokens, 2).to(dtype).requires_grad_()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("kind", CASES)
def test_equals_the_module_it_replaces(kind, tokens, double_quant, poisoned_memory):
    packed = NF4Experts.from_experts(experts_of(kind), double_quant=double_quant)
    plain = copy.deepcopy(packed).to_experts(torch.float32).double()
    x, chosen, weights = inputs(tokens)
    y = packed(x, chosen, weights)
    x64, weights64 = (t.detach().double().requires_grad_() for t in (x, weights))
    expected = plain(x64, chosen, weights64)
    assert y.shape == x.shape
    if not tokens:
        return
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    for mine, exact in ((y, expected), (x.grad, x64.grad), (weights.grad, weights64.grad)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5)


def test_casts_leave_the_bytes_alone():
    packed = NF4Experts.from_experts(experts_of("gpt_oss"))
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.bfloat16()
    for name, tensor in packed.state_dict().items():
        if "bias" in name:
            assert tensor.dtype == torch.bfloat16
        else:
            assert torch.equal(tensor, before[name])
    x, chosen, weights = inputs(5, torch.bfloat16)
    assert packed(x, chosen, weights).dtype == torch.bfloat16


def test_refuses_other_modules():
    with pytest.raises(TypeError, match="no module of stacked experts"):
        NF4Experts(torch.nn.Linear(4, 4))
