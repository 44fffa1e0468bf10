"""Bad arguments are refused with the same words by the compiled operators and the reference."""

import re

import pytest
import torch

from qlora_engine import ops, quantize
from qlora_engine.ops import backend


def weight(**changes):
    w4 = quantize(torch.randn(6, 64), 64)
    names = ("packed", "absmax", "nested_absmax", "nested_offset", "blocksize")
    arguments = dict(zip(names, w4.arguments, strict=True))
    return [{**arguments, **changes}[name] for name in names]


X = torch.randn(3, 64)
S, B = torch.randn(3, 4), torch.randn(6, 4)
BAD_CALLS = {
    "quantize dtype": ("quantize_nf4", [torch.ones(4, dtype=torch.int64), 64], "weight is int64"),
    "quantize blocksize": ("quantize_nf4", [torch.ones(64), 48], "blocksize is 48"),
    "quantize small blocksize": ("quantize_nf4", [torch.ones(64), 16], "blocksize is 16"),
    "quantize layout": ("quantize_nf4", [torch.ones(8, 8).T, 64], "weight is not contiguous"),
    "double dtype": ("quantize_nf4_double", [torch.ones(4, dtype=torch.int8), 64], "weight is int8"),
    "double blocksize": ("quantize_nf4_double", [torch.ones(64), 8192], "blocksize is 8192"),
    "search dtype": ("quantize_nf4_search", [torch.ones(4).double(), 64, False], "weight is float64"),
    "search layout": ("quantize_nf4_search", [torch.ones(8, 8).T, 64, True], "weight is not contiguous"),
    "absmax dtype": ("quantize_absmax", [torch.ones(4).half(), torch.zeros(()), 256], "absmax is float16"),
    "absmax offset": ("quantize_absmax", [torch.ones(4), torch.zeros(2), 256], "offset has 2 elements"),
    "nested size": (
        "dequantize_absmax",
        [torch.zeros(300, dtype=torch.uint8), torch.ones(1), torch.zeros(()), 256],
        "nested_absmax has 1 elements; expected 2",
    ),
    "shape": ("dequantize_nf4", [*weight(), [6, 65], torch.float32], "packed has 192 elements; expected 195"),
    "dtype": ("dequantize_nf4", [*weight(), [6, 64], torch.float64], "dtype is float64"),
    "single scales as codes": (
        "dequantize_nf4",
        [*weight(nested_absmax=None, nested_offset=None), [6, 64], torch.float32],
        "absmax is uint8; expected float32",
    ),
    "half of the nesting": (
        "dequantize_nf4",
        [*weight(nested_offset=None), [6, 64], torch.float32],
        "nested_absmax and nested_offset go together",
    ),
    "packed as float": ("linear_nf4", [X, *weight(packed=torch.ones(192)), 6, None], "packed is float32"),
    "x dtype": ("linear_nf4", [X.double(), *weight(), 6, None], "x is float64"),
    "x width": ("linear_nf4", [X[:, :32].contiguous(), *weight(), 6, None], "packed has 192 elements; expected 96"),
    "bias size": ("linear_nf4", [X, *weight(), 6, torch.ones(5)], "bias has 5 elements; expected 6"),
    "bias dtype": ("linear_nf4", [X, *weight(), 6, torch.ones(6).half()], "bias is float16; expected float32"),
    "scalar x": ("linear_nf4", [torch.ones(()), *weight(), 6, None], "x has no dimensions"),
    "B dimensions": ("linear_nf4_lora", [X, *weight(), 6, S, torch.ones(6), None], "B has 1 dimensions; expected 2"),
    "B size": ("linear_nf4_lora", [X, *weight(), 6, S, torch.ones(5, 4), None], "B has 20 elements; expected 24"),
    "S rows": ("linear_nf4_lora", [X, *weight(), 6, S[:2], B, None], "S is [2, 4]; expected [3, 4]"),
    "S dtype": ("linear_nf4_lora", [X, *weight(), 6, S.half(), B, None], "S is float16; expected float32"),
    "S layout": (
        "linear_nf4_lora",
        [X, *weight(), 6, S.T.contiguous().T, B, None],
        "the rows of S are not contiguous",
    ),
    "A size": (
        "linear_nf4_backward_lora",
        [torch.ones(3, 6), *weight(), 64, S, torch.ones(4, 63), None],
        "A has 252 elements; expected 256",
    ),
    "dS rank": (
        "linear_nf4_backward_lora",
        [torch.ones(3, 6), *weight(), 64, S[:, :2], torch.ones(4, 64), None],
        "dS is [3, 2]; expected [3, 4]",
    ),
    "addend size": (
        "linear_nf4_backward_lora",
        [torch.ones(3, 6), *weight(), 64, S, torch.ones(4, 64), torch.ones(2, 64)],
        "addend has 128 elements; expected 192",
    ),
    "dx size": ("linear_nf4_backward_add", [torch.ones(2, 64), torch.ones(3, 6), *weight()], "dx has 128 elements"),
    "dx dtype": (
        "linear_nf4_backward_add",
        [torch.ones(3, 64).half(), torch.ones(3, 6), *weight()],
        "dx is float16; expected float32",
    ),
    "scalar grad": ("linear_nf4_backward", [torch.ones(()), *weight(), 64], "grad has no dimensions"),
    "grad dtype": ("linear_nf4_backward", [torch.ones(3, 6).int(), *weight(), 64], "grad is int32"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refused_with_the_same_words(case):
    op, arguments, words = BAD_CALLS[case]
    with pytest.raises(RuntimeError, match=re.escape(words)) as by_reference:
        backend.reference_operator(op)(*arguments)
    with pytest.raises(RuntimeError, match=re.escape(words)) as by_operator:
        getattr(torch.ops.qlora_engine, op)(*arguments)
    assert str(by_reference.value) in str(by_operator.value)


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refused_while_tracing(case):
    op, arguments, words = BAD_CALLS[case]
    fake = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=re.escape(words)):
        getattr(torch.ops.qlora_engine, op)(*fake)


def test_python_face_makes_a_weight_contiguous():
    w = torch.randn(64, 32)
    packed, absmax = ops.quantize_nf4(w.T)
    expected_packed, expected_absmax = ops.quantize_nf4(w.T.contiguous())
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)
