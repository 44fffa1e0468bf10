"""One AdamW step over LoRA factors, beside rivals: where the state lies, 32 and 8 bits.

    python benchmarks/bench_optimizer.py --check

On a GPU: the factors of rank 64 of every linear layer of Llama-3-8B, 168 million float32 parameters in 448 tensors.
On a CPU: rank 16 of four such layers. A step called alone is timed with the host's part, which a queue of work hides
in training; "in a graph" is without it. The bound is the time in which the bytes that a step must move go through the
device's memory (a copy's rate) and, where state lies in host memory, over the bus (the rate of a kernel that reads
and writes such memory); both rates are measured in the same run.
"""

import gc
import sys

import harness
import peers
import torch

from qlora_engine.ops import host_memory
from qlora_engine.optim import PagedAdamW

# out and in features of a layer's projections: q, k, v, o, gate, up, down
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
WORK = {"cuda": (32, 64), "cpu": (4, 16)}  # layers, rank
QUICK = {"cuda": (8, 64), "cpu": (1, 16)}
BLOCK = 256  # elements of 8-bit state that share a scale


def factors(work: tuple[int, int], device: str) -> list[torch.nn.Parameter]:
    """A and B of every projection of every layer, with gradients."""
    layers, rank = work
    shapes = [shape for out, into in LAYER for shape in ((rank, into), (out, rank))] * layers
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-2
    return params


def state_bytes(bits: int) -> float:
    """Bytes of both moments of an element."""
    return 8 if bits == 32 else 2 + 8 / BLOCK


def contenders(device: str, total: int) -> dict:
    """Name -> (constructor, bits, share of the state in host memory)."""
    found = {
        "ours 32-bit": (lambda p: PagedAdamW(p), 32, 0.0),
        "ours 32-bit, NaN unchecked": (lambda p: PagedAdamW(p, nonfinite="propagate"), 32, 0.0),
        "ours 8-bit": (lambda p: PagedAdamW(p, bits=8), 8, 0.0),
    }
    if device == "cuda":
        half = int(total * state_bytes(32) / 2)
        managed = host_memory.concurrent_managed_access(torch.device("cuda"))
        for backend in ("managed", "pinned") if managed else ("pinned",):
            kept = {"device_budget": 0, "backend": backend}
            found |= {
                f"ours 32-bit, {backend} host": (lambda p, k=kept: PagedAdamW(p, **k), 32, 1.0),
                f"ours 8-bit, {backend} host": (lambda p, k=kept: PagedAdamW(p, bits=8, **k), 8, 1.0),
            }
        found["ours 32-bit, half on host"] = (lambda p: PagedAdamW(p, device_budget=half), 32, 0.5)
    found |= {
        "torch fused": (lambda p: torch.optim.AdamW(p, fused=True, capturable=device == "cuda"), 32, 0.0),
        "torch foreach": (lambda p: torch.optim.AdamW(p, foreach=True), 32, 0.0),
    }
    if device == "cuda" and peers.bitsandbytes_functional():
        import bitsandbytes.optim as bnb

        found |= {
            "bitsandbytes 32-bit": (lambda p: bnb.AdamW(p, optim_bits=32), 32, 0.0),
            "bitsandbytes 32-bit, paged": (lambda p: bnb.PagedAdamW32bit(p), 32, None),
            "bitsandbytes 8-bit": (lambda p: bnb.AdamW8bit(p), 8, 0.0),
            "bitsandbytes 8-bit, paged": (lambda p: bnb.PagedAdamW8bit(p), 8, None),
        }
    return found


def copy_rate(timer, device: str) -> float:
    """Bytes a microsecond of a copy, read and written."""
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source))


def bus_rate(timer) -> float:
    """Bytes a microsecond that a kernel moves in each direction at once, in host memory that it changes in place."""
    device = torch.device("cuda")
    slab = host_memory.host_slab(256 << 20, device, host_memory.concurrent_managed_access(device))
    numbers = slab.view(torch.float32)
    return slab.numel() / timer(lambda: numbers.add_(1.0))


def measure(name, contender, params, timer, rates) -> dict:
    """One row of the table."""
    make, bits, host_share = contender
    optimizer = make(params)
    microseconds = timer(optimizer.step)
    elements = sum(p.numel() for p in params)
    row = {"case": name, "bits": bits, "ms": microseconds / 1e3, "elements": elements, "tensors": len(params)}
    if params[0].is_cuda and (isinstance(optimizer, PagedAdamW) or name == "torch fused"):
        row["graph_ms"] = timer.graph(optimizer.step) / 1e3
    if host_share is not None:
        over_bus = elements * state_bytes(bits) * host_share
        # parameter read and written, gradient read; state read and written where it lies on the device
        on_device = elements * 12 + 2 * (elements * state_bytes(bits) - over_bus)
        bound = max(on_device / rates["copy"], over_bus / rates["bus"] if over_bus else 0.0)
        row |= {"device_gb": on_device / 1e9, "bus_gb_each_way": over_bus / 1e9}
        row |= {"bound_ms": bound / 1e3, "of_bound": bound / 1e3 / row.get("graph_ms", row["ms"])}
    if isinstance(optimizer, PagedAdamW):
        row |= {"state_on_device": optimizer.device_bytes, "state_on_host": optimizer.host_bytes}
        optimizer.close()
    return row


def check(device: str) -> bool:
    """32 bits against torch over 20 steps; every place of the state against the device, bit for bit."""
    torch.manual_seed(0)
    start = [torch.randn(shape, device=device) for shape in [(300, 700), (5,), (64, 4096)]]

    def run(make):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make(params)
        for step in range(20):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return torch.cat([p.detach().view(-1) for p in params])

    ours = run(PagedAdamW)
    error = (ours - run(torch.optim.AdamW)).abs().max().item()
    good = error <= 4 * torch.finfo(torch.float32).eps * ours.abs().max().item()
    print(f"--check: largest difference from torch after 20 steps: {error:.1e}")
    error = (ours - run(lambda p: torch.optim.AdamW(p, fused=True))).abs().max().item()
    print(f"--check: from torch's fused kernel, whose constants are rounded to float32: {error:.1e}")
    if device == "cuda":
        for name, (make, bits, share) in contenders(device, sum(p.numel() for p in start)).items():
            if name.startswith("ours") and share and bits == 32 and not torch.equal(run(make), ours):
                print(f"--check: {name} differs from the state on the device")
                good = False
    print(f"--check: {'holds' if good else 'DOES NOT HOLD'}")
    return good


def main() -> int:
    args = harness.parser(*__doc__.split("\n\n", 1)).parse_args()
    device = args.device
    harness.require_compiled(["adamw_step", "gradient_norm"], device)
    if args.check and not check(device):
        return 1
    timer = harness.Timer(device, args.quick)
    work = (QUICK if args.quick else WORK)[device]
    rates = {"copy": copy_rate(timer, device)}
    if device == "cuda":
        rates["bus"] = bus_rate(timer)
    params = factors(work, device)
    rows = []
    for name, contender in contenders(device, sum(p.numel() for p in params)).items():
        rows.append(measure(name, contender, params, timer, rates))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    fused = next(row["ms"] for row in rows if row["case"] == "torch fused")
    for row in rows:
        row["of_fused"] = fused / row["ms"]
    columns = {"case": "AdamW step", "ms": "ms"} | ({"graph_ms": "in a graph"} if device == "cuda" else {})
    columns |= {"device_gb": "device GB", "bus_gb_each_way": "bus GB each way"}
    columns |= {"bound_ms": "bound ms", "of_bound": "of bound", "of_fused": "x torch fused"}
    print(harness.environment(device))
    print({name: f"{rate / 1e3:.1f} GB/s" for name, rate in rates.items()}, f"{len(params)} tensors")
    print(harness.table(rows, columns))
    name = args.out / f"bench_optimizer_{harness.slug(device)}"
    rates = {f"{key}_gb_per_s": rate / 1e3 for key, rate in rates.items()}
    harness.write_json(name.with_suffix(".json"), device, rows, rates=rates)
    title = (
        f"AdamW step, {rows[0]['elements'] / 1e6:.0f}M float32 parameters, {harness.environment(device)['device']}"
    )
    series = {"ms": "measured", "bound_ms": "bound by bytes"}
    harness.bars(name.with_suffix(".png"), rows, "case", series, "ms", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
