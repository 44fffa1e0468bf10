"""The adapter's narrow products against float64, with the same mask, and dropout's bits."""

import re

import pytest
import torch
from torch.library import opcheck

from qlora_engine import kernels, ops
from qlora_engine.ops import backend
from qlora_engine.reference import lora as reference
from qlora_engine.reference.dropout import dropout_keep, keep_scale, threshold
from tests.numerics import RELATIVE_RMS, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, K, rank: tails everywhere; one row; several parts; ranks from 1 to above every tile
SHAPES = [(37, 72, 4), (1, 130, 16), (300, 257, 33), (2100, 264, 16), (70, 520, 256), (129, 64, 300), (64, 1, 1)]
P = 0.3

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(
    params=["cpu", *(pytest.param(f"cuda {choice}", marks=pytest.mark.gpu) for choice in ("triton", "blas"))]
)
def device(request, monkeypatch) -> str:
    """Here a GPU is tested twice: with kernels wherever there are any, and with cuBLAS wherever it can serve."""
    device, _, choice = request.param.partition(" ")
    if choice:
        monkeypatch.setattr(kernels, "adapter_choice", choice)
    return device


def allowed(dtype, device):
    """Relative RMS of a result of that dtype; tensor cores cut off what float32 would round in a long sum."""
    return RELATIVE_RMS[dtype] if device == "cpu" else max(RELATIVE_RMS[dtype], 1e-5)


def matrix(device, dtype, *shape):
    return torch.randn(shape, device=device).to(dtype)


def seed_on(device):
    return torch.tensor([0x1234567890ABCDEF], device=device)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_down(device, dtype, shape, dropout_p):
    M, K, rank = shape
    x, seed = matrix(device, dtype, M, K), seed_on(device)
    stack = [matrix(device, torch.float32, rank, K), matrix(device, dtype, rank, K)]
    actual = ops.lora_down(x, stack, 0.5, dropout_p, seed)
    rounded = [A.to(dtype).double() for A in stack]
    expected = reference.lora_down(x.double(), rounded, 0.5, dropout_p, seed)
    assert actual.dtype == dtype
    assert_close("S", actual, expected, allowed(dtype, device))
    assert torch.equal(actual, ops.lora_down(x, stack, 0.5, dropout_p, seed))


@pytest.mark.parametrize("addends", [0, 1, 2])
@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add(device, dtype, shape, dropout_p, addends):
    M, N, rank = shape
    y, S, seed = matrix(device, dtype, M, N), matrix(device, dtype, M, rank + 8)[:, 3 : 3 + rank], seed_on(device)
    more = [matrix(device, dtype, M, N) for _ in range(addends)]
    for lora_B in (matrix(device, torch.float32, N, rank), matrix(device, dtype, rank, N).T):
        actual, expected = y.clone(), y.double()
        ops.lora_add(actual, S, lora_B, 2.0, more, dropout_p, seed)
        rounded = lora_B.to(dtype).double()
        reference.lora_add(expected, S.double(), rounded, 2.0, [a.double() for a in more], dropout_p, seed)
        # the reference rounds once an addend
        assert_close("y", actual, expected, 2 * allowed(dtype, device))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_grad_B(device, dtype, adapter_dtype, shape):
    M, N, rank = shape
    grad, S = matrix(device, dtype, M, N), matrix(device, dtype, M, rank + 1)[:, 1:]
    lora_B = matrix(device, adapter_dtype or dtype, N, rank)
    whole = torch.full((M, rank + 2), float("nan"), device=device, dtype=dtype)
    actual = ops.lora_grad_B(grad, S, lora_B, 0.25, whole[:, 2:])
    wide_S = torch.empty(M, rank, device=device, dtype=torch.float64)
    rounded = lora_B.to(dtype).double()
    expected = reference.lora_grad_B(grad.double(), S.double(), rounded, 0.25, wide_S)
    assert actual.dtype == lora_B.dtype
    # a gradient in float32 is not rounded to 16 bits on the way
    assert_close("dB", actual, expected, allowed(lora_B.dtype, device))
    assert_close("dS", whole[:, 2:], wide_S, allowed(dtype, device))
    assert whole[:, :2].isnan().all()
    assert torch.equal(actual, ops.lora_grad_B(grad, S, lora_B, 0.25, whole[:, 2:]))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_A(device, dtype, shape, dropout_p):
    M, K, rank = shape
    x, grad_S, seed = matrix(device, dtype, M, K), matrix(device, dtype, M, rank), seed_on(device)
    expected = reference.lora_grad_A(grad_S.double(), x.double(), dropout_p, seed, torch.float64)
    for out_dtype in {torch.float32, dtype}:
        actual = ops.lora_grad_A(grad_S, x, dropout_p, seed, out_dtype)
        assert actual.dtype == out_dtype
        # the reference on a CPU scales the kept elements in the dtype of x
        rounded_to = dtype if device == "cpu" and dropout_p else out_dtype
        assert_close("dA", actual, expected, allowed(rounded_to, device))
        assert torch.equal(actual, ops.lora_grad_A(grad_S, x, dropout_p, seed, out_dtype))


@pytest.mark.parametrize(("M", "K"), [(0, 64), (5, 64)])
def test_no_rows(device, M, K):
    x, S = torch.randn(M, K, device=device), torch.randn(M, 4, device=device)
    A = torch.randn(4, K, device=device)
    assert ops.lora_down(x, [A]).shape == (M, 4)
    grad_S = torch.empty(M, 4, device=device)
    assert ops.lora_grad_B(x, S, A.T.contiguous(), 1.0, grad_S).isfinite().all()
    assert ops.lora_grad_A(S, x).isfinite().all()
    ops.lora_add(x, S, A.T.contiguous())


def test_dropout_keeps_as_many_as_it_says_and_independently():
    keep = dropout_keep(torch.tensor([7]), 2000, 1001, 0.3).double()
    p = threshold(0.3) / 65536
    assert abs(float(keep.mean()) - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    assert keep_scale(0.3) == pytest.approx(1 / (1 - p))
    centred = keep - (1 - p)
    for shift in ((0, 1), (1, 0), (0, 4), (0, 8), (1, 1)):  # neighbours: words, halves, counters, rows
        correlation = float((centred * centred.roll(shift, (0, 1))).mean()) / (p * (1 - p))
        assert abs(correlation) < 4 / keep.numel() ** 0.5, shift
    other = dropout_keep(torch.tensor([8]), 2000, 1001, 0.3).double() - (1 - p)
    assert abs(float((centred * other).mean())) / (p * (1 - p)) < 4 / keep.numel() ** 0.5


def test_philox_is_philox():
    """Ten rounds would give the known answers of Salmon et al.; seven are the first seven of those."""
    from qlora_engine.reference import dropout

    zero = torch.zeros((), dtype=torch.int64)
    rounds = dropout.ROUNDS
    try:
        dropout.ROUNDS = 10
        words = [int(word) for word in dropout.philox(zero, zero, zero)]
    finally:
        dropout.ROUNDS = rounds
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.gpu
@pytest.mark.skipif(backend.implementation("lora_down", "cuda") != "triton", reason="no Triton")
@pytest.mark.parametrize("dropout_p", [0.001, 0.5, 0.99])
def test_gpu_and_cpu_draw_the_same_mask(dropout_p):
    M, K = 83, 200
    seed = torch.tensor([-(2**61) + 12345])
    x, ones = torch.eye(K).repeat(M, 1), torch.ones(1, K)
    S = ops.lora_down(x.cuda(), [ones.cuda()], 1.0, dropout_p, seed.cuda())
    keep = dropout_keep(seed, M * K, K, dropout_p)
    expected = (x * keep).sum(1, keepdim=True) * keep_scale(dropout_p)
    torch.testing.assert_close(S.cpu(), expected)


@pytest.mark.gpu
def test_rows_beyond_2_to_the_31_elements():
    rank, K = 16, 4096
    M = 2**31 // K + 70
    x = torch.zeros(M, K, device="cuda", dtype=torch.bfloat16)
    x[-70:] = torch.randn(70, K, device="cuda")
    A, S = torch.randn(rank, K, device="cuda"), torch.zeros(M, rank, device="cuda", dtype=torch.bfloat16)
    S[-70:] = torch.randn(70, rank, device="cuda")
    tail, tail_S = x[-70:].double(), S[-70:].double()
    assert_close("S", ops.lora_down(x, [A])[-70:], tail @ A.bfloat16().double().T, 6e-3)
    assert_close("dA", ops.lora_grad_A(S, x), tail_S.T @ tail, 1e-4)
    grad_S = torch.empty_like(S)
    assert_close("dB", ops.lora_grad_B(x, S, A.T, 1.0, grad_S), tail.T @ tail_S, 1e-4)
    assert_close("dS", grad_S[-70:], tail @ A.bfloat16().double().T, 6e-3)
    ops.lora_add(x, S, A.T)
    assert_close("y", x[-70:], tail + tail_S @ A.bfloat16().double(), 6e-3)


def sample(op, device):
    x, S, A = torch.randn(6, 24, device=device), torch.randn(6, 4, device=device), torch.randn(4, 24, device=device)
    B, seed = torch.randn(24, 4, device=device), seed_on(device)
    return {
        "lora_down": (x, [A, A], 0.5, 0.1, seed),
        "lora_add": (x, S, B, 0.5, [x.clone()], 0.1, seed),
        "lora_grad_B": (x, S, B, 0.5, torch.empty_like(S)),
        "lora_grad_A": (S, x, 0.1, seed, torch.float32),
    }[op]


@pytest.mark.parametrize("op", ["lora_down", "lora_add", "lora_grad_B", "lora_grad_A"])
def test_opcheck(op, device):
    opcheck(getattr(torch.ops.qlora_engine, op).default, sample(op, device))


X, A, S = torch.randn(3, 8), torch.randn(2, 8), torch.randn(3, 2)
BAD_CALLS = {
    "no adapter": ("lora_down", (X, [], 1.0, 0.0, None), "lora_A is empty"),
    "width": ("lora_down", (X, [A[:, :4]], 1.0, 0.0, None), "lora_A is [2, 4]; expected [any, 8]"),
    "layout": ("lora_down", (X.T.contiguous().T, [A], 1.0, 0.0, None), "x is not contiguous"),
    "no seed": ("lora_down", (X, [A], 1.0, 0.5, None), "there is no seed"),
    "probability": ("lora_down", (X, [A], 1.0, 1.0, None), "dropout_p is 1.0"),
    "seed dtype": ("lora_down", (X, [A], 1.0, 0.5, torch.ones(1)), "seed is float32; expected int64"),
    "rows": ("lora_add", (X, S[:2], A.T, 1.0, [], 0.0, None), "S is [2, 2]; expected [3, any]"),
    "addends": ("lora_add", (X, S, A.T, 1.0, [X] * 3, 0.0, None), "there are 3 addends"),
    "rank": ("lora_add", (X, S, A[:1].T, 1.0, [], 0.0, None), "lora_B is [8, 1]; expected [8, 2]"),
    "S dtype": ("lora_grad_B", (X, S.half(), A.T, 1.0, S.half()), "S is float16; expected float32"),
    "strided S": ("lora_grad_A", (S.T.contiguous().T, X, 0.0, None, torch.float32), "rows of grad_S are not contig"),
    "out dtype": ("lora_grad_A", (S, X, 0.0, None, torch.float64), "dtype is float64"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refused(case):
    op, arguments, words = BAD_CALLS[case]
    with pytest.raises(RuntimeError, match=re.escape(words)):
        getattr(torch.ops.qlora_engine, op)(*arguments)
