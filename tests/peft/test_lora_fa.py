import json

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine import peft
from qlora_engine.peft import LoRA, LoRAFA
from tests.peft.cases import build, logits
from tests.peft.test_lora import perturb
from tests.peft.test_lora_in_peft import load_in_peft


def saved_for_backward(net, x):
    """Shapes of all that a forward pass keeps for backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
        net(x)
    return shapes


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_the_input_is_not_kept(packed):
    x = torch.randn(50, 64, requires_grad=True)
    kept = {}
    for config in (LoRAFA(r=4), LoRA(r=4)):
        net = nn.Sequential(nn.Linear(64, 32))
        if packed:
            qe.prepare(net, qe.QLoRAConfig(r=0))
        peft.apply(net, config)
        kept[config.name] = saved_for_backward(net, x)
    assert (50, 64) not in kept["lora_fa"]
    assert (50, 4) in kept["lora_fa"]
    assert (50, 64) in kept["lora"]


def test_only_b_is_trained():
    net = build("llama", True)
    method = peft.apply(net, LoRAFA(r=4, init="gaussian"))
    assert all(name.endswith("lora_B.weight") for name in method.trainable_parameters())
    assert method.report().trainable == sum(s.factors[1].numel() for s in method._sites.values())
    assert method.report().saved_bytes == 4 * sum(f.numel() for s in method._sites.values() for f in s.factors)


def test_the_file_is_pefts_lora_and_ours(tmp_path):
    net = build("gpt2", False)
    perturb(peft.apply(net, LoRAFA(r=4, alpha=8))).save(tmp_path)
    torch.testing.assert_close(
        logits(load_in_peft(build("gpt2", False), tmp_path), "gpt2"), logits(net, "gpt2"), rtol=1e-4, atol=1e-5
    )
    assert peft.load(build("gpt2", False), tmp_path).name == "lora_fa"
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": None}))
    assert peft.load(build("gpt2", False), tmp_path).name == "lora"


def test_what_it_refuses():
    for init in ("both", "pissa"):
        with pytest.raises(ValueError, match="not for LoRA-FA"):
            LoRAFA(init=init)
    with pytest.raises(peft.MethodError, match="zero at the start for embeddings"):
        peft.apply(build("gpt2", False), LoRAFA(target_modules=["wte", "c_attn"]))
