"""Layers with adapters, forward and backward: a linear layer, q/k/v and a gated MLP, beside PEFT on bitsandbytes.

    python benchmarks/bench_lora.py --check
    python benchmarks/bench_lora.py --quick --narrow

Milliseconds of a forward and a backward with gradients of x and the adapters, and MiB of memory at most beside what
was there before. "frozen" is the same layers with 16-bit weights, no adapters, and the gradient of x alone. "graph"
is a replay of a CUDA graph of the same work: what the GPU takes, without the host's part. --narrow adds the narrow
products by themselves, in graphs: Triton beside cuBLAS, which is what `kernels/lora.py` chooses between.
"""

import sys

import harness
import peers
import torch
import torch.nn.functional as F

import qlora_engine as qe
from qlora_engine.functional import QLoRAProjection, qlora_linear, qlora_mlp, qlora_qkv
from qlora_engine.ops import backend
from qlora_engine.reference import lora as blas

# name, sizes [out, in] of the projections, rank
CASES = {
    "linear 4096x4096 r=16": ([(4096, 4096)], 16),
    "linear 14336x4096 r=64": ([(14336, 4096)], 64),
    "qkv 4096+2x1024 r=16": ([(4096, 4096), (1024, 4096), (1024, 4096)], 16),
    "mlp 4096/14336 r=16": ([(14336, 4096), (14336, 4096), (4096, 14336)], 16),
}
ROWS = [512, 2048, 8192]
NARROW = [(8192, 4096, 16), (8192, 4096, 64), (8192, 14336, 16), (2048, 4096, 16)]
BOUND = 2e-2  # relative RMS of bfloat16 gradients against float32 on the decoded weights


def projection(out_features, in_features, rank, device) -> QLoRAProjection:
    weight = (torch.randn(out_features, in_features, device=device) / in_features**0.5).bfloat16()
    A = (torch.randn(rank, in_features, device=device) / in_features**0.5).requires_grad_()
    B = (torch.randn(out_features, rank, device=device) * 0.1).requires_grad_()
    return QLoRAProjection(qe.quantize(weight), A, B, 1.0)


def ours(x, projections):
    if len(projections) == 1:
        return (qlora_linear(x, *projections[0]),)
    if projections[-1].weight.shape[1] != x.shape[-1]:
        return (qlora_mlp(x, *projections),)
    return qlora_qkv(x, *projections)


def plain(x, products):
    """The same layers out of separate products."""
    if len(products) == 1 or products[-1].in_features == x.shape[-1]:
        return tuple(product(x) for product in products)
    gate, up, down = products
    return (down(F.silu(gate(x)) * up(x)),)


class Frozen(torch.nn.Module):
    """A 16-bit weight without an adapter."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.in_features = weight, weight.shape[1]

    def forward(self, x):
        return F.linear(x, self.weight)


def peft_layer(one: QLoRAProjection):
    """PEFT's LoRA on bitsandbytes' layer with the same weight and adapter; None where they are not installed."""
    if not peers.bitsandbytes_functional() or harness.version_of("peft") == "not installed":
        return None
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    weight = one.weight.dequantize(torch.bfloat16)
    out_features, in_features = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    root = torch.nn.Module()
    root.proj = layer
    rank = one.lora_A.shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"], lora_dropout=0.0)
    made = get_peft_model(root.to(one.weight.device), config).base_model.model.proj
    with torch.no_grad():
        made.lora_A["default"].weight.copy_(one.lora_A)
        made.lora_B["default"].weight.copy_(one.lora_B)
    made.to(torch.bfloat16)  # PEFT's usual setting for bfloat16 training; halves its casts
    return made


def step_of(function, x, leaves, grads):
    def step():
        return torch.autograd.grad(function(x), leaves, grads)

    return step


def peak_mib(step) -> float:
    """Most memory that a step takes beside what was there, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return (peak - before) / 2**20


def error_of(x, projections, grads) -> float:
    """The worst relative RMS of our outputs and gradients against float32 autograd of the plain formula."""
    leaves = [x, *(t for p in projections for t in (p.lora_A, p.lora_B))]
    outputs = ours(x, projections)
    actual = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    wide = [t.detach().float().requires_grad_() for t in leaves]

    def product(index):
        weight = projections[index].weight.dequantize(torch.bfloat16).float()
        A, B = wide[1 + 2 * index], wide[2 + 2 * index]
        made = torch.nn.Module()
        made.forward = lambda y: F.linear(y, weight) + F.linear(F.linear(y, A), B)
        made.in_features = weight.shape[1]
        return made

    outputs = plain(wide[0], [product(i) for i in range(len(projections))])
    expected = [*outputs, *torch.autograd.grad(outputs, wide, [g.float() for g in grads])]
    return max(float((a.float() - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True))


def measure(name, M, timer, device, check) -> dict:
    sizes, rank = CASES[name]
    projections = [projection(*size, rank, device) for size in sizes]
    x = torch.randn(1, M, sizes[0][1], device=device, dtype=torch.bfloat16, requires_grad=True)
    outputs = [sizes[-1][0]] if "mlp" in name else [out for out, _ in sizes]
    grads = [torch.randn(1, M, out, device=device, dtype=torch.bfloat16) for out in outputs]
    row = {"case": f"{name} M={M}", "M": M}
    if check:
        row["error"] = error_of(x, projections, grads)
        row["wrong"] = row["error"] > BOUND
    adapters = [t for p in projections for t in (p.lora_A, p.lora_B)]
    steps = {"ours": step_of(lambda x: ours(x, projections), x, [x, *adapters], grads)}
    frozen = [Frozen(p.weight.dequantize(torch.bfloat16)) for p in projections]
    steps["frozen"] = step_of(lambda x: plain(x, frozen), x, [x], grads)
    theirs = [peft_layer(p) for p in projections]
    if all(layer is not None for layer in theirs):
        trained = [q for layer in theirs for q in layer.parameters() if q.requires_grad]
        steps["peft"] = step_of(lambda x: plain(x, theirs), x, [x, *trained], grads)
    for key, step in steps.items():
        row[f"{key}_ms"] = timer(step) / 1e3
        row[f"{key}_mib"] = peak_mib(step)
    for key in ("ours", "frozen"):
        row[f"{key}_graph_ms"] = timer.graph(steps[key]) / 1e3
    row["over_frozen"] = row["ours_graph_ms"] / row["frozen_graph_ms"]
    if "peft_ms" in row:
        row["speedup"] = row["peft_ms"] / row["ours_ms"]
    return row


def narrow(M, K, rank, timer, device) -> list[dict]:
    """Microseconds of each narrow product in a graph: Triton, cuBLAS, and the time to read or write what it must."""
    from qlora_engine import kernels
    from qlora_engine.kernels import lora

    x, y, S = (torch.randn(M, n, device=device, dtype=torch.bfloat16) for n in (K, K, rank))
    A, B, grad_S = torch.randn(rank, K, device=device), torch.randn(K, rank, device=device), torch.empty_like(S)
    one = torch.ones(1, dtype=torch.int64, device=device)
    calls = {
        "lora_down": (1, (x, [A], 1.0, 0.0, None), (x, [A], 1.0, 0.1, one)),
        "lora_add": (2, (y, S, B, 1.0, [], 0.0, None), (y, S, B, 1.0, [], 0.1, one)),
        "lora_grad_B": (1, (x, S, B, 1.0, grad_S), None),
        "lora_grad_A": (1, (S, x, 0.0, None, torch.float32), (S, x, 0.1, one, torch.float32)),
    }
    rows, before = [], kernels.adapter_choice
    copied = torch.empty_like(x)
    copy_us = timer.graph(lambda: copied.copy_(x))
    try:
        for name, (passes, without, with_dropout) in calls.items():
            kernel, product = getattr(lora, name), getattr(blas, name)
            kernels.adapter_choice = "triton"
            row = {"case": f"{name} {M}x{K} r={rank}", "triton_us": timer.graph(lambda k=kernel, a=without: k(*a))}
            row["blas_us"] = timer.graph(lambda f=product, a=without: f(*a))
            if with_dropout:
                row["dropout_us"] = timer.graph(lambda k=kernel, a=with_dropout: k(*a))
            row["least_us"] = copy_us * passes / 2
            rows.append(row)
    finally:
        kernels.adapter_choice = before
    return rows


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--narrow", action="store_true", help="also the narrow products by themselves")
    args = p.parse_args()
    if args.device != "cuda":
        raise SystemExit("bench_lora.py measures a GPU; there is none here")
    harness.require_compiled(["adapter_forward", "adapter_backward_S", "adapter_backward_x"], args.device)
    timer = harness.Timer(args.device, args.quick)
    print(harness.environment(args.device), backend.implementation("lora_down", "cuda"), flush=True)
    rows = [
        measure(name, M, timer, args.device, args.check and ROWS[0] == M)
        for name in CASES
        for M in (ROWS[1:] if args.quick else ROWS)
    ]
    columns = {"case": "forward + backward", "ours_ms": "ms", "frozen_ms": "frozen", "peft_ms": "PEFT+bnb"}
    columns |= {"speedup": "PEFT/ours", "ours_graph_ms": "graph", "frozen_graph_ms": "frozen graph"}
    columns |= {"over_frozen": "graph/frozen", "ours_mib": "MiB", "frozen_mib": "frozen MiB", "peft_mib": "PEFT MiB"}
    print(harness.table(rows, columns | ({"error": "error"} if args.check else {})), flush=True)
    more = {}
    if args.narrow:
        more["narrow"] = [row for shape in NARROW for row in narrow(*shape, timer, args.device)]
        heads = {"case": "narrow product, us", "triton_us": "Triton", "blas_us": "cuBLAS", "dropout_us": "dropout"}
        print(harness.table(more["narrow"], heads | {"least_us": "bytes alone"}), flush=True)
    path = args.out / f"bench_lora_{harness.slug(args.device)}"
    harness.write_json(path.with_suffix(".json"), args.device, rows, **more)
    series = {"ours_ms": "qlora_engine", "ours_graph_ms": "qlora_engine, graph", "frozen_ms": "frozen 16-bit layers"}
    title = f"Forward and backward with adapters, {harness.environment(args.device)['device']}"
    harness.bars(path.with_suffix(".png"), rows, "case", series | {"peft_ms": "PEFT + bitsandbytes"}, "ms", title)
    return harness.verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
