"""`functional.qlora_qkv` and `qlora_mlp` against float64 autograd of the plain formula, output and every gradient."""

import pytest
import torch

import qlora_engine as qe
from qlora_engine import adapter_nodes
from qlora_engine.functional import QLoRAProjection, nf4_linear, qlora_mlp, qlora_qkv
from qlora_engine.ops.gated import ACTIVATIONS
from qlora_engine.reference.dropout import dropped
from tests.numerics import RELATIVE_RMS, assert_close
from tests.ops.test_gated import PLAIN

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
M, K, N = 29, 96, 130


def projection(device, dtype, out, into, r, adapter_dtype=torch.float32, bias=True, dropout_p=0.0):
    w4 = qe.quantize(torch.randn(out, into) / into**0.5).to(device)
    A = (torch.randn(r, into, device=device) / into**0.5).to(adapter_dtype).requires_grad_()
    B = torch.randn(out, r, device=device).to(adapter_dtype).requires_grad_()
    bias = torch.randn(out, device=device, dtype=dtype).requires_grad_() if bias else None
    return QLoRAProjection(w4, A, B, 0.5, bias, dropout_p)


def wide_leaf(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def in_float64(one: QLoRAProjection, dtype):
    """The plain formula, and its leaves."""
    A, B, bias = (wide_leaf(t) for t in (one.lora_A, one.lora_B, one.bias))
    weight = one.weight.dequantize(dtype).double()

    def product(x, seed):
        S = dropped(x, one.dropout_p, seed) @ A.T
        return x @ weight.T + (0 if bias is None else bias) + one.scaling * S @ B.T

    return product, (A, B, bias)


def compare_gradients(projections, leaves, bound):
    for name, (one, wide) in enumerate(zip(projections, leaves, strict=True)):
        for what, ours, theirs in zip("AB", (one.lora_A, one.lora_B), wide, strict=False):
            assert ours.grad.dtype == ours.dtype
            assert_close(f"gradient of {what} {name}", ours.grad, theirs.grad, bound)
        if one.bias is not None:
            assert_close(f"gradient of bias {name}", one.bias.grad, wide[2].grad, bound)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_against_float64(device, dtype, adapter_dtype, dropout_p):
    options = {"adapter_dtype": adapter_dtype or dtype, "dropout_p": dropout_p}
    group = [projection(device, dtype, out, K, r, **options) for out, r in ((N, 16), (64, 3), (31, 40))]
    group[2] = group[2]._replace(bias=None)
    x = torch.randn(2, M, K, device=device).to(dtype).requires_grad_()
    torch.manual_seed(3)
    outputs = qlora_qkv(x, *group)
    torch.manual_seed(3)
    seed = torch.randint(2**62, (1,), device=device)

    X = wide_leaf(x)
    plain, leaves = zip(*(in_float64(one, dtype) for one in group), strict=True)
    expected = [product(X.reshape(-1, K), seed).reshape(2, M, -1) for product in plain]
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    bound = 3 * RELATIVE_RMS[dtype]
    for actual, want in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert_close("y", actual, want, bound)
    assert_close("gradient of x", x.grad, X.grad, bound)
    compare_gradients(group, leaves, bound)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_against_float64(device, dtype, dropout_p, activation):
    group = [
        projection(device, dtype, N, K, 16, dropout_p=dropout_p),
        projection(device, dtype, N, K, 5, bias=False, dropout_p=dropout_p),
        projection(device, dtype, 70, N, 9, torch.float32, dropout_p=0.1 if dropout_p else 0.0),
    ]
    x = torch.randn(2, M, K, device=device).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = qlora_mlp(x, *group, activation)
    torch.manual_seed(3)
    seeds = torch.randint(2**62, (2,), device=device)

    X = wide_leaf(x)
    plain, leaves = zip(*(in_float64(one, dtype) for one in group), strict=True)
    flat = X.reshape(-1, K)
    h = PLAIN[activation](plain[0](flat, seeds[0])) * plain[1](flat, seeds[0])
    expected = plain[2](h, seeds[1]).reshape(y.shape)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    bound = 6 * RELATIVE_RMS[dtype]  # six products, one after another
    assert_close("y", y, expected, bound)
    assert_close("gradient of x", x.grad, X.grad, bound)
    compare_gradients(group, leaves, bound)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_with_gate_and_up_in_one_projection(device, dtype, dropout_p, retain):
    group = [
        projection(device, dtype, 2 * N, K, 16, dropout_p=dropout_p),
        projection(device, dtype, 70, N, 9, dropout_p=dropout_p),
    ]
    x = torch.randn(2, M, K, device=device).to(dtype).requires_grad_()
    torch.manual_seed(3)
    y = qlora_mlp(x, group[0], None, group[1])
    torch.manual_seed(3)
    seeds = torch.randint(2**62, (2,), device=device)

    X = wide_leaf(x)
    plain, leaves = zip(*(in_float64(one, dtype) for one in group), strict=True)
    gate, up = plain[0](X.reshape(-1, K), seeds[0]).chunk(2, dim=-1)
    expected = plain[1](PLAIN["silu"](gate) * up, seeds[1]).reshape(y.shape)
    grad = torch.randn_like(y)
    y.backward(grad, retain_graph=retain)
    expected.backward(grad.double())
    bound = 6 * RELATIVE_RMS[dtype]
    assert_close("y", y, expected, bound)
    assert_close("gradient of x", x.grad, X.grad, bound)
    compare_gradients(group, leaves, bound)


def test_qkv_is_the_three_layers(device):
    """Bit for bit in forward, where the tiles are the same."""
    group = [projection(device, torch.float32, 64, K, 16) for _ in range(3)]
    x = torch.randn(M, K, device=device)
    for together, one in zip(qlora_qkv(x, *group), group, strict=True):
        alone = qe.functional.qlora_linear(x, *one)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_without_a_graph_there_is_no_node_and_the_same_result(device, dropout_p, monkeypatch):
    group = [projection(device, torch.float32, out, K, 4, dropout_p=dropout_p) for out in (N, 64, 31)]
    gate, up, down = (
        projection(device, torch.float32, *sizes, 4, dropout_p=dropout_p) for sizes in ((N, K), (N, K), (31, N))
    )
    x = torch.randn(2, M, K, device=device)

    def results():
        torch.manual_seed(3)
        outputs = (*qlora_qkv(x, *group), qlora_mlp(x, gate, up, down))
        return *outputs, nf4_linear(x, gate.weight, gate.bias)

    expected = results()
    assert all(y.requires_grad for y in expected)
    for node in (adapter_nodes.QLoRAGroup, adapter_nodes.QLoRAMLP):
        monkeypatch.setattr(node, "apply", None)
    with torch.no_grad():
        found = results()
    for one in (*group, gate, up, down):
        for tensor in (one.lora_A, one.lora_B, one.bias):
            tensor.requires_grad_(False)
    for y, again, frozen in zip(expected, found, results(), strict=True):
        assert torch.equal(again, y)
        assert torch.equal(frozen, y)
        assert not again.requires_grad
        assert not frozen.requires_grad


def test_an_output_that_is_not_used_has_no_gradient(device):
    group = [projection(device, torch.float32, 64, K, 4) for _ in range(3)]
    x = torch.randn(M, K, device=device, requires_grad=True)
    _, k, _ = qlora_qkv(x, *group)
    k.sum().backward()
    grads = [[t.grad for t in (one.lora_A, one.lora_B, one.bias)] for one in group]
    x_grad, x.grad = x.grad, None
    assert grads[0][1] is None
    assert grads[2][2] is None
    for one in group:
        one.lora_A.grad = one.lora_B.grad = one.bias.grad = None
    qe.functional.qlora_linear(x, *group[1]).sum().backward()
    torch.testing.assert_close(x_grad, x.grad)
    for ours, tensor in zip(grads[1], (group[1].lora_A, group[1].lora_B, group[1].bias), strict=True):
        torch.testing.assert_close(ours, tensor.grad)
    assert float(grads[0][0].abs().max()) == 0  # A's gradients are one tensor: this part of it is zero


def mlp_case(device, dropout_p=0.0):
    torch.manual_seed(0)
    sizes = ((N, K), (N, K), (64, N), (8, K))
    group = [projection(device, torch.float32, *size, 4, dropout_p=dropout_p) for size in sizes]
    x = torch.randn(M, K, device=device, requires_grad=True)
    return group, x


def leaves_of(group):
    return [t for one in group for t in (one.lora_A, one.lora_B, one.bias)]


def gradients(group, x):
    return [x.grad.clone()] + [t.grad.clone() for t in leaves_of(group) if t.grad is not None]


def test_a_retained_graph_can_be_used_again(device):
    """Backward writes over what forward kept only where nobody can ask for it again."""
    group, x = mlp_case(device)
    y = qlora_mlp(x, *group[:3])
    results = []
    for keep in (True, False):
        for tensor in (x, *leaves_of(group)):
            tensor.grad = None
        y.sum().backward(retain_graph=keep)
        results.append(gradients(group, x))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_checkpointing_draws_the_same_masks(device):
    from torch.utils.checkpoint import checkpoint

    results = []
    for recompute in (False, True):
        group, x = mlp_case(device, dropout_p=0.5)
        torch.manual_seed(1)

        def block(x, group=group):
            return qlora_mlp(x, *group[:3]) + sum(y.sum() for y in qlora_qkv(x, group[0], group[1], group[3]))

        y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.square().mean().backward()
        results.append(gradients(group, x))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_without_a_graph_break(device, dropout_p):
    torch.compiler.reset()
    group, x = mlp_case(device, dropout_p)

    def block(x):
        return qlora_mlp(x, *group[:3]).sum() + sum(y.sum() for y in qlora_qkv(x, group[0], group[1], group[3]))

    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    y.backward()
    if dropout_p == 0:
        compiled = gradients(group, x)
        group, x = mlp_case(device)
        expected = qlora_mlp(x, *group[:3]).sum() + sum(y.sum() for y in qlora_qkv(x, group[0], group[1], group[3]))
        expected.backward()
        torch.testing.assert_close(y, expected)
        for ours, theirs in zip(compiled, gradients(group, x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_saves_x_gate_up_and_the_narrow_products_only(device):
    group, x = mlp_case(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qlora_mlp(x, *group[:3])
    known = {t.data_ptr() for one in group for t in (one.lora_A, one.lora_B, *one.weight.arguments[:4])}
    new = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in known | {x.data_ptr()})
    assert new == sorted([(M, 8), (M, 4), (M, N), (M, N)])


def test_errors(device):
    group, x = mlp_case(device)
    with pytest.raises(ValueError, match="the activation is 'relu'"):
        qlora_mlp(x, *group[:3], activation="relu")
    with pytest.raises(ValueError, match="projections of one group share their dropout"):
        qlora_qkv(x, group[0], group[0], group[1]._replace(dropout_p=0.5))
    with pytest.raises(ValueError, match=r"expected gate and up of \[hidden, in\]"):
        qlora_mlp(x, group[0], group[1], group[0])


@pytest.mark.gpu
def test_a_graph_of_a_training_step_draws_new_masks():
    """A CUDA graph captures the draw of the seed: every replay drops other elements, in forward and backward."""
    group, x = mlp_case("cuda", dropout_p=0.5)
    leaves = [x, *leaves_of(group[:3])]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(qlora_mlp(x, *group[:3]).sum(), leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = qlora_mlp(x, *group[:3])
        grads = torch.autograd.grad(y.sum(), leaves)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append((y.clone(), grads[1].clone()))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])
