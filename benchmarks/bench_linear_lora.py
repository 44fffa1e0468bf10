"""Products with an NF4 weight and an adapter of every rank, beside cuBLAS on a 16-bit weight without an adapter.

    python benchmarks/bench_linear_lora.py --check
    python benchmarks/bench_linear_lora.py --path fused

y = x W^T + S B^T and dX = dY W + dS A, as `linear_nf4_lora` and `linear_nf4_backward_lora` compute them. Microseconds
of a replayed CUDA graph, bfloat16, double-quantized blocks of 64. The figures under the ranks are cuBLAS' time over
ours: 1 is QLoRA for the price of the frozen 16-bit layer. --path forces a way of the products, as QLORA_ENGINE_LINEAR
does. Needs a GPU.
"""

import functools
import os
import sys

import harness
import torch
import torch.nn.functional as F
from bench_linear import BOUNDS, WEIGHTS, relative_rms

import qlora_engine as qe
from qlora_engine import ops
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, gradient_path, linear_path

ROWS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
RANKS = [8, 16, 32, 64, 128, 256]
SHOWN = 16  # the rank whose microseconds the table gives


def measure(N: int, K: int, M: int, timer, check: bool) -> list[dict]:
    """Two rows of the table, forward and backward."""
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    weight, x, grad = draw(N, K) / K**0.5, draw(M, K), draw(M, N)
    w4 = qe.quantize(weight)
    adapters = {r: (draw(M, r) / r**0.5, draw(N, r), draw(M, r) / r**0.5, draw(r, K)) for r in RANKS}
    products = {
        "y": (lambda r: _forward(x, w4, N, adapters.get(r)), lambda: F.linear(x, weight)),
        "dX": (lambda r: _backward(grad, w4, K, adapters.get(r)), lambda: grad @ weight),
    }
    rows = []
    for name, (ours, dense) in products.items():
        row = {"case": f"{name}, {N}x{K} M={M}", "product": name, "N": N, "K": K, "M": M}
        row["dense_us"] = timer.graph(dense)
        row["path"] = (linear_path if name == "y" else gradient_path)(M, N, K, torch.bfloat16, adapter=True).name
        for r in (0, *RANKS):
            row[f"us_{r}"] = timer.graph(functools.partial(ours, r))
            row[f"ratio_{r}"] = row["dense_us"] / row[f"us_{r}"]
        if check:
            row["error"] = max(_error(name, ours(r), x, grad, w4, adapters[r]) for r in RANKS)
            row["wrong"] = not row["error"] < BOUNDS["bf16"]
        rows.append(row)
    return rows


def _forward(x, w4, N, adapter):
    if adapter is None:
        return ops.linear_nf4(x, *w4.arguments, N, None)
    S, B, _, _ = adapter
    return ops.linear_nf4_lora(x, *w4.arguments, N, S, B)


def _backward(grad, w4, K, adapter):
    if adapter is None:
        return ops.linear_nf4_backward(grad, *w4.arguments, K)
    _, _, dS, A = adapter
    return ops.linear_nf4_backward_lora(grad, *w4.arguments, K, dS, A)


def _error(name, actual, x, grad, w4, adapter) -> float:
    decoded = w4.dequantize(torch.bfloat16).double()
    S, B, dS, A = (t.double() for t in adapter)
    expected = x.double() @ decoded.T + S @ B.T if name == "y" else grad.double() @ decoded + dS @ A
    return relative_rms(actual, expected)


def picture(path, rows, where) -> None:
    """cuBLAS' time over ours, over the rows of x: a panel for each weight and direction, a line for each rank."""
    weights = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    names = {"y": "y = x W^T + S B^T", "dX": "dX = dY W + dS A"}

    def draw(plt):
        fig, axes = plt.subplots(2, len(weights), figsize=(4.2 * len(weights), 7), squeeze=False, sharey=True)
        for across, (N, K) in enumerate(weights):
            for down, (product, title) in enumerate(names.items()):
                ax = axes[down][across]
                mine = [row for row in rows if (row["N"], row["K"], row["product"]) == (N, K, product)]
                for r in (0, *RANKS):
                    label = f"r = {r}" if r else "no adapter"
                    ratios = [q[f"ratio_{r}"] for q in mine]
                    ax.semilogx([q["M"] for q in mine], ratios, marker="o", ms=3, label=label)
                ax.axhline(1, color="grey", lw=0.8)
                ax.set_title(f"{title}, W {N}x{K}", fontsize=9)
                ax.set_xlabel("rows M")
                ax.set_ylabel("cuBLAS' time / ours")
                ax.grid(alpha=0.3, which="both")
                ax.legend(fontsize=7)
        fig.suptitle(f"NF4 weight and adapter beside a 16-bit weight without one, {where}")
        fig.tight_layout()
        return fig

    harness.figure(path, draw)


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--path", help="auto (default), fused, fused:TOKENS,PAIR,SPLITS or dequantize")
    args = p.parse_args()
    if args.device != "cuda":
        p.error("adapters in the fused products are measured on a GPU; there is none here, or --device cpu was given")
    if args.path:
        os.environ[LINEAR_ENVIRONMENT_VARIABLE] = args.path
    harness.require_compiled(["linear_nf4_lora", "linear_nf4_backward_lora"], args.device)
    timer = harness.Timer(args.device, args.quick)
    weights = WEIGHTS["cuda"][:1] if args.quick else WEIGHTS["cuda"]
    rows = [row for N, K in weights for M in ROWS for row in measure(N, K, M, timer, args.check)]
    columns = {"case": "product", "dense_us": "cuBLAS us", f"us_{SHOWN}": f"r={SHOWN} us"}
    columns |= {f"ratio_{r}": f"r={r}" if r else "no adapter" for r in (0, *RANKS)}
    columns |= {"path": "path"} | ({"error": "error"} if args.check else {})
    print(harness.environment(args.device))
    print(harness.table(rows, columns))
    name = args.out / f"bench_linear_lora_{harness.slug(args.device)}"
    if args.path:
        name = name.with_name(f"{name.name}_{args.path.replace(':', '_').replace(',', '_')}")
    harness.write_json(name.with_suffix(".json"), args.device, rows)
    picture(name.with_suffix(".png"), rows, harness.environment(args.device)["device"])
    return harness.verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
