import copy
import itertools

import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import Bottleneck
from qlora_engine.peft.bottleneck import ACTIVATIONS
from tests.peft.cases import build, inputs, logits


def disturb(method, size=0.2):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in method.trainable_parameters().values():
            param.copy_(size * torch.randn(param.shape, generator=generator))
    return {name: p.detach().double() for name, p in method.trainable_parameters().items()}


def network(found, path, h, activation="gelu", scaling=1.0):
    """The formula in float64."""
    down, up, d, u = (found[f"{path}.{name}"] for name in ("down", "up", "down_bias", "up_bias"))
    return scaling * (ACTIVATIONS[activation](h @ down.T + d) @ up.T + u)


@pytest.mark.parametrize(("activation", "parallel"), list(itertools.product(ACTIVATIONS, [False, True])))
def test_it_is_the_formula(activation, parallel):
    net, x = nn.Sequential(nn.Linear(7, 5)).double(), torch.randn(2, 3, 7, dtype=torch.float64)
    expected = net(x)
    config = Bottleneck(size=4, target_modules=["0"], activation=activation, parallel=parallel, scaling=0.7)
    found = disturb(peft.apply(net, config))
    h = x if parallel else expected
    torch.testing.assert_close(net(x), expected + network(found, "0", h, activation, 0.7))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_convolution_is_adapted_over_its_channels(parallel):
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), torch.randn(2, 3, 5, 6)
    expected = net(x)
    method = peft.apply(net, Bottleneck(size=2, target_modules=["0"], parallel=parallel))
    found = disturb(method)
    h = (x if parallel else expected).permute(0, 2, 3, 1).double()
    change = network(found, "0", h).permute(0, 3, 1, 2)
    torch.testing.assert_close(net(x), (expected + change).float(), rtol=1e-4, atol=1e-5)
    assert method.trainable_parameters()["0.down"].shape == (2, 3 if parallel else 8)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv1d(3, 3, 2, padding="valid")],
    ids=["shrinks", "stride", "valid"],
)
def test_a_convolution_that_moves_positions_refuses_a_parallel_adapter(layer):
    net = nn.Sequential(layer)
    with pytest.raises(peft.MethodError, match="changes the positions"):
        peft.apply(net, Bottleneck(target_modules=["0"], parallel=True))
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    peft.apply(net, Bottleneck(target_modules=["0"]))


def test_placements():
    def paths(model, **options):
        method = peft.apply(build(model, False), Bottleneck(**options))
        return [key.removesuffix(".down") for key in method.tensors() if key.endswith(".down") and ".0." in key]

    layer = "model.layers.0"
    assert paths("llama") == [f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"]
    assert paths("llama", placement="pfeiffer") == [f"{layer}.mlp.down_proj"]
    assert paths("gpt2") == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]
    layer = "bert.encoder.layer.0"
    assert paths("bert") == [f"{layer}.attention.output.dense", f"{layer}.output.dense"]


def test_in_parallel_it_spans_the_whole_part():
    """The adapter's change of a Llama's feed-forward part is that of its input."""
    net = build("llama", False)
    method = peft.apply(net, Bottleneck(size=3, placement="pfeiffer", parallel=True))
    found = disturb(method)
    mlp, x = net.model.layers[1].mlp, torch.randn(1, 4, 64)
    with method.disabled():
        expected = mlp(x)
    change = network(found, "model.layers.1.mlp.down_proj", x.double())
    torch.testing.assert_close(mlp(x), (expected + change).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_any_layer_can_be_named(parallel, packed):
    net = build("llama", packed)
    names = ["self_attn", "mlp", "q_proj", "input_layernorm"]
    expected = logits(net, "llama")
    method = peft.apply(net, Bottleneck(size=3, target_modules=names, parallel=parallel))
    assert len(method.tensors()) == 4 * 4 * 2
    assert torch.equal(logits(net, "llama"), expected)
    net(**inputs("llama")).loss.backward()
    assert all(p.grad is not None for p in method.trainable_parameters().values())
    disturb(method)
    assert not torch.equal(logits(net, "llama"), expected)


def test_embeddings_in_sequence_alone():
    net = build("llama", False)
    with pytest.raises(peft.MethodError, match="reads indices"):
        peft.apply(net, Bottleneck(target_modules=["embed_tokens"], parallel=True))
    peft.apply(net, Bottleneck(target_modules=["embed_tokens"]))
    net(**inputs("llama")).loss.backward()


def test_wrong_settings_are_refused():
    for options, words in [
        ({"size": 0}, "at least 1"),
        ({"activation": "swish"}, "one of relu"),
        ({"placement": "above"}, "one of houlsby"),
        ({"dropout": 1.0}, "below 1"),
    ]:
        with pytest.raises(peft.MethodError, match=words):
            Bottleneck(**options)
    net = build("llama", False)
    with pytest.raises(ValueError, match=r"matches no module.*mlp"):
        peft.apply(net, Bottleneck(target_modules=["mlpp"]))
    with pytest.raises(peft.MethodError, match="name its layers"):
        peft.apply(nn.Sequential(nn.Linear(2, 2)), Bottleneck())
    with pytest.raises(peft.MethodError, match=r"width of 0 \(Tanh\)"):
        peft.apply(nn.Sequential(nn.Tanh()), Bottleneck(target_modules=["0"]))
    with pytest.raises(peft.MethodError, match="cannot be merged"):
        peft.apply(net, Bottleneck()).merge()


def test_dropout_acts_in_training_alone():
    net = build("llama", False)
    method = peft.apply(net, Bottleneck(dropout=0.5))
    disturb(method)
    assert torch.equal(logits(net, "llama"), logits(net, "llama"))
    net.train()
    assert not torch.equal(logits(net, "llama"), logits(net, "llama"))


def test_copies_have_adapters_of_their_own():
    net = build("gpt2", False)
    method = peft.apply(net, Bottleneck(parallel=True))
    twin = copy.deepcopy(net)
    disturb(peft.applied(twin)[0])
    expected = logits(build("gpt2", False), "gpt2")
    assert torch.equal(logits(net, "gpt2"), expected)
    assert not torch.equal(logits(twin, "gpt2"), expected)
    peft.applied(twin)[0].remove()
    assert torch.equal(logits(twin, "gpt2"), expected)
    assert peft.applied(net) == [method]


def test_compiled_it_is_the_same():
    net = build("llama", False)
    method = peft.apply(net, Bottleneck(size=4, parallel=True))
    disturb(method)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, "llama"), logits(net, "llama"), rtol=1e-5, atol=1e-5)
