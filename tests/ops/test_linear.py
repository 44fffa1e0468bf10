"""`linear_nf4` and `linear_nf4_backward` against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_engine import ops, quantize
from tests.numerics import RELATIVE_RMS, assert_close, size_of_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(M, N, K, dtype, device, blocksize=64, double_quant=True):
    w4 = quantize(torch.randn(N, K, dtype=dtype), blocksize, double_quant).to(device)
    x = torch.randn(M, K, device=device, dtype=dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    grad = torch.randn(M, N, device=device, dtype=dtype)
    return w4, x, bias, grad


def check(w4, x, bias, grad):
    """Output and gradients against float64 on the decoded weight."""
    (N, K), dtype = w4.shape, x.dtype
    weight = w4.dequantize(dtype).double()
    y = ops.linear_nf4(x, *w4.arguments, N, bias)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    bias_size = 0 if bias is None else bias.double().abs()
    assert_close("y", y, expected, RELATIVE_RMS[dtype], size_of_sums(x, weight.T) + bias_size)
    dx = ops.linear_nf4_backward(grad, *w4.arguments, K)
    assert dx.dtype == dtype
    assert_close("dx", dx, grad.double() @ weight, RELATIVE_RMS[dtype], size_of_sums(grad, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 1, 1),
        (1, 64, 64),
        (1, 100, 576),
        (2, 33, 65),
        (7, 192, 576),
        (16, 576, 1536),
        (33, 129, 127),
        (65, 40, 1000),
        (130, 96, 512),
        (300, 65, 321),
    ],
)
def test_against_float64(device, dtype, M, N, K, poisoned_memory):
    check(*problem(M, N, K, dtype, device))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes(device, dtype, blocksize, double_quant):
    check(*problem(5, 48, 1024, dtype, device, blocksize, double_quant))
    check(*problem(40, 30, 160, dtype, device, blocksize, double_quant))  # blocks cross rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    M=st.integers(1, 140),
    N=st.integers(1, 140),
    K=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from([32, 64, 256]),
)
def test_any_shape(device, M, N, K, dtype, blocksize):
    w4, x, bias, grad = problem(M, N, K, dtype, device, blocksize)
    check(w4, x, bias if M % 2 else None, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dimensions_of_x(device, dtype):
    w4, x, bias, grad = problem(24, 48, 96, dtype, device)
    bound = RELATIVE_RMS[dtype]

    def product(x):
        return ops.linear_nf4(x, *w4.arguments, 48, bias)

    y = product(x)
    assert_close("batches", product(x.reshape(2, 3, 4, 96)), y.reshape(2, 3, 4, 48), bound)
    assert_close("row", product(x[0]), y[0], bound)
    transposed = x.T.contiguous().T
    assert not transposed.is_contiguous()
    assert_close("transposed", product(transposed), y, bound)
    assert_close("expanded", product(x[:1].expand(5, 96)), y[:1].expand(5, 48), bound)
    assert_close("every second row", product(x[::2]), y[::2], bound)
    dx = ops.linear_nf4_backward(grad, *w4.arguments, 96)
    dx_of_transposed = ops.linear_nf4_backward(grad.T.contiguous().T, *w4.arguments, 96)
    assert_close("dx of a transposed gradient", dx_of_transposed, dx, bound)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_empty_batch(device, shape):
    w4, _, bias, _ = problem(1, 32, 64, torch.float32, device)
    x = torch.empty(shape, device=device, requires_grad=True)
    y = ops.linear_nf4(x, *w4.arguments, 32, bias)
    assert y.shape == (*shape[:-1], 32)
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize(("M", "N", "K"), [(3, 0, 64), (3, 32, 0), (40, 32, 0), (40, 0, 64)])
def test_empty_weight(device, M, N, K):
    """No outputs, or sums of nothing."""
    w4 = quantize(torch.empty(N, K)).to(device)
    x, grad, bias = (torch.randn(shape, device=device) for shape in ((M, K), (M, N), (N,)))
    assert torch.equal(ops.linear_nf4(x, *w4.arguments, N, bias), bias.expand(M, N))
    assert torch.equal(ops.linear_nf4_backward(grad, *w4.arguments, K), torch.zeros(M, K, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K", "rank"), [(1, 40, 64, 8), (70, 33, 130, 5), (9, 64, 256, 16)])
def test_adapter(device, dtype, M, N, K, rank, poisoned_memory):
    """Both directions, with and without what is added besides; S and dS as columns of wider matrices."""
    w4, x, bias, grad = problem(M, N, K, dtype, device)
    decoded = w4.dequantize(dtype).double()
    S = torch.randn(M, rank + 8, device=device, dtype=dtype)[:, 3 : 3 + rank]
    B, A = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((N, rank), (rank, K)))
    bound = 2 * RELATIVE_RMS[dtype]  # two roundings
    expected = x.double() @ decoded.T + S.double() @ B.double().T
    assert_close("y", ops.linear_nf4_lora(x, *w4.arguments, N, S, B), expected, bound)
    y = ops.linear_nf4_lora(x, *w4.arguments, N, S, B, bias)
    assert_close("y with bias", y, expected + bias.double(), bound)
    expected = grad.double() @ decoded + S.double() @ A.double()
    assert_close("dx", ops.linear_nf4_backward_lora(grad, *w4.arguments, K, S, A), expected, bound)
    addend = torch.randn(M, K, device=device, dtype=dtype)
    kept = addend.clone()
    dx = ops.linear_nf4_backward_lora(grad, *w4.arguments, K, S, A, addend)
    assert_close("dx with addend", dx, expected + kept.double(), bound)
    assert torch.equal(addend, kept)
    ops.linear_nf4_backward_add(addend, grad, *w4.arguments)
    assert_close("dx in place", addend, kept.double() + grad.double() @ decoded, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable(device, dtype):
    w4, x, bias, grad = problem(130, 96, 512, dtype, device)
    assert torch.equal(ops.linear_nf4(x, *w4.arguments, 96, bias), ops.linear_nf4(x, *w4.arguments, 96, bias))
    first, second = (ops.linear_nf4_backward(grad, *w4.arguments, 512) for _ in range(2))
    assert torch.equal(first, second)


def test_a_block_of_zeros_gives_zeros(device):
    weight = torch.zeros(8, 64)
    weight[3] = torch.randn(64)
    w4 = quantize(weight, 64, double_quant=False).to(device)
    y = ops.linear_nf4(torch.randn(5, 64, device=device), *w4.arguments, 8, None)
    assert (y[:, [0, 1, 2, 4, 5, 6, 7]] == 0).all()
    assert (y[:, 3] != 0).all()
