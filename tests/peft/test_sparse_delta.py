import pytest
import torch
from torch import nn

from qlora_engine import peft
from qlora_engine.peft import sparse_delta
from qlora_engine.peft.sparse_delta import SparseDelta

SHAPE = (37, 19)


def delta(shape=SHAPE, share=0.1, seed=0):
    """A part with values, and the same change as a dense matrix."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)
    dense[3:6] = 0  # rows without an entry
    index = dense.flatten().nonzero().flatten()
    return SparseDelta(index, shape, dense.flatten()[index]), dense


@pytest.fixture(params=["few rows", "one tile", "tiles"])
def way(request, monkeypatch):
    if request.param != "few rows":
        monkeypatch.setattr(sparse_delta, "FEW", 0)
    if request.param == "tiles":
        monkeypatch.setattr(sparse_delta, "TILE", 4 * SHAPE[1])


@pytest.mark.usefixtures("way", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(5,), (2, 3), (1,), (0,), (2, 0)])
def test_products_and_gradients(size, dtype, device):
    part = delta()[0].to(device)
    x = torch.randn(*size, SHAPE[1], dtype=dtype, device=device, requires_grad=True)
    y = torch.randn(*size, SHAPE[0], dtype=dtype, device=device)
    found = part.after(x, y)
    assert found.dtype == dtype
    wide, values = x.detach().double().requires_grad_(), part.values.detach().double().requires_grad_()
    zeros = torch.zeros(SHAPE[0] * SHAPE[1], dtype=torch.float64, device=device)
    full = zeros.index_put((part.index.long(),), values).view(SHAPE)
    expected = y.double() + wide @ full.T
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(part.values.grad.double(), values.grad, rtol=4 * tolerance, atol=4 * tolerance)
    again = part.after(x.detach(), y)
    assert torch.equal(again, found.detach())


@pytest.mark.usefixtures("way")
def test_rows_that_are_not_contiguous():
    part, dense = delta()
    x = torch.randn(SHAPE[1], 8).T
    torch.testing.assert_close(part.after(x, torch.zeros(8, SHAPE[0])), x @ dense.T)


def test_memory_is_that_of_the_entries():
    part, _ = delta()
    entries = len(part.values)
    assert sum(t.nbytes for t in part.state_dict().values()) == 8 * entries
    assert part.index.dtype == torch.int32


def test_large_weights_are_never_dense(monkeypatch):
    monkeypatch.setattr(sparse_delta, "FEW", 0)
    monkeypatch.setattr(sparse_delta, "TILE", 64)
    part, _ = delta((64, 16), share=1.0)
    sizes = []
    make = sparse_delta._dense
    monkeypatch.setattr(sparse_delta, "_dense", lambda *a: sizes.append(make(*a).numel()) or make(*a))
    part.after(torch.randn(9, 16, requires_grad=True), torch.zeros(9, 64)).sum().backward()
    assert max(sizes) == 64
    assert len(sizes) == 2 * len(part.tiles)


@pytest.mark.parametrize("index", [[3, 2], [1, 1], [-1, 4], [0, 703], []])
def test_positions_that_do_not_fit_are_refused(index):
    with pytest.raises(peft.MethodError, match=r"of a weight \[37, 19\]"):
        SparseDelta(torch.tensor(index, dtype=torch.int64), SHAPE)


def test_compiled_it_is_the_same():
    part, _ = delta()

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.linear = part, nn.Linear(SHAPE[1], SHAPE[0])

        def forward(self, x):
            return self.part.after(x, self.linear(x))

    layer, x = Layer(), torch.randn(4, SHAPE[1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
