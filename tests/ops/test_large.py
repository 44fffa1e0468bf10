"""Weights of more than 2**31 elements: no index is kept in 32 bits."""

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops import backend
from tests.numerics import assert_close

ROWS, COLUMNS = 32_769, 65_536 + 64  # 2**31 + 2**17 elements or so; the last rows lie beyond 2**31


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def large(request):
    """A bfloat16 weight of zeros but for its first and last rows, and what it becomes."""
    device = request.param
    if backend.implementation("quantize_nf4", device) == "reference":
        pytest.skip("the reference makes temporaries of many times the weight's size")
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16, device=device)
    assert weight.numel() > 2**31
    torch.manual_seed(0)
    for rows in (slice(0, 2), slice(-3, None)):
        weight[rows] = torch.randn(weight[rows].shape).to(device, torch.bfloat16)
    w4 = quantize(weight, 64)
    return w4, weight[-3:].clone()


def last_rows(w4, rows):
    """The last rows of a weight as a weight of its own."""
    start = (ROWS - rows) * COLUMNS
    absmax = ops.dequantize_absmax(*w4.arguments[1:4])
    packed = w4.packed[start // 2 :].clone()
    return ops.dequantize_nf4(packed, absmax[start // 64 :].clone(), None, None, 64, [rows, COLUMNS], torch.bfloat16)


@pytest.mark.slow
def test_quantize_and_dequantize(large):
    w4, expected = large
    decoded = w4.dequantize()
    assert torch.equal(decoded[-3:], last_rows(w4, 3))
    assert_close("last rows", decoded[-3:], expected, 0.12)
    assert not decoded[2:-3].any() or decoded[2:-3].abs().max() < 1e-2  # zeros, up to the error of 8-bit scales
    del decoded


@pytest.mark.slow
def test_products(large):
    w4, _ = large
    weight = last_rows(w4, 2).double()
    x = torch.randn(1, COLUMNS, device=w4.device).bfloat16()
    y = ops.linear_nf4(x, *w4.arguments, ROWS, None)
    assert_close("last outputs", y[:, -2:], x.double() @ weight.T, 6e-3)
    grad = torch.zeros(1, ROWS, device=w4.device, dtype=torch.bfloat16)
    grad[:, -2:] = torch.randn(1, 2).to(grad)
    dx = ops.linear_nf4_backward(grad, *w4.arguments, COLUMNS)
    assert_close("gradient through the last rows", dx, grad[:, -2:].double() @ weight, 6e-3)
