"""The table and the picture of bench_methods.py."""

import statistics
from pathlib import Path

import harness

MIB = 2**20
AVERAGED = ("loss", "accuracy", "step_ms")


def summarize(runs: list[dict]) -> list[dict]:
    """One row a method, in the order of first runs: means over seeds and sample standard deviations."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return [_row(name, group) for name, group in groups.items()]


def _row(name: str, group: list[dict]) -> dict:
    row = {"method": name, "base": group[0]["base"], "seeds": len(group), "trainable": group[0].get("trainable", 0)}
    for key in AVERAGED:
        values = [run[key] for run in group if key in run]
        if values:
            row |= {key: statistics.mean(values), f"{key}_sd": statistics.stdev(values) if len(values) > 1 else None}
    for key in ("file_bytes", "peak_bytes"):
        values = [run[key] for run in group if run.get(key) is not None]
        if values:
            row[key.replace("bytes", "mib")] = statistics.mean(values) / MIB
    return row | {"accuracy_shown": _spread(row, "accuracy", 100, 1), "loss_shown": _spread(row, "loss", 1, 3)}


def _spread(row: dict, key: str, factor: float, digits: int) -> str:
    spread = row[f"{key}_sd"]
    mean = f"{factor * row[key]:.{digits}f}"
    return mean if spread is None else f"{mean} ± {factor * spread:.{digits}f}"


def columns(device: str) -> dict[str, str]:
    """Keys of the rows and their headings in the printed table."""
    found = {
        "method": "method",
        "trainable": "trained",
        "file_mib": "file, MiB",
        "peak_mib": "peak, MiB",
        "step_ms": "step, ms",
        "loss_shown": "held-out loss",
        "accuracy_shown": "accuracy, %",
    }
    return found if device == "cuda" else {key: head for key, head in found.items() if key != "peak_mib"}


def draw(path: Path, rows: list[dict], runs: list[dict], title: str) -> None:
    """Accuracy of every run, memory and time of a step, and accuracy against what is trained."""

    def picture(plt):
        ordered = sorted(rows, key=lambda row: row["accuracy"])
        names = [row["method"] for row in ordered]
        shown = {run["method"]: [] for run in runs}
        for run in runs:
            shown[run["method"]].append(100 * run["accuracy"])
        panels = [key for key in ("peak_mib", "step_ms") if any(key in row for row in rows)]
        fig, axes = plt.subplots(
            1,
            1 + len(panels),
            figsize=(5 + 3 * len(panels), 0.34 * len(rows) + 1.6),
            sharey=True,
            layout="constrained",
        )
        axes = list(axes.flat) if panels else [axes]
        places = range(len(ordered))
        axes[0].plot([100 * row["accuracy"] for row in ordered], places, "|", color="#08519c", ms=14, mew=2.5)
        for place, name in enumerate(names):
            axes[0].plot(shown[name], [place] * len(shown[name]), "o", color="#6baed6", ms=4)
        frozen = next((row for row in rows if row["method"] == "frozen, nf4"), None)
        if frozen:
            axes[0].axvline(100 * frozen["accuracy"], color="#d94801", ls="--", lw=1, label="frozen, nf4")
            axes[0].legend(fontsize=8, loc="lower right")
        axes[0].set_yticks(places, names, fontsize=8)
        axes[0].set_xlabel("accuracy, % (dots: seeds; bar: mean)")
        for ax, key in zip(axes[1:], panels, strict=True):
            ax.barh(places, [row.get(key) or 0 for row in ordered], color="#9ecae1")
            for place, row in zip(places, ordered, strict=True):
                if row.get(key):
                    ax.text(row[key], place, f" {row[key]:,.0f}", va="center", fontsize=7)
            ax.set_xlabel({"peak_mib": "peak memory, MiB", "step_ms": "a step, ms"}[key])
            ax.margins(x=0.15)
        for ax in axes:
            ax.grid(axis="x", alpha=0.3)
        fig.suptitle(title, fontsize=10)
        return fig

    harness.figure(path, picture)
