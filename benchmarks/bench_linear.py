"""Products with an NF4 weight, y = x W^T and dX = dY W, beside a 16- or 32-bit weight and bitsandbytes.

    python benchmarks/bench_linear.py --check
    python benchmarks/bench_linear.py --device cpu

Microseconds a call. "dense" is cuBLAS (or the CPU's BLAS) on a weight of the activations' dtype, which takes four to
eight times the memory. On a GPU ours, dense, and the kernel that only reads W are timed in a replayed CUDA graph, so
that the host takes no part; "called" is ours without a graph, as bitsandbytes, "decoded" (dequantize_nf4 and cuBLAS)
and "fused:sm80" (the kernel for compute capability 8.0, on whichever GPU this is) are. --path forces the way of
y = x W^T as QLORA_ENGINE_LINEAR does. "host" is the host's part of a call, of the registered operator, of the kernel
without torch's dispatcher ("direct", which layers use), and of torch's linear.
"""

import os
import sys
import time
from collections.abc import Sequence

import harness
import peers
import torch
import torch.nn.functional as F

import qlora_engine as qe
from qlora_engine import ops
from qlora_engine.ops.direct import operator
from qlora_engine.ops.linear import LINEAR_ENVIRONMENT_VARIABLE, gradient_path, linear_path

WEIGHTS = {
    "cuda": [(4096, 4096), (14336, 4096), (4096, 14336)],
    "cpu": [(4096, 4096), (1536, 576)],
}
ROWS = {"cuda": [1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192], "cpu": [1, 16, 128, 512]}
FEW = 64  # rows of x up to which reading W is what bounds a product
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# relative RMS against float64 on the decoded weight
BOUNDS = {"bf16": 6e-3, "fp16": 1e-3, "fp32": 2e-6}


def relative_rms(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def forced(path: str, function, variable: str = LINEAR_ENVIRONMENT_VARIABLE):
    """What `function` returns where QLORA_ENGINE_LINEAR, or another variable, is `path`."""
    before = os.environ.get(variable)
    os.environ[variable] = path
    try:
        return function()
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def host_microseconds(function, calls: int = 200) -> float:
    """The host's part of a call: many calls behind each other, whose end is not waited for; the best of five."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - began) / calls)
    torch.cuda.synchronize()
    return best * 1e6


def way(name: str, config: Sequence[int]) -> str:
    """A path as a table shows it."""
    return f"{name} {','.join(map(str, config))}" if any(config) else name


def measure(N, K, M, dtype_name, timer, device, check) -> dict:
    """One row of the table."""
    dtype = DTYPES[dtype_name]
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    w4 = qe.quantize(weight)
    x = torch.randn(M, K, device=device, dtype=dtype)
    grad = torch.randn(M, N, device=device, dtype=dtype)
    row = {"case": f"{N}x{K} M={M} {dtype_name}", "N": N, "K": K, "M": M, "dtype": dtype_name}

    def forward():
        return ops.linear_nf4(x, *w4.arguments, N, None)

    def backward():
        return ops.linear_nf4_backward(grad, *w4.arguments, K)

    if check:
        decoded = w4.dequantize(dtype).double()
        errors = relative_rms(forward(), x.double() @ decoded.T), relative_rms(backward(), grad.double() @ decoded)
        row["error"], row["backward_error"] = errors
        row["wrong"] = not max(errors) < BOUNDS[dtype_name] * (1.5 if M <= 8 else 1)
    timed = timer.graph if device == "cuda" else timer
    row["ours_us"], row["dense_us"] = timed(forward), timed(lambda: F.linear(x, weight))
    row["ours_over_dense"] = row["ours_us"] / row["dense_us"]
    row["backward_us"], row["dense_backward_us"] = timed(backward), timed(lambda: grad @ weight)
    row["backward_over_dense"] = row["backward_us"] / row["dense_backward_us"]
    if peers.bitsandbytes_functional():
        theirs = peers.BitsandbytesWeight(weight)
        with torch.no_grad():
            row["bitsandbytes_us"] = timer(lambda: theirs.linear(x))
            row["bitsandbytes_backward_us"] = timer(lambda: theirs.backward(grad))
    if device == "cuda":
        from reader import read_microseconds

        row["called_us"] = timer(forward)
        if M == 1:
            row["host_us"], row["dense_host_us"] = (
                host_microseconds(forward),
                host_microseconds(lambda: F.linear(x, weight)),
            )
            direct = operator("linear_nf4", x)
            row["direct_host_us"] = host_microseconds(lambda: direct(x, *w4.arguments, N, None))
        name, *config = linear_path(M, N, K, dtype)
        row["path"] = way(name, config)
        row["backward_path"] = way(*gradient_path(M, N, K, dtype))
        row["decoded_us"] = forced("dequantize", lambda: timer(forward))
        if dtype != torch.float32:
            row["sm80_us"] = forced("fused:sm80", lambda: timer(forward))
            if check:
                error = relative_rms(forced("fused:sm80", forward), x.double() @ w4.dequantize(dtype).double().T)
                row["wrong"] |= not error < BOUNDS[dtype_name]
        if M <= FEW:
            row["read_us"] = read_microseconds(timed, w4.nbytes)
            row["over_read"] = row["ours_us"] / row["read_us"]
    if "bitsandbytes_us" in row:  # both called
        row["speedup"] = row["bitsandbytes_us"] / row.get("called_us", row["ours_us"])
    row["tflops"] = 2 * M * N * K / row["ours_us"] / 1e6
    return row


def picture(path, rows, dtype_name, where) -> None:
    """Microseconds over the rows of x, a panel for each weight and direction."""
    called = ", host included" if "called_us" in rows[0] else ""  # beside what a graph replays
    series = {
        "y = x W^T": {
            "ours_us": "qlora_engine",
            "dense_us": f"dense {dtype_name}",
            "decoded_us": f"dequantize, then dense{called}",
            "bitsandbytes_us": f"bitsandbytes{called}",
        },
        "dX = dY W": {
            "backward_us": "qlora_engine",
            "dense_backward_us": f"dense {dtype_name}",
            "bitsandbytes_backward_us": f"bitsandbytes{called}",
        },
    }
    weights = list(dict.fromkeys((row["N"], row["K"]) for row in rows))

    def draw(plt):
        fig, axes = plt.subplots(2, len(weights), figsize=(4.2 * len(weights), 7), squeeze=False, sharex=True)
        for across, (N, K) in enumerate(weights):
            mine = [row for row in rows if (row["N"], row["K"]) == (N, K)]
            for down, (product, lines) in enumerate(series.items()):
                ax = axes[down][across]
                for key, legend in lines.items():
                    ax.loglog([r["M"] for r in mine], [r.get(key) for r in mine], marker="o", ms=3, label=legend)
                ax.set_title(f"{product}, W {N}x{K}", fontsize=9)
                ax.set_xlabel("rows M")
                ax.set_ylabel("microseconds")
                ax.grid(alpha=0.3, which="both")
                ax.legend(fontsize=7)
        fig.suptitle(f"Products with an NF4 weight, {where}")
        fig.tight_layout()
        return fig

    harness.figure(path, draw)


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--path", help="a value of QLORA_ENGINE_LINEAR, such as levels:64,1,1 or dequantize; on a GPU")
    args = p.parse_args()
    device = args.device
    if args.path:
        os.environ[LINEAR_ENVIRONMENT_VARIABLE] = args.path
    harness.require_compiled(["linear_nf4", "linear_nf4_backward"], device)
    timer = harness.Timer(device, args.quick)
    usual = "bf16" if device == "cuda" else "fp32"
    dtype_name = args.dtype or usual
    weights = WEIGHTS[device][:1] if args.quick else WEIGHTS[device]
    cases = [(N, K, M) for N, K in weights for M in ROWS[device]]
    rows = [measure(*case, dtype_name, timer, device, args.check) for case in cases]
    columns = {"case": "NF4 linear", "ours_us": "us", "dense_us": "dense", "ours_over_dense": "ours/dense"}
    columns |= {"bitsandbytes_us": "bnb", "speedup": "bnb/ours", "tflops": "TFLOP/s"}
    if device == "cuda":
        columns |= {"path": "path", "decoded_us": "decoded", "sm80_us": "fused:sm80", "called_us": "called"}
        columns |= {"read_us": "only read W", "over_read": "us/read"}
    columns |= {"backward_path": "dX path"} if device == "cuda" else {}
    columns |= {"backward_us": "dX us", "dense_backward_us": "dX dense", "backward_over_dense": "dX ours/dense"}
    columns |= {"bitsandbytes_backward_us": "dX bnb"}
    columns |= {"error": "error"} if args.check else {}
    print(harness.environment(device))
    print(harness.table(rows, columns))
    name = args.out / f"bench_linear_{harness.slug(device)}{'' if dtype_name == usual else '_' + dtype_name}"
    if args.path:
        name = name.with_name(f"{name.name}_{args.path.replace(':', '_').replace(',', '_')}")
    harness.write_json(name.with_suffix(".json"), device, rows)
    picture(name.with_suffix(".png"), rows, dtype_name, harness.environment(device)["device"])
    return harness.verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
