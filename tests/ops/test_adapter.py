"""Layers with adapters as one operator: against float64, with poisoned memory, for one to three projections."""

import re

import pytest
import torch
from torch.library import opcheck

from qlora_engine import ops, quantize
from tests.numerics import RELATIVE_RMS, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# out_features and rank of each projection
GROUPS = {"one": [(130, 16)], "gate and up": [(192, 8), (192, 33)], "q, k, v": [(256, 16), (64, 3), (72, 40)]}
SCALINGS = [2.0, 0.75, 0.5]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case:
    """Arguments of the three operators."""

    def __init__(self, device, dtype, M, K, group, adapter_dtype=torch.float32, double_quant=True):
        def random(*shape):
            return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(adapter_dtype)

        sizes = GROUPS[group]
        self.x = torch.randn(M, K, device=device).to(dtype)
        self.w4 = [quantize(torch.randn(N, K) / K**0.5, 64, double_quant).to(device) for N, _ in sizes]
        self.weights = [list(part) for part in zip(*(w.arguments for w in self.w4), strict=True)]
        self.out_features = [N for N, _ in sizes]
        self.lora_A = [random(rank, K) for _, rank in sizes]
        self.lora_B = [random(N, rank) for N, rank in sizes]
        self.scalings = SCALINGS[: len(sizes)]
        self.biases = [torch.randn(sizes[0][0], device=device).to(dtype), None, None][: len(sizes)]
        self.grads = [torch.randn(M, N, device=device).to(dtype) for N, _ in sizes]
        self.S = torch.randn(M, sum(rank for _, rank in sizes), device=device).to(dtype)

    def forward_arguments(self):
        factors = self.biases, self.lora_A, self.lora_B, self.scalings
        return self.x, *self.weights, self.out_features, *factors

    def factors(self):
        """Rounded to the dtype of the products, in float64."""
        return [[f.to(self.x.dtype).double() for f in factors] for factors in (self.lora_A, self.lora_B)]

    def decoded(self):
        return [w.dequantize(self.x.dtype).double() for w in self.w4]

    def parts(self, S):
        return S.split([A.shape[0] for A in self.lora_A], dim=1)


def bound(dtype, device):
    """S is rounded before it goes on, and so is scaling * B; tensor cores cut off what float32 would round."""
    return 2 * RELATIVE_RMS[dtype] if device == "cpu" else max(2 * RELATIVE_RMS[dtype], 2e-5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("M", "K"), [(1, 128), (40, 192), (300, 100), (2500, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(device, dtype, M, K, group, double_quant):
    case = Case(device, dtype, M, K, group, double_quant=double_quant)
    outputs, S = ops.adapter_forward(*case.forward_arguments())
    A, B = case.factors()
    wide = case.x.double()
    assert_close("S", S, wide @ torch.cat(A).T, bound(dtype, device))
    parts = zip(outputs, case.decoded(), case.parts(S), B, case.scalings, case.biases, strict=True)
    for y, weight, part, factor, scaling, bias in parts:
        assert y.dtype == dtype
        expected = wide @ weight.T + scaling * part.double() @ factor.T + (0 if bias is None else bias.double())
        assert_close("y", y, expected, bound(dtype, device))
    again, _ = ops.adapter_forward(*case.forward_arguments())
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("M", "K"), [(1, 128), (40, 192), (300, 128), (2500, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(device, dtype, M, K, group, adapter_dtype):
    case = Case(device, dtype, M, K, group, adapter_dtype or dtype)
    A, B = case.factors()
    grad_S, grads_B = ops.adapter_backward_S(case.grads, case.S, case.lora_B, case.scalings)
    grads = [grad.double() for grad in case.grads]
    rows = zip(grads, case.parts(case.S), case.parts(grad_S), B, case.scalings, grads_B, case.lora_B, strict=True)
    for grad, S, of_S, factor, scaling, grad_B, parameter in rows:
        assert_close("gradient of S", of_S, scaling * grad @ factor, bound(dtype, device))
        assert grad_B.dtype == parameter.dtype
        # a gradient in float32 is not rounded to 16 bits on the way
        assert_close("gradient of B", grad_B, scaling * grad.T @ S.double(), bound(grad_B.dtype, device))
    grad_x = ops.adapter_backward_x(case.grads, grad_S, *case.weights, case.lora_A)
    expected = sum(grad @ weight for grad, weight in zip(grads, case.decoded(), strict=True))
    expected = expected + grad_S.double() @ torch.cat(A)
    assert_close("gradient of x", grad_x, expected, (1 + len(grads)) / 2 * bound(dtype, device))
    assert torch.equal(grad_x, ops.adapter_backward_x(case.grads, grad_S, *case.weights, case.lora_A))


@pytest.mark.parametrize("group", GROUPS)
def test_no_rows(device, group):
    case = Case(device, torch.bfloat16, 0, 64, group)
    outputs, S = ops.adapter_forward(*case.forward_arguments())
    assert [y.shape for y in outputs] == [(0, N) for N in case.out_features]
    assert not S.numel()
    grad_S, grads_B = ops.adapter_backward_S(case.grads, S, case.lora_B, case.scalings)
    assert all(not grad.any() for grad in grads_B)
    assert ops.adapter_backward_x(case.grads, grad_S, *case.weights, case.lora_A).shape == (0, 64)


def test_opcheck(device):
    case = Case(device, torch.float32, 9, 64, "gate and up")
    operators = torch.ops.qlora_engine
    opcheck(operators.adapter_forward.default, case.forward_arguments())
    opcheck(operators.adapter_backward_S.default, (case.grads, case.S, case.lora_B, case.scalings))
    opcheck(operators.adapter_backward_x.default, (case.grads, case.S, *case.weights, case.lora_A))


def test_refused(device):
    case = Case(device, torch.float32, 5, 64, "gate and up")
    x, *rest = case.forward_arguments()
    with pytest.raises(RuntimeError, match="adapter_forward: the lists have different lengths; expected one to 3"):
        ops.adapter_forward(x, *rest[:-1], case.scalings[:1])
    with pytest.raises(RuntimeError, match="adapter_forward: x has 3 dimensions"):
        ops.adapter_forward(x[None], *rest)
    with pytest.raises(RuntimeError, match="adapter_forward: lora_A is float16; expected float32"):
        ops.adapter_forward(x, *rest[:-3], [A.half() for A in case.lora_A], *rest[-2:])
    with pytest.raises(RuntimeError, match=re.escape("adapter_backward_S: S has another shape; expected [5, 41]")):
        ops.adapter_backward_S(case.grads, case.S[:, 1:].contiguous(), case.lora_B, case.scalings)
    with pytest.raises(RuntimeError, match="adapter_backward_x: a gradient is not contiguous"):
        grads = [grad.T.contiguous().T for grad in case.grads]
        ops.adapter_backward_x(grads, case.S, *case.weights, case.lora_A)
