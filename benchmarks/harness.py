"""What every benchmark shares: timing, the record of where it ran, tables, JSON and pictures."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qlora_engine.models.files import atomic_write
from qlora_engine.ops import backend
from qlora_engine.timing import Timer as Timer  # every benchmark takes it from here

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    p = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default here: %(default)s")
    p.add_argument("--check", action="store_true", help="verify results first; exit 1 where one is wrong")
    p.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG (default: benchmarks/results)")
    return p


def require_compiled(ops: list[str], device: str) -> None:
    """Exits where the reference would be measured in the place of the kernels."""
    slow = [op for op in ops if backend.implementation(op, device) != "compiled"]
    if slow:
        why = backend.library_error() or backend.build_info().get("reason")
        raise SystemExit(f"{', '.join(slow)} on {device}: not compiled ({why}); there is no kernel to measure")


def sustained(function: Callable[[], object], calls: int = 200) -> float:
    """Microseconds a call of many calls in a row on a GPU, nothing flushed: a power-limited rate."""
    for _ in range(10):
        function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def version_of(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def environment(device: str) -> dict:
    """Where a measurement was made: device, driver, versions, commit."""
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bitsandbytes": version_of("bitsandbytes"),
        "commit": _commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return record


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _commit() -> str:
    """The tree's commit, "+" behind it where files differ; BENCH_COMMIT, where set, names that of a copy."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    commit = _run("git", "rev-parse", "--short", "HEAD")
    changed = _run("git", "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "") if commit else "unknown"


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """An aligned table; `columns` maps keys of the rows to headings. Numbers right, missing values as a dash."""
    cells = [list(columns.values())]
    cells += [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    padded = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("  ".join(line) for line in padded)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}"
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)


def write_json(path: Path, device: str, rows: list[dict], say: bool = True, **more) -> None:
    """Writes the record of a run: environment, rows, and what else is given; says where, unless told not to."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"environment": environment(device), **more, "rows": rows}, indent=1) + "\n")
    if say:
        print(f"wrote {path}")


def verdict(rows: list[dict]) -> int:
    """The exit code of a benchmark: 1, with the cases that --check found wrong, or 0."""
    wrong = [row["case"] for row in rows if row.get("wrong")]
    if wrong:
        print(f"--check: error too large: {', '.join(wrong)}")
    return 1 if wrong else 0


def slug(device: str) -> str:
    """Name of the device for a file: "h100", "cpu"."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(0).lower().replace("nvidia", "").split()
    return name[0] if name else "gpu"


def figure(path: Path, draw: Callable) -> None:
    """Draws a picture with matplotlib, where it is installed: `draw(plt)` returns the figure."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = draw(plt)
    with atomic_write(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(drawn)
    print(f"wrote {path}")


def bars(path: Path, rows: list[dict], label: str, series: dict[str, str], unit: str, title: str) -> None:
    """Grouped bars: one group a row, one bar a key of `series` (key -> legend)."""

    def draw(plt):
        fig, ax = plt.subplots(figsize=(max(7, 1.3 * len(rows)), 4.5))
        width = 0.8 / len(series)
        for i, (key, legend) in enumerate(series.items()):
            heights = [row.get(key) or 0 for row in rows]
            ax.bar([x + (i - (len(series) - 1) / 2) * width for x in range(len(rows))], heights, width, label=legend)
        ax.set_xticks(range(len(rows)), [str(row[label]) for row in rows], rotation=30, ha="right", fontsize=8)
        ax.set_ylabel(unit)
        ax.set_title(title)
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize=8)
        return fig

    figure(path, draw)
