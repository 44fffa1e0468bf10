"""`gated_activation` and its backward against float64 autograd."""

import pytest
import torch
from torch.library import opcheck

from qlora_engine import ops
from qlora_engine.ops.gated import ACTIVATIONS
from tests.numerics import RELATIVE_RMS, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(3, 4099), (1, 1), (5, 16, 128), (0, 8)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(device, dtype, activation, shape):
    grad, gate, up = ((torch.randn(shape, device=device) * 3).to(dtype) for _ in range(3))
    wide_gate, wide_up = (t.double().requires_grad_() for t in (gate, up))
    expected = PLAIN[activation](wide_gate) * wide_up
    expected.backward(grad.double())
    assert_close("h", ops.gated_activation(gate, up, activation), expected, RELATIVE_RMS[dtype])
    wanted = expected, wide_gate.grad, wide_up.grad
    results = ops.gated_activation_backward(grad, gate, up, activation)
    for name, actual, want in zip(("h", "dgate", "dup"), results, wanted, strict=True):
        assert actual.dtype == dtype
        assert_close(name, actual, want, RELATIVE_RMS[dtype])
    addresses = [t.data_ptr() for t in (grad, gate, up)]
    in_place = ops.gated_activation_backward(grad, gate, up, activation, inplace=True)
    assert [t.data_ptr() for t in in_place] == addresses
    for ours, theirs in zip(in_place, results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("columns", [24, 2060])
def test_halves_of_one_matrix(device, columns):
    """Gate and up beside each other, as one product gives them; in place, only their columns are written."""
    whole = torch.randn(7, 2 * columns + 8, device=device)
    gate, up = whole[:, :columns], whole[:, columns : 2 * columns]
    grad, rest = torch.randn(7, columns, device=device), whole[:, 2 * columns :].clone()
    expected = ops.gated_activation_backward(grad, gate.contiguous(), up.contiguous(), "silu")
    h = ops.gated_activation(gate, up, "silu")
    assert h.is_contiguous()
    torch.testing.assert_close(h, expected[0])
    for inplace in (False, True):
        for ours, theirs in zip(
            ops.gated_activation_backward(grad, gate, up, "silu", inplace), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert torch.equal(whole[:, 2 * columns :], rest)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(device, activation):
    """No overflow where the exponentials do."""
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device)
    ones = torch.ones_like(gate)
    torch.testing.assert_close(ops.gated_activation(gate, ones, activation), gate.clamp(min=0))
    _, slope, _ = ops.gated_activation_backward(ones, gate, ones, activation)
    torch.testing.assert_close(slope.cpu(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["", "_backward", "_backward_inplace"])
def test_opcheck(suffix, device):
    tensors = [torch.randn(4, 6, device=device) for _ in range(3 if suffix else 2)]
    opcheck(getattr(torch.ops.qlora_engine, f"gated_activation{suffix}").default, (*tensors, "gelu"))


def test_refused():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="'relu'; expected one of silu, gelu, gelu_tanh"):
        ops.gated_activation(x, x, "relu")
    with pytest.raises(RuntimeError, match=r"up is float32 \[3, 2\]; expected float32 \[2, 3\]"):
        ops.gated_activation(x, x.reshape(3, 2), "silu")
    with pytest.raises(RuntimeError, match="the rows of gate are not contiguous"):
        ops.gated_activation(x.T, x.T, "silu")
    with pytest.raises(RuntimeError, match="up has other strides than gate"):
        ops.gated_activation(torch.randn(2, 6)[:, :3], x, "silu")
