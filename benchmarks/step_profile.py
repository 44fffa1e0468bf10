"""Where a training step's GPU time goes: kernels by part and phase, from torch's profiler."""

from pathlib import Path

import harness
import torch

PHASES = ("forward", "recomputed", "backward", "optimizer")
# part -> names of what launched the kernel (operators and autograd nodes, from the inside out)
PARTS = {
    "head and loss": ("_LinearCrossEntropy",),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad"),
    "MLP": ("QLoRAMLP",),
    "q, k, v and o": ("QLoRAGroup",),
    "attention": ("scaled_dot_product", "ScaledDotProduct"),
    "norms": ("RMSNorm", "rms_norm"),
    "rotary": ("Rope", "rotary"),
    "residuals": ("aten::add",),
    "gradients added": ("AccumulateGrad",),
}
ADAPTERS, ACTIVATION, REST = "adapters' narrow products", "activation", "rest"
KERNELS = {ADAPTERS: ("lora_", "sum_partials", "splitKreduce"), ACTIVATION: ("gated_",)}  # within the layers
BACKWARD = "autograd::engine::evaluate_function"
FORWARDS = {
    "QLoRAMLP",
    "QLoRAGroup",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "aten::scaled_dot_product_attention",
}


def profiled(step, steps: int = 2) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by part and phase."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, dict[str, float]] = {}
    for event in profile.events():
        if not event.kernels:
            continue
        names = _ancestry(event)
        for kernel in event.kernels:
            phases = found.setdefault(_part(kernel.name, names), dict.fromkeys(PHASES, 0.0))
            phases[_phase(names)] += kernel.duration / 1e3 / steps
    return dict(sorted(found.items(), key=lambda item: -sum(item[1].values())))


def _ancestry(event) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _part(kernel: str, names: list[str]) -> str:
    for name in names:
        for part, marks in PARTS.items():
            if any(mark in name for mark in marks):
                if part in ("MLP", "q, k, v and o"):
                    inner = (p for p, marks in KERNELS.items() if any(mark in kernel for mark in marks))
                    return next(inner, f"{part}: base products")
                return part
    return REST


def _phase(names: list[str]) -> str:
    if any(mark in name for name in names for mark in PARTS["optimizer"]):
        return "optimizer"
    if not any(name.startswith(BACKWARD) for name in names):
        return "forward"
    # a recomputed forward runs inside of the backward node that asked for it
    return "recomputed" if any(name in FORWARDS for name in names) else "backward"


def table(parts: dict[str, dict[str, float]], case: str) -> str:
    """The profile as text."""
    rows = [{"part": part, **phases, "all": sum(phases.values())} for part, phases in parts.items()]
    whole = {phase: sum(row[phase] for row in rows) for phase in (*PHASES, "all")}
    rows.append({"part": "all", **whole})
    for row in rows:
        row["share"] = f"{row['all'] / max(whole['all'], 1e-9):.0%}"
    heads = {"part": f"GPU ms, {case}"} | {phase: phase for phase in PHASES} | {"all": "all", "share": "share"}
    return harness.table(rows, heads)


def picture(path: Path, parts: dict[str, dict[str, float]], title: str) -> None:
    """Stacked bars: one a phase."""

    def draw(plt):
        fig, ax = plt.subplots(figsize=(9, 5))
        below = [0.0] * len(PHASES)
        for index, (part, phases) in enumerate(parts.items()):
            heights = [phases[phase] for phase in PHASES]
            ax.bar(PHASES, heights, bottom=below, label=part, color=plt.get_cmap("tab20")(index % 20))
            below = [b + h for b, h in zip(below, heights, strict=True)]
        ax.set_ylabel("ms on the GPU")
        ax.set_title(title)
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.grid(axis="y", alpha=0.3)
        return fig

    harness.figure(path, draw)
