"""Branches and fused adapters compile without a break, and are switched under a compiled model."""

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import AdaLoRA, DoRA, LoRA, LoRAFA, VeRA
from tests.peft.test_lora import perturb

CONFIGS = {
    "lora": LoRA(r=4),
    "pissa": LoRA(r=4, init="pissa"),
    "lora_fa": LoRAFA(r=4),
    "dora": DoRA(r=4),
    "vera": VeRA(r=8),
    "adalora": AdaLoRA(init_r=4, target_r=2, total_steps=5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_compiles_in_one_graph(config, packed):
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 24))
    if packed:
        qe.prepare(net, qe.QLoRAConfig(r=0))
    x = torch.randn(5, 64)
    base = net(x)
    method = perturb(peft.apply(net, config))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (net, compiled):
        net.zero_grad()
        y = function(x)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in method.trainable_parameters().values())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    with method.disabled():
        torch.testing.assert_close(compiled(x), base, rtol=1e-4, atol=1e-5)
