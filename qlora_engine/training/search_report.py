"""What a search leaves: trials.json, best.yaml for `qlora finetune --config`, search.png, and a table."""

import dataclasses
import json
from pathlib import Path

from qlora_engine.models.files import atomic_files
from qlora_engine.training.options import FinetuneOptions
from qlora_engine.training.search import BEST, PICTURE, TRIALS, SearchResult
from qlora_engine.training.search_space import options_at

FIGURES = ("steps", "trainable", "seconds", "error")
STATES = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}


def write_report(output: Path, study, options: FinetuneOptions, picture: bool = True) -> SearchResult:
    """Writes the report of what has been tried so far, when all of its files are whole; the picture where asked."""
    trials = [_record(trial) for trial in study.trials if trial.state.name in STATES and trial.params]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = min(complete, key=lambda trial: trial["eval_loss"], default=None)
    with atomic_files(output) as folder:
        (folder / TRIALS).write_text(json.dumps({"best": best, "trials": trials}, indent=1) + "\n", encoding="utf-8")
        if best:
            found = dataclasses.replace(options_at(options, best["point"]), output=str(output / "best"))
            (folder / BEST).write_text(found.to_yaml(), encoding="utf-8")
        if complete and picture:
            draw_trials(trials, folder / PICTURE, f"Search with {Path(options.model).name}")
    return SearchResult(output, best, trials)


def _record(trial) -> dict:
    facts = {name: trial.user_attrs[name] for name in FIGURES if name in trial.user_attrs}
    found = {"trial": trial.number, "state": STATES[trial.state.name], "point": dict(trial.params)}
    return found | {"eval_loss": trial.user_attrs.get("eval_loss")} | facts


def table(trials: list[dict], count: int = 10) -> str:
    """The best trials, the completed before the stopped and the failed, as aligned text."""
    names = list(dict.fromkeys(name for trial in trials for name in trial["point"]))
    order = list(STATES.values())
    ranked = sorted(trials, key=lambda t: (order.index(t["state"]), _or_infinite(t["eval_loss"])))[:count]
    head = ["trial", *names, "trained", "held-out loss", ""]
    lines = [head]
    for trial in ranked:
        point = [_text(trial["point"].get(name)) for name in names]
        state = "" if trial["state"] == "complete" else trial["state"]
        loss = "-" if trial["eval_loss"] is None else f"{trial['eval_loss']:.4f}"
        lines.append([str(trial["trial"]), *point, _text(trial.get("trainable")), loss, state])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def draw_trials(trials: list[dict], path: Path, title: str) -> None:
    """Held-out loss of each trial in order with the best so far, and against each of what was searched, as a PNG."""
    # no pyplot: that would need a display, or change the caller's backend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [trial for trial in trials if trial["eval_loss"] is not None]
    names = list(dict.fromkeys(name for trial in measured for name in trial["point"]))
    figure = Figure(figsize=(4.2 * (1 + len(names)), 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(names), sharey=True, squeeze=False)[0]
    _scatter(panels[0], measured, [trial["trial"] for trial in measured])
    best, steps = float("inf"), []
    for trial in measured:
        best = min(best, trial["eval_loss"]) if trial["state"] == "complete" else best
        steps.append(best)
    panels[0].step([t["trial"] for t in measured], steps, where="post", color="#d94801", label="best so far")
    panels[0].set_xlabel("trial")
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].legend(frameon=False, fontsize=8)
    for axes, name in zip(panels[1:], names, strict=True):
        own = [trial for trial in measured if name in trial["point"]]
        values = [trial["point"][name] for trial in own]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        _scatter(axes, own, values if numbers else [str(value) for value in values])
        if numbers and min(values) > 0 and max(values) > 4 * min(values):
            axes.set_xscale("log", base=2 if all(isinstance(v, int) for v in values) else 10)
        axes.set_xlabel(name)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path)


def _scatter(axes, trials: list[dict], places: list) -> None:
    for state, marker, colour in (("complete", "o", "#2171b5"), ("stopped", "x", "#9e9e9e")):
        chosen = [(place, t["eval_loss"]) for t, place in zip(trials, places, strict=True) if t["state"] == state]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=marker, color=colour, s=22, label=state)


def _text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _or_infinite(loss: float | None) -> float:
    return float("inf") if loss is None else loss
