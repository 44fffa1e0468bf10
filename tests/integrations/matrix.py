"""docs/compatibility.md from tests that ran: `python -m tests.integrations.matrix`.

Tests marked `compat(area, feature)` are run with the libraries of this environment, and what came of them is kept in
docs/compatibility.json beside the results of other environments; the page is written from that file. With `--render`
nothing is run.
"""

import argparse
import collections
import importlib
import json
import platform
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "compatibility.json", ROOT / "docs" / "compatibility.md"
LIBRARIES = ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "torch")
AREAS = ("Checkpoints", "PEFT", "Training")
HEAD = """\
# What works with what

Every row is one or more tests, and every column a set of libraries that they ran with, on a CPU. **yes** is followed
by the number of tests that passed, *no* by the number that failed; a dash means that none could run there. The page
is written by `python -m tests.integrations.matrix` from the results in `compatibility.json`.
"""


class Recorder:
    """Pytest plugin: the outcomes of marked tests, by area and feature."""

    def __init__(self):
        self.of_test: dict[str, tuple[str, str]] = {}
        self.found: dict = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))

    def pytest_collection_modifyitems(self, items):
        for item in items:
            marker = item.get_closest_marker("compat")
            if marker is not None:
                self.of_test[item.nodeid] = marker.args

    def pytest_runtest_logreport(self, report):
        if report.nodeid in self.of_test and (report.when == "call" or report.outcome != "passed"):
            area, feature = self.of_test[report.nodeid]
            self.found[area][feature][report.outcome] += 1


def versions() -> dict[str, str]:
    """Versions of the libraries here, and of Python."""
    found = {name: importlib.import_module(name).__version__ for name in LIBRARIES}
    return found | {"python": platform.python_version()}


def run_tests() -> dict:
    """Runs the marked tests here: versions and outcomes."""
    recorder = Recorder()
    folder = str(Path(__file__).parent)
    pytest.main(["-q", "-m", "compat", "-p", "no:cacheprovider", folder], plugins=[recorder])
    return {"versions": versions(), "outcomes": recorder.found}


def merge(environments: list[dict], new: dict) -> list[dict]:
    """Results with those of a new run, which replaces an older one with the same versions."""
    kept = [e for e in environments if e["versions"] != new["versions"]]
    order = [*kept, json.loads(json.dumps(new))]
    return sorted(order, key=lambda e: [_numbers(e["versions"][name]) for name in LIBRARIES])


def _title(versions: dict[str, str]) -> str:
    torch = ".".join(versions["torch"].split(".")[:2])
    return f"transformers {versions['transformers']}, torch {torch}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]


def features(environments: list[dict]) -> dict[str, list[str]]:
    """Areas -> their features, in the order in which they were found."""
    result: dict[str, list[str]] = {area: [] for area in AREAS}
    for environment in environments:
        for area, outcomes in environment["outcomes"].items():
            known = result.setdefault(area, [])
            known += [feature for feature in outcomes if feature not in known]
    return result


def cell(outcomes: dict[str, int]) -> str:
    """What came of a feature's tests, in a word.

    >>> cell({"passed": 3}), cell({"passed": 3, "failed": 1}), cell({"skipped": 2}), cell({})
    ('**yes** (3)', '*no* (1)', '–', '–')
    """
    if outcomes.get("failed"):
        return f"*no* ({outcomes['failed']})"
    return f"**yes** ({outcomes['passed']})" if outcomes.get("passed") else "–"


def render(environments: list[dict]) -> str:
    """The page."""
    names = [_title(environment["versions"]) for environment in environments]
    lines = [HEAD]
    for area, rows in features(environments).items():
        lines += [f"## {area}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        for feature in rows:
            cells = [cell(e["outcomes"].get(area, {}).get(feature, {})) for e in environments]
            lines.append(f"| {feature} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Versions", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for library in (*LIBRARIES[1:], "python"):
        lines.append(f"| {library} | {' | '.join(e['versions'][library] for e in environments)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="write the page from the results that are there")
    arguments = parser.parse_args()
    environments = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    failed = False
    if not arguments.render:
        new = run_tests()
        failed = any("failed" in o for rows in new["outcomes"].values() for o in rows.values())
        environments = merge(environments, new)
        RESULTS.write_text(json.dumps(environments, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(render(environments))
    print(f"wrote {PAGE}: {len(environments)} sets of libraries")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
