"""Times every way of y = x W^T and of dX = dY W with an NF4 weight, and writes the tables by which they are chosen.

    python benchmarks/tune_linear.py            # on a Hopper GPU: csrc/cuda/linear_table.h, then rebuild
    python benchmarks/tune_linear.py --write    # the table again from the committed measurements, without a GPU

Ways are forced by QLORA_ENGINE_LINEAR and QLORA_ENGINE_BACKWARD and timed in a CUDA graph, single calls with a cold
L2, bfloat16, double-quantized blocks of 64; with an adapter (r = 16) those that are the fastest without one. A way
whose result is wrong is left out. Products that are not in a table take the way of the nearest
(csrc/cuda/measured.h).
"""

import json
import sys
from pathlib import Path

import harness
import torch
from bench_linear import forced, relative_rms

import qlora_engine as qe
from qlora_engine import ops
from qlora_engine.ops.linear import BACKWARD_ENVIRONMENT_VARIABLE, LINEAR_ENVIRONMENT_VARIABLE

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
GRADIENT_PATHS = {"few": 0, "many": 1, "dequantize": 2, "levels": 3}  # BackwardRoute::Path


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


def gradient_candidates(M: int, N: int, K: int, processors: int) -> list[str]:
    """Values of QLORA_ENGINE_BACKWARD to time."""
    tiles = (K + 127) // 128
    found = ["few"] if M <= 64 else []
    if M <= 1024:
        least = next(t for t in (8, 16, 32, 64, 128, 256) if t >= min(M, 256))
        for tokens in (least, 128, 64) if least > 128 and M <= 256 else (least,):
            rows = 256 if tokens <= 32 else 128 if tokens <= 128 else 64  # of W, a stage
            splits = level_splits(tiles * ((M + tokens - 1) // tokens), (N + rows - 1) // rows, processors)
            found += [f"levels:{tokens},1,{s}" for s in splits]
    if M > 32:
        for cluster in (1, 2) if M > 256 else (1,):
            count = tiles * ((M + 256 * cluster - 1) // (256 * cluster))
            most = max(1, min(processors // cluster // count, (N + 63) // 64 // 8, 8))
            found += [f"many:{cluster},{splits},8" for splits in dict.fromkeys((most, max(1, most // 2)))]
    if M >= 128:
        found += ["dequantize"]
    return found


class Tuning:
    """Times the ways of the products of one weight."""

    def __init__(self, w4: qe.NF4Weight, timer: harness.Timer):
        self.w4, self.timer, self.rows = w4, timer, []
        self.decoded = w4.dequantize(torch.float32)
        self.processors = torch.cuda.get_device_properties(0).multi_processor_count

    def measure(self, M: int) -> list[dict]:
        """The times of all ways of M rows: y and dX, without an adapter and with one."""
        self.rows, (N, K) = [], self.w4.shape
        new = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        x, grad, S, B, A = new(M, K), new(M, N), new(M, RANK), new(N, RANK), new(RANK, K)
        arguments = self.w4.arguments
        self._both(
            M,
            False,
            candidates(M, N, K, self.processors),
            (lambda: ops.linear_nf4(x, *arguments, N, None), x.float() @ self.decoded.T),
            (lambda: ops.linear_nf4_lora(x, *arguments, N, S, B, None), S.float() @ B.float().T),
        )
        self._both(
            M,
            True,
            gradient_candidates(M, N, K, self.processors),
            (lambda: ops.linear_nf4_backward(grad, *arguments, K), grad.float() @ self.decoded),
            (lambda: ops.linear_nf4_backward_lora(grad, *arguments, K, S, A), S.float() @ A.float()),
        )
        return self.rows

    def _both(self, M: int, gradient: bool, ways: list[str], plain: tuple, adapter: tuple) -> None:
        """plain: a call, and what it gives; adapter: likewise, and what it adds."""
        if M in ROWS:
            us = self._add(M, gradient, False, ways, *plain)
            ways = sorted(us, key=us.get)[:KEPT] + (["dequantize"] if M >= 1024 else [])
        self._add(M, gradient, True, ways, adapter[0], plain[1] + adapter[1])

    def _add(self, M: int, gradient: bool, adapter: bool, ways: list[str], call, expected: torch.Tensor) -> dict:
        variable = BACKWARD_ENVIRONMENT_VARIABLE if gradient else LINEAR_ENVIRONMENT_VARIABLE
        us = {}
        for way in dict.fromkeys(ways):
            error = relative_rms(forced(way, call, variable), expected)
            if error < BOUND:
                us[way] = forced(way, lambda: self.timer.graph(call), variable)
            else:
                print(f"{way}: relative RMS {error:.2e}", file=sys.stderr)
        N, K = self.w4.shape
        self.rows.append({"gradient": gradient, "adapter": adapter, "M": M, "N": N, "K": K, "us": us})
        return us


def entry(row: dict) -> str:
    """A line of a table: the fastest way of a product."""
    way = min(row["us"], key=row["us"].get)
    name, _, config = way.replace("fused:sm80", "sm80").partition(":")
    numbers = config or "0,0,0"
    path = (GRADIENT_PATHS if row["gradient"] else PATHS)[name]
    values = ["true" if row["adapter"] else "false", row["M"], row["N"], row["K"], path]
    return (
        f"    {{{', '.join(map(str, values))}, {{{numbers.replace(',', ', ')}}}}},  // {way}: {row['us'][way]:.1f} us"
    )


def table(rows: list[dict], where: dict) -> str:
    """The text of csrc/cuda/linear_table.h."""
    ordered = sorted(rows, key=lambda r: (r["adapter"], r["M"], r["N"], r["K"]))
    products, gradients = (
        "\n".join(entry(row) for row in ordered if row["gradient"] == gradient) for gradient in (False, True)
    )
    device = where["device"]
    return f"""// Written by benchmarks/tune_linear.py: the fastest way measured for a product, on an {device}.
#pragma once
#include <cstdint>

namespace qlora_engine::cuda {{

struct MeasuredProduct {{
  bool adapter;
  int32_t M, N, K;
  uint8_t path;  // LinearRoute::Path, or BackwardRoute::Path
  // of a fused kernel: tokens, pair, splits; of a gradient's for many rows: cluster, splits, group; 0: as the kernel
  // chooses, or of one that has none
  int16_t config[3];
}};

// clang-format off
inline constexpr MeasuredProduct kMeasuredProducts[] = {{
{products}
}};

inline constexpr MeasuredProduct kMeasuredGradients[] = {{
{gradients}
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
    harness.require_compiled(["linear_nf4", "linear_nf4_backward"], args.device)
    timer, rows = harness.Timer("cuda", args.quick), []
    for N, K in WEIGHTS:
        tuning = Tuning(qe.quantize((torch.randn(N, K, device="cuda") / K**0.5).bfloat16()), timer)
        for M in ADAPTER_ROWS:
            for row in tuning.measure(M):
                rows.append(row)
                best = sorted(row["us"], key=row["us"].get)[:4]
                shown = ", ".join(f"{way} {row['us'][way]:.1f}" for way in best)
                of = ("dX" if row["gradient"] else "y") + (" + adapter" if row["adapter"] else "")
                print(f"{N}x{K} M={M} {of}: {shown}", flush=True)
    harness.write_json(args.out / f"tune_linear_{harness.slug(args.device)}.json", args.device, rows)
    args.table.write_text(table(rows, harness.environment(args.device)))
    print(f"wrote {args.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
