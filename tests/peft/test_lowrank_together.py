"""Methods of the LoRA family on the same layers, and beside methods that bring layers of their own."""

import copy
import dataclasses
import itertools
from typing import ClassVar

import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import AdaLoRA, DoRA, LoRA, LoRAFA, VeRA
from tests.peft.cases import build, inputs, logits
from tests.peft.test_lora import perturb

FAMILY = (
    LoRA(r=2, adapter_name="a"),
    LoRA(r=2, init="pissa", adapter_name="b"),
    AdaLoRA(init_r=3, target_r=1, total_steps=4, adapter_name="c"),
    VeRA(r=4, adapter_name="d"),
    LoRAFA(r=2, adapter_name="e"),
)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_at_once_and_away_in_any_order(name, packed):
    net = build(name, packed)
    before, base = {n: t.clone() for n, t in net.state_dict().items()}, logits(net, name)
    for order in itertools.islice(itertools.permutations(range(len(FAMILY))), 0, 120, 23):
        methods = [perturb(peft.apply(net, config)) for config in FAMILY]
        net(**inputs(name)).loss.backward()
        assert all(p.grad is not None for m in methods for p in m.trainable_parameters().values())
        together = logits(net, name)
        twin = copy.deepcopy(net)
        for index in order:
            with methods[index].disabled():
                assert not torch.equal(logits(net, name), together)
            methods[index].remove()
            together = logits(net, name)
        after = net.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in after.items())
        assert torch.equal(together, base)
        for method in list(peft.applied(twin)):
            method.remove()
        assert torch.equal(logits(twin, name), base)


@pytest.mark.parametrize("packed", [False, True], ids=["full", "nf4"])
def test_merged_one_after_the_other(packed):
    net = build("llama", packed)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    methods = [perturb(peft.apply(net, config), 0.02) for config in FAMILY]
    learnt = logits(net, "llama")
    for method in methods[:3]:
        method.merge()
    merged = logits(net, "llama")
    assert (merged - learnt).norm() < (0.4 if packed else 1e-4) * learnt.norm()
    for method in reversed(methods[:3]):
        method.unmerge()
    assert torch.allclose(logits(net, "llama"), learnt, rtol=1e-4, atol=1e-5)
    for method in methods:
        method.remove()
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@dataclasses.dataclass
class Extra(peft.MethodConfig):
    name: ClassVar[str] = "extra"


class ExtraMethod(peft.Method):
    """A linear layer of its own on the model."""

    config_class = Extra

    def _install(self):
        self.model.extra = nn.Linear(3, 3)

    def _uninstall(self):
        del self.model.extra

    def _switch(self, enabled):
        pass

    def tensors(self):
        return {"weight": self.model.extra.weight, "bias": self.model.extra.bias}


@pytest.mark.parametrize("config", [LoRA(r=2), DoRA(r=2), VeRA(r=2)], ids=lambda c: c.name)
def test_layers_that_methods_brought_are_no_targets(config, monkeypatch):
    monkeypatch.setitem(peft.METHODS, "extra", ExtraMethod)
    net = build("llama", True)
    extra = peft.apply(net, Extra())
    method = peft.apply(net, config)
    assert "extra" not in method._sites
    extra.remove()
    method.remove()
    peft.apply(net, Extra())
    with pytest.raises(ValueError, match="'extra' matches no module"):
        peft.apply(net, dataclasses.replace(config, target_modules=["extra"]))
