"""Every operator as PyTorch's dispatcher, tracer and compiler see it."""

import pytest
import torch
from torch.library import opcheck

from qlora_engine import ops, quantize
from qlora_engine.ops import backend
from qlora_engine.ops.schema import SCHEMAS


def sample(op, device, double_quant=True):
    """Arguments of one operator; K is not a multiple of the block, and counts are odd."""

    def matrix(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    w4 = quantize(torch.randn(7, 45), 32, double_quant).to(device)
    x = torch.randn(3, 5, 45, device=device, requires_grad=True)
    grad = torch.randn(3, 5, 7, device=device, requires_grad=True)
    bias = torch.randn(7, device=device, requires_grad=True)
    S = torch.randn(15, 6, device=device)[:, 1:5].requires_grad_()
    scales = torch.rand(300, device=device)
    codes, nested, offset = ops.quantize_absmax(scales)
    return {
        "quantize_nf4": (torch.randn(7, 45, device=device), 32),
        "quantize_nf4_double": (torch.randn(7, 45, device=device), 32),
        "quantize_nf4_search": (torch.randn(7, 45, device=device), 32, True),
        "dequantize_nf4": (*w4.arguments, [7, 45], torch.bfloat16),
        "quantize_absmax": (scales, scales.mean(), 256),
        "dequantize_absmax": (codes, nested, offset, 256),
        "linear_nf4": (x, *w4.arguments, 7, bias),
        "linear_nf4_lora": (x, *w4.arguments, 7, S, matrix(7, 4), bias),
        "linear_nf4_backward": (grad, *w4.arguments, 45),
        "linear_nf4_backward_lora": (grad, *w4.arguments, 45, S, matrix(4, 45), matrix(3, 5, 45)),
        "linear_nf4_backward_add": (torch.randn(3, 5, 45, device=device), grad.detach(), *w4.arguments),
    }[op]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op, device, double_quant):
    opcheck(getattr(torch.ops.qlora_engine, op).default, sample(op, device, double_quant))


@pytest.mark.parametrize("op", SCHEMAS)
def test_compiles_without_a_graph_break(op, device):
    torch.compiler.reset()  # the limit of recompilations counts those of other tests, whose lambda this is too
    function = getattr(torch.ops.qlora_engine, op)
    arguments = sample(op, device)
    others = [arguments[0].detach().clone(), *arguments[1:]]
    compiled = torch.compile(lambda *a: function(*a), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*arguments), function(*others)
    if expected is None:  # it changes its first argument
        actual, expected = arguments[0], others[0]
    for a, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert torch.equal(a, e)


def test_every_schema_has_an_implementation(device):
    for op in SCHEMAS:
        assert backend.implementation(op, device) in ("compiled", "reference")


@pytest.mark.filterwarnings("ignore:.*is not a double precision.*")
def test_gradients_by_finite_differences(device):
    """First and second derivative; float32 products, so coarse steps on a function that is linear in each input."""
    w4 = quantize(torch.randn(6, 64), 64).to(device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, requires_grad=True)

    def product(x, bias):
        return ops.linear_nf4(x, *w4.arguments, 6, bias)

    assert torch.autograd.gradcheck(product, (x, bias), eps=0.1, atol=1e-3, rtol=1e-3)
    assert torch.autograd.gradgradcheck(product, (x, bias), eps=0.1, atol=1e-3, rtol=1e-3)

    def with_adapter(x, S, B, bias):
        return ops.linear_nf4_lora(x, *w4.arguments, 6, S, B, bias)

    def backward_with_adapter(grad, dS, A, addend):
        return ops.linear_nf4_backward_lora(grad, *w4.arguments, 64, dS, A, addend)

    S, B, A, grad = (torch.randn(*s, device=device, requires_grad=True) for s in ((4, 2), (6, 2), (2, 64), (4, 6)))
    assert torch.autograd.gradcheck(with_adapter, (x, S, B, bias), eps=0.1, atol=1e-3, rtol=1e-3)
    assert torch.autograd.gradgradcheck(with_adapter, (x, S, B, bias), eps=0.1, atol=1e-3, rtol=1e-3)
    assert torch.autograd.gradcheck(backward_with_adapter, (grad, S, A, x), eps=0.1, atol=1e-3, rtol=1e-3)
