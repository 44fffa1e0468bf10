"""Writes the tables of docs/measured.md (an H200) and docs/measured-h100.md from the committed results.

    python benchmarks/report.py            # after new results
    python benchmarks/report.py --check    # exit 1 where a page is not what the results say

A table of a page stands between the lines `<!-- table NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"h200": ROOT / "docs" / "measured.md", "h100": ROOT / "docs" / "measured-h100.md"}  # by GPU

# what this engine aims at on an H100, with the work that it is for
DEQUANTIZE_AIM = 1.0  # of a copy of as many bytes
QUANTIZE_AIMS = {  # GB/s by weight and kind
    ("4096x4096", "absmax single"): 2100,
    ("4096x4096", "absmax double"): 1800,
    ("14336x4096", "absmax single"): 2700,
    ("14336x4096", "absmax double"): 2400,
    ("28672x8192", "absmax single"): 2900,
    ("28672x8192", "absmax double"): 2700,
    **{(shape, "search double"): 300 for shape in ("4096x4096", "14336x4096", "28672x8192")},
}
READ_AIM = 1.15  # of the time to read W, at one row
LINEAR_AIMS = {  # microseconds by weight and rows
    (14336, 4096): {4: 19, 16: 20, 64: 25, 128: 36, 256: 50, 512: 93, 1024: 163, 2048: 333, 8192: 1400},
    (4096, 4096): {16: 12},
    (4096, 14336): {16: 21, 64: 27},
}
LAYER_AIMS = {  # milliseconds, MiB
    "linear 4096x4096 r=16 M=2048": (0.26, None),
    "linear 4096x4096 r=16 M=8192": (0.82, None),
    "linear 14336x4096 r=64 M=8192": (2.80, None),
    "mlp 4096/14336 r=16 M=2048": (2.25, 314),
    "mlp 4096/14336 r=16 M=8192": (9.3, 914),
}
STEP_AIMS = {"1x512": ("25 ms", 3.3), "2x2048": ("45,000 tokens/s", 3.9), "4x2048": ("50,000 tokens/s", 4.6)}
OPTIMIZER_AIMS = {
    "ours 32-bit": 2.2,
    "ours 8-bit": 1.5,
    "ours 32-bit, pinned host": 36,
    "ours 32-bit, managed host": 36,
}
CPU_AIMS = {"quantize": 40e3, "dequantize fp32": 9e3, "dequantize bf16": 6e3, "product 1": 3e3}
CPU_RATIO = 1.15  # of a dense product


def load(name: str) -> dict:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(*names: str) -> str:
    """Where and of which commit results are, for the line below a table."""
    found = {name: load(name)["environment"] for name in names}
    commits = ", ".join(f"`{name}` at {e['commit']}" for name, e in found.items())
    where = next(iter(found.values()))
    return f"{where['device']}, torch {where['torch']}, bitsandbytes {where['bitsandbytes']}; {commits}."


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *[[_cell(value) for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _met(value: float | None, aim: float | None, least: bool = False) -> str | None:
    if aim is None or value is None:
        return None
    return "yes" if (value >= aim if least else value <= aim) else "no"


def dequantize(gpu: str) -> str:
    rows = [
        [r["case"], r["ours"], r["copy"], r["of_copy"], r["bitsandbytes"], _met(r["of_copy"], DEQUANTIZE_AIM, True)]
        for r in load(f"bench_dequant_{gpu}")["rows"]
    ]
    columns = ["weight, output, block, scales", "GB/s", "copy", "of a copy", "bitsandbytes", "at least a copy's rate"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_dequant_{gpu}")


def quantize(gpu: str) -> str:
    rows = []
    for r in load(f"bench_quantize_{gpu}")["rows"]:
        shape, kind = r["case"].split(" bf16 ")
        aim, rate = QUANTIZE_AIMS.get((shape, kind)), r.get("graph", r["ours"])
        error = f"{r['error']:+.1%}" if "error" in r else None
        rows.append([shape, kind, r["ours"], r.get("graph"), r["copy"], r["bitsandbytes"], error, aim])
        rows[-1].append(_met(rate, aim, True))
    columns = ["weight", "scales", "GB/s", "in a graph", "copy", "bitsandbytes", "squared error", "aim", "reached"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_quantize_{gpu}")


def linear(gpu: str) -> str:
    rows = []
    for r in load(f"bench_linear_{gpu}")["rows"]:
        aim = LINEAR_AIMS.get((r["N"], r["K"]), {}).get(r["M"])
        if r["M"] == 1:
            aim = READ_AIM * r["read_us"]
        # before bench_linear.py timed both in a graph
        ours = r["ours_us"] if "called_us" in r else min(r["graph_us"], r["ours_us"])
        ratio = r["dense_us"] / ours
        numbers = [ours, r["dense_us"], ratio, r["bitsandbytes_us"], r.get("read_us"), r["sm80_us"]]
        rows.append([f"{r['N']}x{r['K']}", r["M"], r["path"], *numbers, aim, _met(ours, aim)])
    columns = ["W", "rows", "way", "us", "cuBLAS, 16-bit W", "cuBLAS / this", "bitsandbytes", "only reading W"]
    columns += ["`fused:sm80`", "aim", "reached"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_linear_{gpu}")


def linear_backward(gpu: str) -> str:
    data = load(f"bench_linear_{gpu}")["rows"]
    way = ["backward_path"] if "backward_path" in data[0] else []  # not told by earlier measurements
    rows = []
    for r in data:
        ratio = r["dense_backward_us"] / r["backward_us"]
        numbers = [r["backward_us"], r["dense_backward_us"], ratio, r["bitsandbytes_backward_us"]]
        rows.append([f"{r['N']}x{r['K']}", r["M"], *[r[key] for key in way], *numbers])
    columns = ["W", "rows", *["way" for _ in way], "us", "cuBLAS, 16-bit W", "cuBLAS / this", "bitsandbytes"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_linear_{gpu}")


def linear_lora(gpu: str) -> str:
    data = load(f"bench_linear_lora_{gpu}")["rows"]
    ranks = [key.removeprefix("ratio_") for key in data[0] if key.startswith("ratio_")]
    rows = [
        [r["product"], f"{r['N']}x{r['K']}", r["M"], r["dense_us"], r["us_16"], *[r[f"ratio_{k}"] for k in ranks]]
        for r in data
    ]
    columns = ["product", "W", "rows", "cuBLAS us", "r = 16 us"]
    columns += ["no adapter" if k == "0" else f"r = {k}" for k in ranks]
    return markdown(columns, rows) + "\n\n" + source(f"bench_linear_lora_{gpu}")


def layers(gpu: str) -> str:
    rows = []
    for r in load(f"bench_lora_{gpu}")["rows"]:
        ms, mib = LAYER_AIMS.get(r["case"], (None, None))
        numbers = [r["ours_ms"], r["ours_graph_ms"], r["frozen_graph_ms"], r["peft_ms"], r["ours_mib"], r["peft_mib"]]
        aim = None if ms is None else f"{ms:.2f} ms" + (f", {mib} MiB" if mib else "")
        reached = _met(r["ours_graph_ms"], ms)
        if mib:
            reached = f"time {reached}, memory {_met(r['ours_mib'], mib)}"
        rows.append([r["case"], *numbers, aim, reached])
    columns = ["layer", "ms", "in a graph", "frozen 16-bit layer in a graph", "PEFT + bitsandbytes", "MiB"]
    columns += ["PEFT's MiB", "aim", "reached"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_lora_{gpu}")


def step(gpu: str) -> str:
    def aimed(r: dict) -> str:
        aim, gib = STEP_AIMS[r["case"]]
        return f"{aim}, {gib} GiB"

    return _steps(f"bench_finetune_8layers_{gpu}", "aim", aimed)


def step_32_layers(gpu: str) -> str:
    return _steps(f"bench_finetune_32layers_{gpu}", "PEFT / this", lambda r: r.get("speedup"))


def _steps(name: str, last: str, value: Callable[[dict], object]) -> str:
    """A table of whole steps, with one more column."""
    rows = [
        [r["case"], r["what"], r.get("ms", r.get("note")), r.get("tokens_per_second"), r.get("peak_gib"), value(r)]
        for r in load(name)["rows"]
    ]
    return markdown(["batch", "how", "ms", "tokens/s", "peak GiB", last], rows) + "\n\n" + source(name)


def optimizer(gpu: str) -> str:
    rows = []
    for r in load(f"bench_optimizer_{gpu}")["rows"]:
        aim = OPTIMIZER_AIMS.get(r["case"])
        reached = _met(r.get("graph_ms", r["ms"]), aim)
        rows.append([r["case"], r["ms"], r.get("graph_ms"), r.get("bound_ms"), aim, reached])
    columns = ["optimizer", "ms", "in a graph", "bytes alone", "aim", "reached"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_optimizer_{gpu}")


def memory(gpu: str) -> str:
    gib = 2**30
    rows = [
        [r["case"], r["measured"] / gib, r["estimate"] / gib, f"{r['error']:+.1%}", r["process"] / gib]
        for r in load(f"bench_memory_{gpu}")["rows"]
    ]
    columns = ["run", "measured GiB", "estimated", "off by", "whole process"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_memory_{gpu}")


def scale(gpu: str) -> str:
    rows = [
        [r["model"], r["tokens"], r["cap_gib"], r["peak_gib"], r["tokens_per_s"], r["seconds"]]
        for r in load(f"bench_scale_{gpu}")["rows"]
    ]
    columns = ["shapes", "tokens", "memory capped at GiB", "peak GiB", "tokens/s", "seconds a step"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_scale_{gpu}")


def load_model(gpu: str) -> str:
    rows = []
    data = load(f"bench_load_{gpu}")
    for r in data["rows"]:
        shares = [
            None if value is None else f"{value:.0%}" for value in (r.get("cold_of_bound"), r.get("cached_of_bound"))
        ]
        rows.append([r["case"], r["cold"], shares[0], r["cached"], shares[1], r["peak_gb"]])
    columns = ["loader", "GB/s, cold", "of the slower of disk and bus", "GB/s, cached", "of it", "peak GB"]
    bus = f"The bus carries {data['rates']['bus']:.1f} GB/s. "
    return markdown(columns, rows) + "\n\n" + bus + source(f"bench_load_{gpu}")


def distributed(gpu: str) -> str:
    rows = []
    for r in load(f"bench_distributed_{gpu}")["rows"]:
        share = None if "of_16_bits" not in r else f"{r['of_16_bits']:.0%}"
        numbers = [r["tokens_per_s"], r.get("efficiency"), r["peak_gib"], r["gathered_gb"], share]
        rows.append(
            [r["model"], f"{r['rows']}x{r['length']}", r["kind"], r["ranks"], *numbers, r.get("loss_difference")]
        )
    columns = ["shapes", "batch of a GPU", "spread", "GPUs", "tokens/s", "efficiency", "peak GiB of a GPU"]
    columns += ["GB received of gathers", "of 16 bits", "loss off by"]
    return markdown(columns, rows) + "\n\n" + source(f"bench_distributed_{gpu}")


def methods(gpu: str) -> str:
    name = f"bench_methods_{gpu}"
    rows = []
    for r in load(name)["rows"]:
        numbers = [r["trainable"] or None, r.get("file_mib"), r.get("peak_mib"), r.get("step_ms")]
        rows.append([r["method"], *numbers, r["seeds"], r["loss_shown"], r["accuracy_shown"]])
    columns = ["method", "trained", "file, MiB", "peak, MiB", "step, ms", "seeds", "held-out loss", "accuracy, %"]
    return markdown(columns, rows) + "\n\n" + source(name)


def cpu(gpu: str) -> str:
    rows = []
    for r in load("bench_quantize_cpu")["rows"]:
        if r["case"] == "4096x4096 fp32 single":
            aim = CPU_AIMS["quantize"]
            rows.append(["quantize, float32", r["ours_us"], None, r["bitsandbytes_us"], aim, _met(r["ours_us"], aim)])
    for r in load("bench_dequant_cpu")["rows"]:
        if r["shape"] == [4096, 4096] and r["blocksize"] == 64 and r["double_quant"] and r["dtype"] != "fp16":
            aim, copy = CPU_AIMS[f"dequantize {r['dtype']}"], r["bytes"] / r["copy"] / 1e3
            theirs = r["bytes"] / r["bitsandbytes"] / 1e3
            rows.append([f"dequantize to {r['dtype']}", r["ours_us"], copy, theirs, aim, _met(r["ours_us"], aim)])
    for r in load("bench_linear_cpu")["rows"]:
        if (r["N"], r["K"]) == (4096, 4096):
            aim = CPU_AIMS["product 1"] if r["M"] == 1 else CPU_RATIO * r["dense_us"]
            numbers = [r["ours_us"], r["dense_us"], r["bitsandbytes_us"], aim]
            rows.append([f"product, {r['M']} rows, float32", *numbers, _met(r["ours_us"], aim)])
    rows = [[row[0], *[None if v is None else v / 1e3 for v in row[1:5]], row[5]] for row in rows]
    columns = ["4096x4096", "ms", "dense, or a copy", "bitsandbytes", "aim", "reached"]
    names = ("bench_quantize_cpu", "bench_dequant_cpu", "bench_linear_cpu")
    return markdown(columns, rows) + "\n\n" + source(*names)


TABLES: dict[str, Callable[[str], str]] = {
    function.__name__: function
    for function in (
        dequantize,
        quantize,
        linear,
        linear_backward,
        linear_lora,
        layers,
        step,
        step_32_layers,
        optimizer,
        memory,
        scale,
        load_model,
        distributed,
        methods,
        cpu,
    )
}
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def render(page: str, gpu: str) -> str:
    """The page with its tables as the results of a GPU have them."""
    return MARKED.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](gpu)}\n\n{m[3]}", page)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is out of date")
    args = p.parse_args()
    late = False
    for gpu, path in PAGES.items():
        page = path.read_text()
        made = render(page, gpu)
        late |= made != page
        if args.check:
            print(f"{path} is " + ("up to date" if made == page else "out of date: run python benchmarks/report.py"))
        else:
            path.write_text(made)
            print(f"wrote {path}")
    return int(args.check and late)


if __name__ == "__main__":
    sys.exit(main())
