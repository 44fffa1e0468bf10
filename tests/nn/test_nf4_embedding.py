"""`NF4Embedding`: rows against the whole table decoded, casting and moving; and the head that has no weight."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from qlora_engine import quantize
from qlora_engine.nn import NF4Embedding, TiedNF4Linear

ROWS = 301


def embedding_of(columns, device="cpu", dtype=torch.float32, **options):
    return NF4Embedding.from_embedding(nn.Embedding(ROWS, columns, device=device, dtype=dtype), **options)


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("columns", "blocksize"), [(64, 64), (192, 64), (96, 32), (96, 64), (100, 64), (37, 64), (1, 32), (200, 128)]
)
def test_rows_are_those_of_the_whole_table_bit_for_bit(
    device, dtype, columns, blocksize, double_quant, poisoned_memory
):
    table = embedding_of(columns, device, dtype, blocksize=blocksize, double_quant=double_quant)
    whole = table.dequantize()
    assert whole.dtype == dtype
    for shape in ((), (5,), (2, 3), (0,), (2, 0)):
        ids = torch.randint(ROWS, shape, device=device)
        assert torch.equal(table(ids), whole[ids]), shape
    everything = torch.arange(ROWS, dtype=torch.int32, device=device).flip(0)
    assert torch.equal(table(everything), whole.flip(0))
    assert torch.equal(table(everything[::3]), whole.flip(0)[::3]), "ids that are not contiguous"


@pytest.mark.parametrize("columns", [64, 37])
@pytest.mark.parametrize("wrong", [-1, ROWS, ROWS + 1000])
def test_ids_out_of_range_are_refused(columns, wrong):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        embedding_of(columns)(torch.tensor([0, wrong]))


def test_the_16_bit_table_is_gone():
    table = nn.Embedding(8, 64, padding_idx=3)
    weight = weakref.ref(table.weight)
    small = NF4Embedding.from_embedding(table)
    gc.collect()
    assert weight() is None
    assert small.padding_idx == 3
    assert not small(torch.tensor([3])).any(), "zeros stay zeros"
    with pytest.raises(ValueError, match="released when it was quantized"):
        NF4Embedding.from_embedding(table)


def test_what_cannot_be_quantized_is_said():
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(TypeError, match="Scaled is not a table"):
        NF4Embedding.from_embedding(Scaled(4, 64))
    with pytest.raises(ValueError, match="max_norm=1"):
        NF4Embedding.from_embedding(nn.Embedding(4, 64, max_norm=1.0))
    with pytest.raises(ValueError, match=r"\[3, 64\]; expected \[301, 64\]"):
        embedding_of(64).set_nf4_weight(quantize(torch.randn(3, 64)))


def test_casting_changes_the_output_alone(device):
    table = embedding_of(64)
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    table.to(device, torch.bfloat16)
    ids = torch.tensor([1, 2], device=device)
    assert table(ids).dtype == torch.bfloat16
    assert table(ids).device.type == device
    table.half()
    assert torch.equal(table(ids), table.dequantize(torch.float16)[ids])
    for name, tensor in table.state_dict().items():
        assert torch.equal(tensor.cpu(), before[name]), name


@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_state_dict_round_trip(double_quant):
    table = embedding_of(96, double_quant=double_quant)
    empty = NF4Embedding(ROWS, 96, double_quant=double_quant, device="meta")
    empty.load_state_dict(table.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(torch.float32), table.dequantize())
    assert "nf4 blocks of 64" in repr(empty)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = embedding_of(64)
        self.head = TiedNF4Linear(self.embedding, torch.randn(ROWS))

    def forward(self, ids):
        return self.head(self.embedding(ids))


def test_a_tied_head_has_no_weight_of_its_own(device):
    model = Model()
    assert {*model.state_dict()} == {*(f"embedding.{n}" for n in model.embedding.state_dict()), "head.bias"}
    ids = torch.arange(6).view(2, 3)
    whole = model.embedding.dequantize()
    expected = nn.functional.linear(whole[ids], whole, model.head.bias)
    torch.testing.assert_close(model(ids), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.embedding is other.embedding
        assert torch.equal(other(ids), model(ids))
    model.to(device)
    assert model.head.weight is model.embedding.weight
    assert model.head.absmax is model.embedding.absmax
    torch.testing.assert_close(model(ids.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert model.bfloat16()(ids.to(device)).dtype == torch.bfloat16


def test_compiles_in_one_graph():
    model = Model()
    ids = torch.arange(6).view(2, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))
