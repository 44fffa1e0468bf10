"""docs/compatibility.md says what its results say, and has a row for every marked test."""

import ast
import json
from pathlib import Path

from tests.integrations import matrix


def marked() -> set[tuple[str, str]]:
    """Areas and features that the tests of this folder are marked with, read from their sources."""
    found = set()
    for file in Path(matrix.__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "compat":
                found.add(tuple(ast.literal_eval(argument) for argument in node.args))
    return found


def test_page_is_of_its_results():
    environments = json.loads(matrix.RESULTS.read_text())
    assert matrix.PAGE.read_text() == matrix.render(environments)


def test_every_marked_feature_has_a_row_that_works():
    environments = json.loads(matrix.RESULTS.read_text())
    rows = {(area, feature) for area, names in matrix.features(environments).items() for feature in names}
    assert rows == marked(), "run python -m tests.integrations.matrix"
    assert {area for area, _ in rows} == set(matrix.AREAS)
    for environment in environments:
        for area, outcomes in environment["outcomes"].items():
            assert not any(found.get("failed") for found in outcomes.values()), area


def test_a_new_run_replaces_that_with_the_same_versions():
    versions = dict.fromkeys((*matrix.LIBRARIES, "python"), "1.10")
    old = {"versions": versions, "outcomes": {"PEFT": {"a": {"passed": 1}}}}
    newer = {**old, "versions": {**versions, "transformers": "1.9"}}
    again = {**old, "outcomes": {"PEFT": {"b": {"failed": 2, "passed": 1}}}}
    merged = matrix.merge(matrix.merge([old], newer), again)
    assert [e["versions"]["transformers"] for e in merged] == ["1.9", "1.10"]
    page = matrix.render(merged)
    assert "| a | **yes** (1) | – |" in page
    assert "| b | – | *no* (2) |" in page
