"""Times every way of y = x W^T with an NF4 weight, and writes the table by which `linear_nf4` chooses one.

    python benchmarks/tune_linear.py            # on a Hopper GPU: csrc/cuda/linear_table.h, then rebuild
    python benchmarks/tune_linear.py --write    # the table again from the committed measurements, without a GPU

Ways are forced by QLORA_ENGINE_LINEAR and timed in a CUDA graph, single calls with a cold L2, bfloat16,
double-quantized blocks of 64; with an adapter (r = 16) those that are the fastest without one. A way whose result is
wrong is left out. Products that are not in the table take the way of the nearest (`measured_route` in
csrc/cuda/linear_route.h).
"""

import json
import sys
from pathlib import Path

import harness
import torch
from bench_linear import forced, relative_rms

import qlora_engine as qe
from qlora_engine import ops

TABLE = harness.ROOT / "csrc" / "cuda" / "linear_table.h"
MEASURED = harness.ROOT / "benchmarks" / "results" / "tune_linear_h200.json"
# (N, K): projections of Llama 3 8B and 70B, Qwen 2.5 7B, and small ones
WEIGHTS = [
    (1024, 4096),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
    (1024, 8192),
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
    (3584, 3584),
    (18944, 3584),
    (3584, 18944),
    (2048, 2048),
    (512, 2048),
    (576, 576),
]
ROWS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
ADAPTER_ROWS = [*ROWS, 4096]
RANK = 16
BOUND = 6e-3  # relative RMS against float64 on the decoded weight
KEPT = 3  # ways timed with an adapter too
PATHS = {"few": 0, "fused": 1, "dequantize": 2, "sm80": 3, "levels": 4}  # LinearRoute::Path


def level_splits(tiles: int, stages: int, processors: int) -> list[int]:
    """Divisions of K worth a try: the two largest clusters that all find multiprocessors, and the next one."""
    fitting = [s for s in range(1, 9) if s == 1 or (tiles * s <= processors and s <= stages)]
    more = [s for s in range(2, 9) if tiles * s > processors and s <= stages][:1]
    return fitting[-3:] + more


def candidates(M: int, N: int, K: int, processors: int) -> list[str]:
    """Values of QLORA_ENGINE_LINEAR to time."""
    tiles = (N + 127) // 128
    found = ["few"] if M <= 16 else []
    if M <= 512:
        least = next(t for t in (8, 16, 32, 64, 128) if t >= min(M, 128))
        for tokens in (least, 64) if least > 64 else (least,):
            count = tiles * ((M + tokens - 1) // tokens)
            found += [f"levels:{tokens},1,{s}" for s in level_splits(count, K // 256, processors)]
    if M >= 64:
        for tokens in (64, 128, 256):
            if not ((2 * tokens >= M and tokens <= M) or tokens == 256 <= M):
                continue
            count = tiles * ((M + tokens - 1) // tokens)
            found += [f"fused:{tokens},1,{s}" for s in (1, 2, 4, 8) if s == 1 or count * s <= 2 * processors]
    if M >= 1024:
        found += ["fused:256,2,1"]
    if 16 < M <= 64:
        found += ["fused:sm80"]
    if M >= 256:
        found += ["dequantize"]
    return found


def timed(way: str, call, expected: torch.Tensor, timer: harness.Timer) -> float | None:
    """Microseconds of a way; None where its result is wrong."""
    error = relative_rms(forced(way, call), expected)
    if not error < BOUND:
        print(f"{way}: relative RMS {error:.2e}", file=sys.stderr)
        return None
    return forced(way, lambda: timer.graph(call))


def measure(M: int, w4: qe.NF4Weight, timer: harness.Timer) -> list[dict]:
    """The times of all ways of M rows, without an adapter and with one."""
    N, K = w4.shape
    decoded = w4.dequantize(torch.float32)
    x, S, B = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((M, K), (M, RANK), (N, RANK)))
    expected = x.float() @ decoded.T
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    ways, rows = candidates(M, N, K, processors), []

    def add(ways: list[str], call, expected: torch.Tensor, adapter: bool) -> dict:
        times = {way: timed(way, call, expected, timer) for way in dict.fromkeys(ways)}
        rows.append({"adapter": adapter, "M": M, "N": N, "K": K, "us": {w: t for w, t in times.items() if t}})
        return rows[-1]["us"]

    if M in ROWS:
        us = add(ways, lambda: ops.linear_nf4(x, *w4.arguments, N, None), expected, False)
        ways = sorted(us, key=us.get)[:KEPT] + (["dequantize"] if M >= 1024 else [])
    add(ways, lambda: ops.linear_nf4_lora(x, *w4.arguments, N, S, B, None), expected + S.float() @ B.float().T, True)
    return rows


def entry(row: dict) -> str:
    """A line of the table: the fastest way of a product."""
    way = min(row["us"], key=row["us"].get)
    name, _, config = way.replace("fused:sm80", "sm80").partition(":")
    numbers = [int(n) for n in config.split(",")] if config else [0, 0, 0]
    values = ["true" if row["adapter"] else "false", row["M"], row["N"], row["K"], PATHS[name], *numbers]
    return f"    {{{', '.join(map(str, values))}}},  // {way}: {row['us'][way]:.1f} us"


def table(rows: list[dict], where: dict) -> str:
    """The text of csrc/cuda/linear_table.h."""
    ordered = sorted(rows, key=lambda r: (r["adapter"], r["M"], r["N"], r["K"]))
    lines, device = "\n".join(entry(row) for row in ordered), where["device"]
    return f"""// Written by benchmarks/tune_linear.py: the fastest way measured for a product, on an {device}.
#pragma once
#include <cstdint>

namespace qlora_engine::cuda {{

struct MeasuredProduct {{
  bool adapter;
  int32_t M, N, K;
  uint8_t path;                   // LinearRoute::Path
  int16_t tokens, pair, splits;  // of a fused kernel; 0: as the kernel chooses, or of one that has none
}};

// clang-format off
inline constexpr MeasuredProduct kMeasuredProducts[] = {{
{lines}
}};
// clang-format on

}}  // namespace qlora_engine::cuda
"""


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--write", action="store_true", help="write the table from the committed measurements")
    p.add_argument("--table", type=Path, default=TABLE, help="where it goes (default: %(default)s)")
    args = p.parse_args()
    if args.write:
        found = json.loads(MEASURED.read_text())
        args.table.write_text(table(found["rows"], found["environment"]))
        print(f"wrote {args.table}")
        return 0
    if args.device != "cuda":
        raise SystemExit("tune_linear.py measures a GPU; there is none here (--write needs none)")
    harness.require_compiled(["linear_nf4"], args.device)
    timer, rows = harness.Timer("cuda", args.quick), []
    for N, K in WEIGHTS:
        w4 = qe.quantize((torch.randn(N, K, device="cuda") / K**0.5).bfloat16())
        for M in ADAPTER_ROWS:
            rows += measure(M, w4, timer)
            for row in rows[-1 - (M in ROWS) :]:
                best = sorted(row["us"], key=row["us"].get)[:4]
                shown = ", ".join(f"{way} {row['us'][way]:.1f}" for way in best)
                print(f"{N}x{K} M={M}{' adapter' if row['adapter'] else ''}: {shown}", flush=True)
    harness.write_json(args.out / f"tune_linear_{harness.slug(args.device)}.json", args.device, rows)
    args.table.write_text(table(rows, harness.environment(args.device)))
    print(f"wrote {args.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
