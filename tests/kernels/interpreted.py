"""Run by test_interpreter.py in a process of its own: every kernel in Triton's interpreter against its reference.

The interpreter knows no bfloat16 products, so everything is float32. Prints one line a failure; exits 1 for any.
"""

import itertools
import sys

import torch
from triton.runtime import interpreter

from qlora_engine import kernels
from qlora_engine.kernels.cross_entropy import cross_entropy_
from qlora_engine.reference import gated as gated_reference
from qlora_engine.reference import lora as lora_reference
from tests.numerics import relative_rms

# M, widths and ranks: tails in every direction, one row, a rank above a tile, several parts of every reduction
SHAPES = [(37, 72, 4), (1, 130, 16), (70, 65, 33), (130, 64, 1)]
failures = []


def accept_one_element_arrays():
    """Lets Triton 3.6 count a loop whose bounds are not constants under NumPy 2.5.

    It takes `int` of an array of one element, which that NumPy refuses; Triton 3.8 squeezes the array first.
    """
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def check(name, actual, expected, bound=2e-6):
    error = relative_rms(actual, expected)
    if error > bound:
        failures.append(f"{name}: relative RMS {error:.2e}")


def filled(*shape):
    """NaN in memory that a kernel must write."""
    return torch.full(shape, float("nan"))


def narrow_products(M, K, rank, dropout_p):
    case = f"M={M} K={K} r={rank} p={dropout_p}"
    seed = torch.randint(2**62, (1,)) if dropout_p else None
    x, y = torch.randn(M, K), torch.randn(M, K)
    lora_A, lora_B = torch.randn(rank, K), torch.randn(K, rank)
    for stack in ([lora_A], [lora_A, lora_A.flip(0)]):
        arguments = x, stack, 0.5, dropout_p, seed
        wide = lora_reference.lora_down(x.double(), [A.double() for A in stack], 0.5, dropout_p, seed)
        check(f"lora_down {case}", kernels.function("lora_down")(*arguments), wide)

    S = torch.randn(M, rank + 3)[:, 1 : 1 + rank]  # strided, as a part of a group's
    for weight, addends in ((lora_B, []), (lora_A.T, [torch.randn(M, K)]), (lora_B, [torch.randn(M, K)] * 2)):
        actual, expected = y.clone(), y.double()
        kernels.function("lora_add")(actual, S, weight, 2.0, addends, dropout_p, seed)
        wide = [addend.double() for addend in addends]
        lora_reference.lora_add(expected, S.double(), weight.double(), 2.0, wide, dropout_p, seed)
        check(f"lora_add {case} {len(addends)} addends", actual, expected)

    grad_A = kernels.function("lora_grad_A")(S, x, dropout_p, seed, torch.float32)
    expected = lora_reference.lora_grad_A(S.double(), x.double(), dropout_p, seed, torch.float64)
    check(f"lora_grad_A {case}", grad_A, expected)
    again = kernels.function("lora_grad_A")(S, x, dropout_p, seed, torch.float32)
    if not torch.equal(grad_A, again):
        failures.append(f"lora_grad_A {case}: another result the second time")


def grad_B(M, N, rank):
    grad, S, lora_B = torch.randn(M, N), torch.randn(M, rank), torch.randn(N, rank)
    whole = filled(M, rank + 2)
    grad_S = whole[:, 2:]
    actual = kernels.function("lora_grad_B")(grad, S, lora_B, 0.25, grad_S)
    wide_S = torch.empty(M, rank, dtype=torch.float64)
    expected = lora_reference.lora_grad_B(grad.double(), S.double(), lora_B.double(), 0.25, wide_S)
    check(f"lora_grad_B M={M} N={N} r={rank}", actual, expected)
    check(f"lora_grad_B's dS M={M} N={N} r={rank}", grad_S, wide_S)
    if not whole[:, :2].isnan().all():
        failures.append("lora_grad_B wrote beside its columns")


def gated_halves():
    whole, grad = torch.randn(5, 2 * 2100), torch.randn(5, 2100)
    halves = whole[:, :2100], whole[:, 2100:]
    expected = gated_reference.gated_activation_backward(grad, *halves, "silu")
    check("h of halves", kernels.function("gated_activation")(*halves, "silu"), expected[0])
    kernels.function("gated_activation_backward_inplace")(grad, *halves, "silu")
    for name, actual, wanted in zip(["h", "gate", "up"], (grad, *halves), expected, strict=True):
        check(f"gradient of {name} in halves", actual, wanted)


def gated(activation):
    grad, gate, up = (torch.randn(5, 531) * 3 for _ in range(3))
    wide = [t.double() for t in (grad, gate, up)]
    check(
        f"gated_activation {activation}",
        kernels.function("gated_activation")(gate, up, activation),
        gated_reference.gated_activation(gate, up, activation),
    )
    wide_gate = wide[1].requires_grad_()
    wide_up = wide[2].requires_grad_()
    product = gated_reference.activate(wide_gate, activation) * wide_up
    product.backward(wide[0])
    expected = product, wide_gate.grad, wide_up.grad
    results = kernels.function("gated_activation_backward")(grad, gate, up, activation)
    kernels.function("gated_activation_backward_inplace")(grad, gate, up, activation)
    for what, actual, in_place, wanted in zip(["h", "gate", "up"], results, (grad, gate, up), expected, strict=True):
        check(f"gradient of {what}, {activation}", actual, wanted)
        check(f"gradient of {what}, {activation}, in place", in_place, wanted)


def cross_entropy(M, V):
    logits, labels = torch.randn(M, V + 3)[:, :V] * 3, torch.randint(V, (M,))
    labels[0] = -100
    losses, right = filled(M), torch.full((M,), 7, dtype=torch.int32)
    wide = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    expected.sum().backward()
    for gradient in (False, True):
        before = logits.clone()
        cross_entropy_(logits, labels, losses, right, -100, gradient)
        check(f"cross_entropy M={M} V={V}", losses, expected.detach())
        check(f"cross_entropy's gradient M={M} V={V}", logits, wide.grad if gradient else before)
        if not torch.equal(right.bool(), (wide.argmax(1) == labels) & (labels >= 0)):
            failures.append(f"cross_entropy M={M} V={V}: which are right")


def main() -> int:
    accept_one_element_arrays()
    torch.manual_seed(0)
    for shape, dropout_p in itertools.product(SHAPES, (0.0, 0.3)):
        narrow_products(*shape, dropout_p)
    for shape in (*SHAPES, (20, 70, 70)):
        grad_B(*shape)
    for activation in gated_reference.ACTIVATIONS:
        gated(activation)
    gated_halves()
    for shape in ((5, 9000), (3, 37)):
        cross_entropy(*shape)
    print("\n".join(failures) or "all equal")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
