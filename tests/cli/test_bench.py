"""`qlora bench`: which committed figure a measured row stands beside."""

import json

import pytest

from qlora_engine.cli import bench
from qlora_engine.cli.main import main

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def measured(monkeypatch):
    """Rows for "cuda" without a GPU: the same questions, no timing."""

    class Timer:
        def __init__(self, device, quick):
            pass

        def __call__(self, function):
            return 10.0

    import torch

    import qlora_engine as qe
    from qlora_engine import timing

    monkeypatch.setattr(timing, "Timer", Timer)

    def rows(device):
        if device == "cuda":
            weight = torch.zeros(2, 64, dtype=torch.bfloat16)
            monkeypatch.setattr(torch, "randn", lambda *size, device=None, dtype=None: weight)
            monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(4, dtype=torch.uint8))
            monkeypatch.setattr(qe, "quantize", lambda w: qe.quantization.weight.quantize(w.float()))
        return bench.measure(device)

    return rows


@pytest.mark.parametrize(("name", "kind"), [(H100, "cuda"), ("AMD EPYC", "cpu")])
def test_every_row_has_a_committed_figure(name, kind, measured, monkeypatch):
    if kind == "cpu":
        monkeypatch.setattr(bench, "SHAPE", (4096, 4096))
    figures = bench.Figures.read(bench.RESULTS, name, kind)
    assert name in figures.source
    rows = [bench.compared(row, figures) for row in measured(kind)]
    assert len(rows) == 2 + 2 * len(bench.ROWS[kind])
    assert all(row["committed"] for row in rows), rows
    assert all(row["ratio"] == 1 and row["slower"] == pytest.approx(1 / row["committed"]) for row in rows)


def test_figures_of_another_card_are_not_shown(tmp_path):
    figures = bench.Figures.read(bench.RESULTS, "NVIDIA T4", "cuda")
    assert figures.rows == {}
    assert "none of this card" in figures.source
    assert bench.Figures.read(tmp_path, H100, "cuda").rows == {}


def test_a_row_without_a_committed_figure_says_nothing_about_it():
    row = {"case": "a", "us": 3.0, "yardstick_us": 2.0, "find": ("dequant", "of_copy", {})}
    found = bench.compared(row, bench.Figures("none", {}))
    assert (found["ratio"], found["committed"], found["slower"]) == (1.5, None, None)
    text = bench.as_text({"device": "d", "committed": "none", "rows": [found]})
    assert text.splitlines()[-1].split() == ["a", "3.0", "2.0", "1.50", "-"]


def test_slow_rows_are_marked():
    figures = bench.Figures("here", {"dequant": [{"of_copy": 2.0}]})
    row = {"case": "a", "us": 3.0, "yardstick_us": 2.0, "find": ("dequant", "of_copy", {})}
    found = bench.compared(row, figures)
    assert (found["committed"], found["slower"]) == (0.5, 3.0)
    assert "3.0 times as slow" in bench.as_text({"device": "d", "committed": "here", "rows": [found]})


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPE", (256, 256))
    assert main(["bench", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert all(row["us"] > 0 and row["committed"] is None for row in report["rows"])


def test_without_the_library_there_is_nothing_to_time(monkeypatch, capsys):
    from qlora_engine.ops import backend

    monkeypatch.setattr(backend, "implementation", lambda op, device: "reference")
    monkeypatch.setattr(backend, "library_error", lambda: "not compiled: no g++")
    assert main(["bench", "--device", "cpu"]) == 2
    assert "not compiled: no g++" in capsys.readouterr().err
