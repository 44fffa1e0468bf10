import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.nn import NF4Linear
from qlora_engine.peft import IA3, DiffPruning, FishMask
from qlora_engine.peft.weights import change_weight
from tests.peft.cases import build, inputs, logits


def test_a_weight_in_four_bits_keeps_its_settings():
    layer = NF4Linear.from_linear(nn.Linear(64, 32).bfloat16(), blocksize=32, double_quant=False)
    before = layer.dequantize(torch.float32)
    change_weight(layer, lambda weight: 2 * weight)
    assert (layer.blocksize, layer.double_quant, layer.weight_dtype) == (32, False, torch.bfloat16)
    torch.testing.assert_close(layer.dequantize(torch.float32), 2 * before, rtol=1e-2, atol=1e-2)


def test_a_transposed_weight_is_seen_as_out_by_in():
    layer = build("gpt2", False).transformer.h[0].attn.c_attn
    before = layer.weight.detach().clone()
    seen = []
    change_weight(layer, lambda weight: seen.append(tuple(weight.shape)) or weight + torch.eye(192, 64))
    assert seen == [(192, 64)]
    torch.testing.assert_close(layer.weight.detach(), before + torch.eye(64, 192))


@pytest.mark.parametrize(
    "config",
    [IA3(["lm_head"]), FishMask(0.1, [inputs("gpt2")], ["lm_head"]), DiffPruning(target_modules=["lm_head"])],
    ids=lambda config: config.name,
)
def test_a_tied_head_is_not_merged(config):
    net = build("gpt2", False)
    base = logits(net, "gpt2")
    method = peft.apply(net, config)
    with pytest.raises(peft.MethodError, match=r"lm_head shares its weight with transformer\.wte"):
        method.merge()
    method.remove()
    assert torch.equal(logits(net, "gpt2"), base)


@pytest.mark.parametrize(
    "config", [IA3(), FishMask(0.1, [inputs("gpt2")]), DiffPruning()], ids=lambda config: config.name
)
def test_what_is_not_finite_is_not_merged(config):
    net = build("gpt2", False)
    method = peft.apply(net, config)
    param = list(method.trainable_parameters().values())[-1]
    with torch.no_grad():
        param.view(-1)[-1] = float("nan")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(peft.MethodError, match="NaN or infinity"):
        method.merge()
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in net.state_dict().items())
    assert peft.applied(net) == [method]
