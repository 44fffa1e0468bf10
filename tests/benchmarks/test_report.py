"""The pages of measurements say what the committed results say."""

import re

import pytest


@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_page_is_up_to_date(load, gpu):
    report = load("report")
    page = report.PAGES[gpu].read_text()
    assert report.render(page, gpu) == page


def test_every_table_is_shown(load):
    report = load("report")
    shown = {gpu: set(re.findall(r"<!-- table (\w+) -->", path.read_text())) for gpu, path in report.PAGES.items()}
    assert shown["h200"] == set(report.TABLES)
    assert shown["h100"] <= set(report.TABLES)


def test_a_table_follows_its_results(load, monkeypatch):
    report = load("report")
    result = report.load("bench_optimizer_h100")
    result["rows"] = [{"case": "ours 32-bit", "ms": 2.1999, "bound_ms": 1.5}, {"case": "ours 8-bit", "ms": 1.501}]
    monkeypatch.setattr(report, "load", lambda name: result)
    page = report.render("before\n<!-- table optimizer -->\nold\n<!-- end -->\nafter", "h100")
    assert page.startswith("before\n<!-- table optimizer -->\n\n| optimizer | ms |")
    assert "| ours 32-bit | 2.20 |  | 1.50 | 2.20 | yes |\n| ours 8-bit | 1.50 |  |  | 1.50 | no |" in page
    assert "old" not in page
    assert page.endswith("<!-- end -->\nafter")
