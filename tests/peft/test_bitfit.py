import pytest

from qlora_engine import peft
from qlora_engine.peft import BitFit
from tests.peft.cases import build, inputs, logits


def test_a_model_without_biases_is_refused_with_the_way_out():
    net = build("llama", False)
    with pytest.raises(peft.MethodError, match=r"has no bias to train.*add_missing=True.*q_proj"):
        peft.apply(net, BitFit())
    assert all(p.requires_grad for p in net.parameters())


def test_patterns_choose_the_biases():
    net = build("bert", True)
    method = peft.apply(net, BitFit(target_modules=["query"]))
    assert all(name.endswith("query.bias") for name in method.trainable_parameters())
    with pytest.raises(ValueError, match="matches no module"):
        peft.apply(build("bert", True), BitFit(target_modules=["qery"]))


def test_merged_biases_stay():
    net = build("gpt2", False)
    method = peft.apply(net, BitFit())
    loss = net(**inputs("gpt2")).loss
    loss.backward()
    for param in method.trainable_parameters().values():
        param.data.sub_(param.grad, alpha=0.1)
    learnt = logits(net, "gpt2")
    method.merge()
    assert peft.applied(net) == []
    assert (logits(net, "gpt2") == learnt).all()
