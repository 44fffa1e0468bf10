"""`functional.nf4_linear` and `functional.qlora_linear` against float64, output and every gradient."""

import pytest
import torch

import qlora_engine as qe
from qlora_engine.functional import nf4_linear, qlora_linear
from tests.numerics import RELATIVE_RMS, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(device, dtype, adapter_dtype=torch.float32, M=13, N=40, K=96, r=4):
    w4 = qe.quantize(torch.randn(N, K)).to(device)

    def leaf(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    return w4, leaf(M, K), leaf(r, K, dtype=adapter_dtype, scale=0.1), leaf(N, r, dtype=adapter_dtype), leaf(N)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_against_float64(device, dtype, adapter_dtype):
    w4, x, A, B, bias = problem(device, dtype, adapter_dtype or dtype)
    y = qlora_linear(x, w4, A, B, 0.5, bias)
    grad = torch.randn_like(y)
    y.backward(grad)

    X, A64, B64, bias64 = (t.detach().double().requires_grad_() for t in (x, A, B, bias))
    expected = X @ w4.dequantize(dtype).double().T + bias64 + 0.5 * (X @ A64.T) @ B64.T
    expected.backward(grad.double())
    bound = 3 * RELATIVE_RMS[dtype]  # three products, one after another
    assert y.dtype == dtype
    assert_close("y", y, expected, bound)
    for name, ours, theirs in (("x", x, X), ("A", A, A64), ("B", B, B64), ("bias", bias, bias64)):
        assert ours.grad.dtype == ours.dtype
        assert_close(f"gradient of {name}", ours.grad, theirs.grad, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_adapters_are_not_rounded_to_16_bits(device, dtype):
    w4, x, A, B, _ = problem(device, dtype, M=500)
    y = qlora_linear(x, w4, A, B, 1.0)
    y.backward(torch.randn_like(y))
    for parameter in (A, B):
        assert (parameter.grad != parameter.grad.to(dtype).float()).float().mean() > 0.5


def test_saves_the_input_and_the_narrow_product_only(device):
    """Nothing of the weight's size is kept for backward but the packed weight itself; no copy of x."""
    w4, x, A, B, bias = problem(device, torch.float32, M=64, N=512, K=256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qlora_linear(x, w4, A, B, 1.0, bias)
    known = {t.data_ptr() for t in (x, A, B, *w4.arguments[:4])}
    new = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(64, 4)]

    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4_linear(x, w4, bias)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in w4.arguments[:4]}


def test_dropout_drops_the_adapters_input_only(device):
    """With A and B the identity the adapter's part is the dropped input itself; the mask is read off it."""
    K, p = 96, 0.25
    w4 = qe.quantize(torch.randn(K, K)).to(device)
    x = torch.randn(500, K, device=device, requires_grad=True)
    A, B = (torch.eye(K, device=device).requires_grad_() for _ in range(2))
    y = qlora_linear(x, w4, A, B, 1.0, dropout_p=p)
    grad = torch.randn_like(y)
    y.backward(grad)
    weight = w4.dequantize(torch.float32)
    dropped = (y - x @ weight.T).detach()
    mask = (dropped.abs() > 0.5 * x.abs()).float() / (1 - p)
    torch.testing.assert_close(dropped, (x * mask).detach(), rtol=1e-3, atol=1e-4)
    assert float((mask == 0).float().mean()) == pytest.approx(p, abs=0.01)
    # backward drew the same mask
    torch.testing.assert_close(x.grad, grad @ weight + grad * mask, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(A.grad, (grad.T @ (x * mask)).detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(B.grad, (grad.T @ (x * mask)).detach(), rtol=1e-3, atol=1e-2)


def test_dropout_is_the_same_when_a_checkpoint_recomputes(device):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        w4, x, A, B, _ = problem(device, torch.float32)

        def layer(x, w4=w4, A=A, B=B):
            return qlora_linear(x, w4, A, B, 1.0, dropout_p=0.5).square()

        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.sum().backward()
        gradients.append((x.grad, A.grad, B.grad))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(device, autocast_dtype):
    w4, x, A, B, bias = problem(device, torch.float32)
    with torch.autocast(device, autocast_dtype):
        assert nf4_linear(x, w4, bias).dtype == autocast_dtype
        y = qlora_linear(x, w4, A, B, 1.0, bias)
    assert y.dtype == autocast_dtype
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, A, B, bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_without_a_graph_break(device, dropout_p):
    w4, x, A, B, bias = problem(device, torch.float32)

    def layer(x, A, B, bias):
        return qlora_linear(x, w4, A, B, 0.5, bias, dropout_p)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x, A, B, bias)
    y.sum().backward()
    compiled_grads = [t.grad.clone() for t in (x, A, B, bias)]
    if dropout_p == 0:
        for t in (x, A, B, bias):
            t.grad = None
        expected = layer(x, A, B, bias)
        torch.testing.assert_close(y, expected)
        expected.sum().backward()
        for t, grad in zip((x, A, B, bias), compiled_grads, strict=True):
            torch.testing.assert_close(grad, t.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_forward_and_backward_draw_one_mask(device, backend):
    """Also where the partitioner is free to compute what forward computed again in backward."""
    torch.compiler.reset()
    w4 = qe.quantize(torch.eye(96) * 1e-3).to(device)
    weight = w4.dequantize(torch.float32)
    x = torch.randn(50, 96, device=device, requires_grad=True)
    A, B = (torch.eye(96, device=device).requires_grad_() for _ in range(2))

    def layer(x, A, B):
        return qlora_linear(x, w4, A, B, 1.0, dropout_p=0.25)

    compiled, masks = torch.compile(layer, fullgraph=True, backend=backend), []
    for _ in range(2):
        x.grad = None
        y = compiled(x, A, B)
        y.sum().backward()
        masks.append((y - x @ weight.T).detach().abs() > 0.5 * x.detach().abs())
        assert torch.equal(masks[-1], x.grad - weight.sum(0) > 0.5)
    assert not torch.equal(*masks)


def test_errors_name_the_shapes(device):
    w4, x, A, B, _ = problem(device, torch.float32)
    with pytest.raises(ValueError, match="last dimension must be the weight's in_features, 96"):
        nf4_linear(x[:, :64], w4)
    with pytest.raises(ValueError, match=r"they must be \[r, 96\] and \[40, r\]"):
        qlora_linear(x, w4, A, B[:, :2], 1.0)
    with pytest.raises(ValueError, match=r"dropout_p is 1\.0"):
        qlora_linear(x, w4, A, B, 1.0, dropout_p=1.0)
    with pytest.raises(ValueError, match="expected a matrix"):
        nf4_linear(x, qe.quantize(torch.randn(2, 3, 96)))


def test_only_what_needs_a_gradient_is_computed(device):
    w4, x, A, B, _ = problem(device, torch.float32)
    frozen_x = x.detach()
    qlora_linear(frozen_x, w4, A, B.detach(), 1.0).sum().backward()
    assert A.grad is not None
    assert B.grad is None
    assert frozen_x.grad is None
