"""The comparison of 4-bit formats: what each makes of a weight, and that the model comes back as it was."""

import json
import sys

import pytest
import torch

from tests.training.tiny_llm import pairs, write_jsonl


@pytest.fixture
def formats(load):
    return load("quality_formats")


def error(stored, weight):
    return float((stored.decoded - weight).double().square().mean())


def test_errors_are_in_their_known_order(formats):
    weight = torch.randn(192, 256) * 0.02
    F = formats.Format
    plain = F("a", "a", nested="float32").stored("w", weight)
    searched = F("a", "a", nested="float32", scales="search").stored("w", weight)
    signed = F("a", "a", nested="float32", scales="signed").stored("w", weight)
    assert error(signed, weight) < error(searched, weight) < error(plain, weight)
    for levels in ("fp4", "int4"):
        other = F("a", "a", levels=levels, nested="float32").stored("w", weight)
        assert error(other, weight) > error(plain, weight)
        assert other.bits == plain.bits
    double, affine = (F("a", "a", nested=nested).stored("w", weight) for nested in ("double", "affine"))
    assert error(plain, weight) < error(double, weight) < 1.01 * error(plain, weight)
    assert error(affine, weight) < 1.01 * error(plain, weight)
    assert affine.bits / weight.numel() == pytest.approx(4 + 8 / 64, abs=0.01)
    blocks = [error(F("a", "a", block=block).stored("w", weight), weight) for block in (32, 64, 256, 1024)]
    assert blocks == sorted(blocks)


def test_the_other_levels_are_the_nearest(formats):
    """int4 against rounding, which is how it is defined."""
    weight = torch.randn(16, 64)
    found = formats.Format("a", "a", levels="int4", nested="float32").stored("w", weight).decoded
    scale = weight.abs().amax(1, keepdim=True).double() / 7
    torch.testing.assert_close(found.double(), (weight / scale).round() * scale, rtol=1e-5, atol=1e-6)


def test_branches(formats):
    weight = torch.randn(96, 128)
    branches = formats.Branches()
    F = formats.Format
    plain = error(F("a", "a").stored("w", weight), weight)
    loftq = [error(branches(F("a", "a", rank=r, branch="loftq"))("w", weight), weight) for r in (4, 16)]
    assert loftq[1] < loftq[0] < plain
    often = branches(F("a", "a", rank=16, branch="loftq", iterations=5))("w", weight)
    assert error(often, weight) < loftq[1]
    pissa = branches(F("a", "a", rank=16, branch="pissa"))("w", weight)
    assert error(pissa, weight) < plain
    assert pissa.bits - F("a", "a").stored("w", weight).bits == 16 * 16 * (96 + 128)


def test_quick_run(load, tiny_model, tmp_path, monkeypatch):
    bench = load("bench_quality")
    text = write_jsonl(tmp_path / "text.jsonl", pairs(40))
    formats = load("quality_formats").FORMATS
    chosen = [formats[0], *(entry for entry in formats if entry.family == "int4" and entry.block in (32, 256))]
    monkeypatch.setattr(bench, "chosen", lambda quick: chosen)
    command = ["bench", "--device", "cpu", "--model", str(tiny_model), "--text", str(text), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--tokens", "128", "--length", "32"])
    bench.main()
    rows = json.loads((tmp_path / "bench_quality_cpu.json").read_text())["rows"]
    assert [row["format"] for row in rows] == ["16-bit", "nf4, 32", "int4, 32", "int4, 256"]
    assert rows[0]["divergence"] == 0
    assert 0 < rows[1]["relative_mse"] < rows[2]["relative_mse"] < rows[-1]["relative_mse"]
    assert all(row["divergence"] > 1e-3 for row in rows[1:])
    assert (tmp_path / "bench_quality_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_weights_come_back_and_the_divergence_of_a_model_from_itself_is_zero(load, tiny_model):
    from transformers import AutoModelForCausalLM

    bench, formats = load("bench_quality"), load("quality_formats")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    layers = bench.linear_layers(model)
    assert len(layers) == 14
    weights = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    reading = bench.Reading(torch.randint(3, 200, (2, 16)))
    perplexity, _ = reading(model)
    again, divergence = reading(model)
    assert again == perplexity
    assert abs(divergence) < 1e-3  # the first reading is kept in float16
    row = bench.measure(layers, weights, formats.Format("a", "a").stored, lambda: reading(model))
    assert row["divergence"] > abs(divergence)
    assert 4.1 < row["bits_per_weight"] < 4.3
    assert all(torch.equal(layer.weight, weights[path]) for path, layer in layers.items())
