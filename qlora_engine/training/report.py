"""The report of a run: summary.json, loss_curve.png, samples.md and the model card README.md."""

import importlib.metadata
import json
from pathlib import Path

from qlora_engine.models.files import atomic_files
from qlora_engine.training.memory import GIB
from qlora_engine.training.objective import REWARDS
from qlora_engine.training.options import DPO, LORA, PREFERENCE_OPTIONS

MIB = 2**20


def summarize(*, options, metrics, sizes, method, adapter_bytes, rows, peak, seconds, device, dtype) -> dict:
    """The figures of a run, as JSON types; bytes and seconds are plain numbers."""
    train_rows, held_out = rows
    losses = [record["loss"] for record in metrics.records if "loss" in record]
    evals = [record for record in metrics.records if "eval_loss" in record]
    adapter = {"method": options.method}
    if method is None:
        adapter |= {"r": options.r, "alpha": options.alpha, "target_modules": options.target_modules}
        adapter |= {"trainable_parameters": sizes.trainable, "peft_format": True}
    else:
        found = method.report()
        adapter |= {"options": options.method_options, "notes": found.notes}
        adapter |= {"trainable_parameters": found.trainable, "peft_format": method.to_peft() is not None}
    summary = {
        "model": options.model,
        "objective": options.objective,
        "data": {
            "source": options.data,
            "format": train_rows.format,
            "training_rows": len(train_rows),
            "held_out_rows": len(held_out) if held_out else 0,
        },
        "adapter": adapter,
        "parameters": sizes.parameters,
        "bytes": {"model_16bit": sizes.bytes_16bit, "model_4bit": sizes.bytes_4bit, "adapter": adapter_bytes},
        "peak_memory_bytes": peak,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "steps": metrics.records[-1]["step"] if metrics.records else 0,
        "tokens": metrics.tokens,
        "tokens_per_second": round(metrics.tokens_per_second, 1),
        "train_loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "eval_loss": {"before": evals[0]["eval_loss"], "after": evals[-1]["eval_loss"]} if evals else None,
        "device": _device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": options.seed,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")},
    }
    if options.objective == DPO:
        summary["preferences"] = {name: getattr(options, name) for name in PREFERENCE_OPTIONS}
        summary["eval_rewards"] = {"before": rewards_of(evals[0]), "after": rewards_of(evals[-1])} if evals else None
    return summary


def rewards_of(record: dict) -> dict:
    """Held-out rewards in a record of metrics.jsonl, by the last part of their names."""
    return {name.removeprefix("rewards/"): record[f"eval_{name}"] for name in REWARDS}


def pair_samples(prompts, before: list[str], after: list[str]) -> list[dict]:
    """Prompt, reference and both generations of each sample; a conversation is shown by its last message."""
    paired = []
    for (prompt, reference), old, new in zip(prompts, before, after, strict=False):
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        paired.append({"prompt": shown, "reference": reference.strip(), "before": old.strip(), "after": new.strip()})
    return paired


def write(output: Path, summary: dict, records: list[dict], samples: list[dict]) -> None:
    """Writes the report's files into `output`, when all of them are whole."""
    with atomic_files(output) as folder:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        draw_losses(records, folder / "loss_curve.png", title=f"QLoRA fine-tuning of {Path(summary['model']).name}")
        (folder / "samples.md").write_text(samples_text(samples), encoding="utf-8")
        (folder / "README.md").write_text(card_text(summary, output), encoding="utf-8")


def draw_losses(records: list[dict], path: Path, title: str) -> None:
    """Loss against steps, in training and held out, as a PNG; margins and accuracy below it where there are any."""
    # no pyplot: that would need a display, or change the caller's backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    _, _, margins, accuracies = REWARDS
    panels = [("loss", "loss (nats per token)")]
    if any(margins in record for record in records):
        panels = [("loss", "loss"), (margins, "reward margin"), (accuracies, "reward accuracy")]
    figure = Figure(figsize=(8, 4.8 + 3 * (len(panels) - 1)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, records, name)
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.axes[0].set_title(title)
    figure.axes[-1].set_xlabel("optimizer step")
    figure.savefig(path)


def _draw(axes, records: list[dict], name: str) -> None:
    """A figure of each training step, its running mean, and the held-out one."""
    steps = [record["step"] for record in records if name in record]
    values = [record[name] for record in records if name in record]
    if steps:
        axes.plot(steps, values, color="#9ecae1", linewidth=1.2, label="training, each step")
        window = max(1, len(values) // 10)
        if window > 1:
            means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
            axes.plot(steps, means, color="#2171b5", linewidth=2, label=f"training, mean of {window} steps")
    evals = [(record["step"], record[f"eval_{name}"]) for record in records if f"eval_{name}" in record]
    if evals:
        axes.plot(*zip(*evals, strict=True), color="#d94801", marker="o", linewidth=2, label="held out")
        for step, value in (evals[0], evals[-1]):
            axes.annotate(f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points", ha="center")


def samples_text(samples: list[dict]) -> str:
    """The samples as Markdown."""
    parts = ["# Samples, before and after\n\nGreedy decoding of held-out prompts.\n"]
    for number, sample in enumerate(samples, 1):
        parts.append(f"## {number}\n")
        for name in ("prompt", "reference", "before", "after"):
            parts.append(f"**{name.capitalize()}**\n\n{_quoted(sample[name])}\n")
    return "\n".join(parts)


def card_text(summary: dict, output: Path) -> str:
    """The model card: YAML header of the hub, figures, and how to use the adapter."""
    base = Path(summary["model"]).name if Path(summary["model"]).exists() else summary["model"]
    adapter, sizes, held = summary["adapter"], summary["bytes"], summary["eval_loss"]
    rows = [
        ("base model", f"`{base}`, {summary['parameters']:,} parameters"),
        ("adapter", _what(adapter)),
        ("trainable parameters", f"{adapter['trainable_parameters']:,}"),
        (
            "data",
            f"`{Path(summary['data']['source']).name}` ({summary['data']['format']}), "
            f"{summary['data']['training_rows']:,} rows, {summary['data']['held_out_rows']:,} held out",
        ),
        ("steps", f"{summary['steps']:,}, {summary['tokens']:,} tokens, {summary['tokens_per_second']:,} tokens/s"),
        ("time", f"{summary['seconds']['train']:.0f} s of steps, {summary['seconds']['total']:.0f} s in all"),
        ("model in 16 bits", f"{sizes['model_16bit'] / MIB:,.1f} MiB"),
        ("model in 4 bits", f"{sizes['model_4bit'] / MIB:,.1f} MiB"),
        ("adapter's file", f"{sizes['adapter'] / MIB:,.1f} MiB"),
        ("peak memory", ", ".join(f"{k}: {v / GIB:.2f} GiB" for k, v in summary["peak_memory_bytes"].items())),
        ("device", f"{summary['device']}, compute in {summary['dtype']}"),
    ]
    if held:
        rows.insert(0, ("held-out loss", f"{held['before']:.4f} before, **{held['after']:.4f}** after"))
    if "preferences" in summary:
        settings = ", ".join(f"{name} {value}" for name, value in summary["preferences"].items() if value)
        rows.insert(bool(held), ("objective", f"preferences (DPO), {settings}"))
    if summary.get("eval_rewards"):
        rows[1:1] = _reward_rows(**summary["eval_rewards"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    header = ["library_name: peft", "pipeline_tag: text-generation", "tags: [qlora, qlora_engine]"]
    if not Path(summary["model"]).exists():
        header.insert(0, f"base_model: {summary['model']}")
    return f"""---
{chr(10).join(header)}
---
# {output.resolve().name}

{"A QLoRA adapter" if adapter["method"] == LORA else "An adapter"}: trained on a frozen base in NF4 by qlora_engine.

| | |
| --- | --- |
{table}

![Loss against steps](loss_curve.png)

Generations before and after are in [samples.md](samples.md), every figure in [metrics.jsonl](metrics.jsonl) and
[summary.json](summary.json), the options of the run in [options.yaml](options.yaml).
Made with {versions}.

## Use

```bash
qlora generate --model {summary["model"]} --adapter {output}/adapter --prompt "..."
qlora merge --model {summary["model"]} --adapter {output}/adapter --output merged
```

{_format(adapter)}
"""


def _reward_rows(before: dict, after: dict) -> list[tuple[str, str]]:
    return [
        (
            "held-out reward accuracy",
            f"{before['accuracies']:.1%} before, **{after['accuracies']:.1%}** after",
        ),
        (
            "held-out rewards after",
            f"chosen {after['chosen']:.3f}, rejected {after['rejected']:.3f}, margin {after['margins']:.3f}",
        ),
    ]


def _what(adapter: dict) -> str:
    if adapter["method"] == LORA:
        return f"LoRA, r={adapter['r']}, alpha={adapter['alpha']:g} on {', '.join(adapter['target_modules'])}"
    return ", ".join([adapter["method"], *adapter["options"], *(f"{k} {v}" for k, v in adapter["notes"].items())])


def _format(adapter: dict) -> str:
    if adapter["method"] == LORA:
        return "The folder `adapter` is in PEFT's format: PEFT and vLLM load it as well."
    if adapter["peft_format"]:
        return "The folder `adapter` is in PEFT's format: PEFT loads it as well as `qlora_engine.peft.load`."
    return "The folder `adapter` is loaded by `qlora_engine.peft.load`; PEFT has no such form of the method."


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in (text or "(nothing)").splitlines())


def _device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
