"""`QLoRALinear`: adapters on a frozen 4-bit layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_engine.nn import LoRASettings, NF4Linear, QLoRALinear


@pytest.fixture
def layer():
    layer = QLoRALinear.from_linear(nn.Linear(96, 40), r=4, alpha=8)
    nn.init.normal_(layer.lora_B["default"])
    return layer


def test_a_new_adapter_changes_nothing():
    linear = nn.Linear(96, 40)
    layer = QLoRALinear.from_linear(linear, r=4)
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), layer.to_nf4()(x))
    assert layer.lora_A["default"].any()


def test_adds_the_scaled_product(layer):
    x = torch.randn(5, 96)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(layer(x), layer.to_nf4()(x) + 2.0 * (x @ A.T) @ B.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.delta_weight(), (2.0 * B @ A).detach())


def test_constructor_is_that_of_a_linear_layer():
    torch.manual_seed(7)
    layer = QLoRALinear(96, 40, bias=True, r=4)
    torch.manual_seed(7)
    linear = nn.Linear(96, 40)
    assert torch.equal(layer.bias, linear.bias)
    error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < 0.12
    assert QLoRALinear(96, 40, False).bias is None
    assert QLoRALinear(96, 40, device="meta").lora_A["default"].device.type == "meta"


def test_trains_the_adapter_and_nothing_else(layer):
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(64, 96), torch.randn(64, 40)
    losses = []
    for _ in range(20):
        loss = (layer.train()(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    changed = {n for n, t in layer.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"lora_A.default", "lora_B.default"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == changed


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(layer, use_reentrant):
    x = torch.randn(5, 96, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [t.grad.clone() for t in (x, *layer.lora_A.values(), *layer.lora_B.values())]
    for t in (x, *layer.parameters()):
        t.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for t, e in zip((x, *layer.lora_A.values(), *layer.lora_B.values()), expected, strict=True):
        torch.testing.assert_close(t.grad, e)


def test_named_adapters_add_up_and_switch_off(layer):
    x = torch.randn(5, 96)
    layer.add_adapter("other", r=2, alpha=6)
    assert layer.active_adapters == ("other",)
    nn.init.normal_(layer.lora_B["other"])
    first, second = layer.delta_weight("default"), layer.delta_weight("other")
    base = layer.to_nf4()(x)
    layer.set_adapters(["default", "other"])
    torch.testing.assert_close(layer(x), base + x @ (first + second).T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.delta_weight(), first + second)
    layer.adapters_enabled = False
    torch.testing.assert_close(layer(x), base)
    layer.adapters_enabled = True
    layer.delete_adapter("default")
    assert layer.active_adapters == ("other",)
    torch.testing.assert_close(layer(x), base + x @ second.T, rtol=1e-4, atol=1e-3)
    layer.delete_adapter("other")
    torch.testing.assert_close(layer(x), base)


def test_scaling():
    assert LoRASettings(r=16, alpha=8).scaling == 0.5
    assert LoRASettings(r=16, alpha=8, rslora=True).scaling == 2.0


def test_rank_zero_is_off():
    layer = QLoRALinear.from_linear(nn.Linear(64, 64), r=0)
    assert layer.adapters == {}
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer(torch.randn(2, 64)).shape == (2, 64)


def test_dropout_acts_in_training_only():
    layer = QLoRALinear.from_linear(nn.Linear(96, 40), r=4, dropout=0.5)
    nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(5, 96)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_errors_say_what_there_is(layer):
    with pytest.raises(KeyError, match=r"no adapter 'nope'; this layer has \['default'\]"):
        layer.set_adapters("nope")
    with pytest.raises(ValueError, match="already an adapter 'default'"):
        layer.add_adapter("default")
    with pytest.raises(ValueError, match="have a dot"):
        layer.add_adapter("a.b")
    with pytest.raises(ValueError, match="rank r is 0"):
        layer.add_adapter("zero", r=0)
    with pytest.raises(ValueError, match=r"dropout is 1\.5"):
        layer.add_adapter("wet", dropout=1.5)


def test_copies(layer):
    x = torch.randn(3, 96)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.adapters == layer.adapters
    other = QLoRALinear(96, 40, r=4, alpha=8)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))


def test_takes_over_a_4_bit_layer_without_a_copy():
    base = NF4Linear.from_linear(nn.Linear(64, 64))
    layer = QLoRALinear.from_nf4(base, r=4)
    assert layer.weight.data_ptr() == base.weight.data_ptr()
    assert layer.to_nf4().weight.data_ptr() == base.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_every_device(device, dtype):
    layer = QLoRALinear.from_linear(nn.Linear(96, 40).to(device, dtype), r=4)
    nn.init.normal_(layer.lora_B["default"])
    x = torch.randn(7, 96, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_A["default"].grad.dtype == torch.float32
    assert x.grad.dtype == dtype


def test_compiles_without_a_graph_break(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    torch.testing.assert_close(compiled(x), layer(x))


def test_text_lists_the_adapters(layer):
    layer.add_adapter("other", r=2, alpha=2, dropout=0.1)
    assert "default: r=4, scaling=2" in repr(layer)
    assert "other*: r=2, scaling=1, dropout=0.1" in repr(layer)
