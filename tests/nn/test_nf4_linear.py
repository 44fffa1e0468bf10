"""`NF4Linear`: storage, casting, moving, saving."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from qlora_engine import quantize
from qlora_engine.nn import NF4Linear


@pytest.fixture(params=[True, False], ids=["double", "single"])
def layer(request):
    return NF4Linear.from_linear(nn.Linear(96, 40), double_quant=request.param)


def bytes_of(layer):
    return {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}


def assert_same_bytes(layer, before):
    for name, tensor in before.items():
        now = layer.state_dict()[name]
        assert now.dtype == tensor.dtype, name
        assert torch.equal(now.cpu(), tensor.cpu()), name


def test_computes_the_product_with_the_decoded_weight(layer):
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))


def test_is_near_the_layer_it_came_from():
    linear = nn.Linear(256, 128)
    x = torch.randn(64, 256)
    expected = linear(x)
    error = (NF4Linear.from_linear(linear)(x) - expected).norm() / expected.norm()
    assert error < 0.15


def test_the_16_bit_weight_is_gone():
    linear = nn.Linear(64, 64)
    weight = weakref.ref(linear.weight)
    storage = weakref.ref(linear.weight.untyped_storage())
    NF4Linear.from_linear(linear)
    gc.collect()
    assert weight() is None
    assert storage() is None
    assert linear.weight is None
    with pytest.raises(ValueError, match="released when it was quantized"):
        NF4Linear.from_linear(linear)


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32), ("double", torch.float64)],
)
def test_casting_leaves_bytes_and_scales_alone(layer, cast, dtype):
    before = bytes_of(layer)
    getattr(layer, cast)()
    assert_same_bytes(layer, before)
    assert layer.bias.dtype == dtype
    layer.to(torch.float16)
    assert_same_bytes(layer, before)


def test_moving_keeps_dtypes(layer, device):
    before = bytes_of(layer)
    layer.to(device, torch.bfloat16)
    assert_same_bytes(layer, before)
    assert all(t.device.type == device for t in layer.state_dict().values())
    assert layer.bias.dtype == torch.bfloat16


def test_state_dict_round_trip_is_strict(layer):
    other = NF4Linear(96, 40, double_quant=layer.double_quant)
    assert other.load_state_dict(layer.state_dict(), strict=True).missing_keys == []
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))
    wrong = NF4Linear(96, 40, double_quant=not layer.double_quant)
    with pytest.raises(RuntimeError, match="nested_absmax"):
        wrong.load_state_dict(layer.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="absmax"):
        NF4Linear(96, 40, double_quant=layer.double_quant, blocksize=32).load_state_dict(layer.state_dict())


def test_meta_layer_takes_over_a_state_dict(layer):
    other = NF4Linear(96, 40, double_quant=layer.double_quant, device="meta")
    other.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(layer, how):
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = NF4Linear(96, 40, double_quant=layer.double_quant)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bytes(other, bytes_of(layer))
    other.weight.data.zero_()
    assert layer.weight.any()


def test_weight_is_frozen(layer):
    layer.train()
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    x = torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_refuses_what_is_not_linear():
    with pytest.raises(TypeError, match="Conv2d is not a linear layer"):
        NF4Linear.from_linear(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match="NF4Linear is not a linear layer"):
        NF4Linear.from_linear(NF4Linear(4, 4))
    with pytest.raises(ValueError, match="expected a matrix"):
        NF4Linear.from_weight(quantize(torch.randn(2, 2, 64)))
    with pytest.raises(ValueError, match=r"expected \[40, 96\]"):
        NF4Linear(96, 40).set_nf4_weight(quantize(torch.randn(96, 40)))


def test_text_names_the_format(layer):
    assert "nf4 blocks of 64" in repr(layer)
    assert ("8-bit scales" in repr(layer)) == layer.double_quant
