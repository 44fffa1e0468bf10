import json

import pytest

from qlora_engine.training import report

RECORDS = [{"step": 0, "eval_loss": 4.5}]
RECORDS += [{"step": step, "loss": 4.5 - step / 20} for step in range(1, 21)]
RECORDS += [{"step": 20, "eval_loss": 3.4}]


def test_loss_curve_shows_both_losses_with_titled_axes(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (drawn.append(figure), save(figure, path)))
    report.draw_losses(RECORDS, tmp_path / "curve.png", "title")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert list(lines) == ["training, each step", "training, mean of 2 steps", "held out"]
    assert lines["training, each step"][:, 1].tolist() == pytest.approx([4.5 - step / 20 for step in range(1, 21)])
    assert lines["training, mean of 2 steps"][1, 1] == pytest.approx((4.45 + 4.4) / 2)
    assert lines["held out"].tolist() == [[0, 4.5], [20, 3.4]]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "optimizer step",
        "loss (nats per token)",
        "title",
    )
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_samples_quote_every_line_and_say_when_nothing_came():
    prompts = [("a\nb", " right "), ([{"role": "user", "content": "hi"}], "ho")]
    samples = report.pair_samples(prompts, ["x", ""], ["y", "z"])
    assert samples[0] == {"prompt": "a\nb", "reference": "right", "before": "x", "after": "y"}
    text = report.samples_text(samples)
    assert "> a\n> b" in text
    assert "> hi" in text
    assert "> (nothing)" in text


@pytest.fixture
def summary():
    return {
        "model": "org/base",
        "data": {"source": "/a/rows.jsonl", "format": "text", "training_rows": 1900, "held_out_rows": 100},
        "adapter": {
            "method": "lora",
            "r": 8,
            "alpha": 16.0,
            "target_modules": ["all-linear"],
            "trainable_parameters": 2442240,
        },
        "parameters": 134515008,
        "bytes": {"model_16bit": 269030016, "model_4bit": 111463416, "adapter": 9791488},
        "peak_memory_bytes": {"cpu": 2**31},
        "seconds": {"load": 1.0, "train": 60.0, "session": 70.0, "total": 80.0},
        "steps": 40,
        "tokens": 12000,
        "tokens_per_second": 200.0,
        "train_loss": {"first": 4.5, "last": 3.1},
        "eval_loss": {"before": 4.5, "after": 3.4},
        "device": "CPU, 2 threads",
        "dtype": "float32",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
    }


def test_card_has_the_hubs_header_and_the_figures(summary, tmp_path):
    import yaml

    text = report.card_text(summary, tmp_path / "run")
    header = yaml.safe_load(text.split("---")[1])
    assert header == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["qlora", "qlora_engine"],
    }
    for figure in (
        "4.5000 before, **3.4000** after",
        "256.6 MiB",
        "106.3 MiB",
        "9.3 MiB",
        "cpu: 2.00 GiB",
        "2,442,240",
    ):
        assert figure in text


def test_a_local_path_is_not_named_as_a_hub_model(summary, tmp_path):
    summary["model"] = str(tmp_path)
    assert "base_model" not in report.card_text(summary, tmp_path / "run").split("---")[1]


def test_write(summary, tmp_path):
    report.write(tmp_path, summary, RECORDS, [])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "samples.md").exists()


def test_a_report_is_replaced_whole(summary, tmp_path, monkeypatch):
    """An error in the middle leaves every file of the older report, and nothing half-written."""
    report.write(tmp_path, summary, RECORDS, [])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(report, "draw_losses", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(tmp_path, {**summary, "seed": 99}, RECORDS, [])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
