import pytest
import torch

from qlora_engine import peft
from qlora_engine.peft import LoRAPlus
from tests.peft.cases import build, inputs, logits
from tests.peft.test_lora import perturb
from tests.peft.test_lora_in_peft import load_in_peft


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_b_has_a_larger_learning_rate(packed):
    net = build("bert", packed)
    method = peft.apply(net, LoRAPlus(r=2, ratio=8.0, modules_to_save=["classifier"]))
    slow, fast = method.parameter_groups(1e-3, weight_decay=0.1)
    assert (slow["lr"], fast["lr"], fast["weight_decay"]) == (1e-3, 8e-3, 0.1)
    names = {id(p): name for name, p in method.trainable_parameters().items()}
    assert all("lora_B" in names.pop(id(p)) for p in fast["params"])
    assert {names.pop(id(p)) for p in slow["params"]} >= {"classifier.weight", "classifier.bias"}
    assert not names
    before = {name: p.detach().clone() for name, p in method.trainable_parameters().items()}
    optimizer = torch.optim.SGD([slow, fast])
    net(**inputs("bert")).loss.backward()
    optimizer.step()
    for name, p in method.trainable_parameters().items():
        rate = 8e-3 if "lora_B" in name else 1e-3
        torch.testing.assert_close(p.detach(), before[name] - rate * (p.grad + 0.1 * before[name]))


def test_others_have_one_group():
    method = peft.apply(build("gpt2", False), peft.BitFit())
    (group,) = method.parameter_groups(1e-3)
    assert len(group["params"]) == len(method.trainable_parameters())


def test_the_ratio_is_saved_and_peft_loads_the_file(tmp_path):
    net = build("llama", False)
    perturb(peft.apply(net, LoRAPlus(r=2, ratio=8.0))).save(tmp_path)
    method = peft.load(build("llama", False), tmp_path)
    assert method.config.ratio == 8.0
    other = load_in_peft(build("llama", False), tmp_path)
    torch.testing.assert_close(logits(other, "llama"), logits(net, "llama"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="positive"):
        LoRAPlus(ratio=0)
