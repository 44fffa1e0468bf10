"""The documentation's pages: what they name exists, and the messages they explain are the code's own."""

import ast
import re
from pathlib import Path

import pytest

import qlora_engine
from qlora_engine import peft
from qlora_engine.training.options import FinetuneOptions, flag

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GAP = "…"


def python_messages(file: Path) -> list[str]:
    """String literals of a file; what an f-string fills in is a gap."""

    def text(node) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "".join(text(v) if isinstance(v, ast.Constant) else GAP for v in node.values)

    nodes = ast.walk(ast.parse(file.read_text()))
    return [text(n) for n in nodes if isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and n.value)]


def cpp_messages(file: Path) -> list[str]:
    """String literals of a file, those that stand one behind another joined."""
    return [
        "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', run))
        for run in re.findall(r'(?:"(?:[^"\\]|\\.)*"\s*)+', file.read_text())
    ]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    found = [m for file in (ROOT / "qlora_engine").rglob("*.py") for m in python_messages(file)]
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]
    found += [m for file in [*sources] for m in cpp_messages(file)]
    return [*found, *python_messages(ROOT / "setup.py")]


HEADINGS = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("heading", HEADINGS)
def test_message_is_one_of_the_code(heading, messages):
    parts = [part.strip(" `") for part in heading.split(GAP)]
    parts = [part for part in parts if len(part) >= 3]
    assert parts
    assert any(all(part in message for part in parts) for message in messages), parts


def test_every_public_name_has_its_place_in_the_api():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = {target.rpartition(".")[2] for target in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    public = {*qlora_engine.__all__, *peft.__all__} - {"METHODS", *qlora_engine._MODULES}
    assert public - names == set()
    for module in qlora_engine._MODULES:
        assert f"::: qlora_engine.{module}" in pages


def test_flags_that_the_pages_name_are_flags():
    known = {flag(name) for name in FinetuneOptions.__dataclass_fields__}
    known |= {"--" + f"no-{name[2:]}" for name in known}
    others = {"--gpu", "--seq", "--json", "--config", "--adapter", "--prompt", "--output", "--debug"}
    others |= {"--no-build-isolation", "--check"}
    for page in (*DOCS.glob("index.md"), DOCS / "memory.md", DOCS / "migrate.md", DOCS / "troubleshooting.md"):
        for found in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())):
            assert found in known | others, f"{page.name}: {found}"


def test_navigation_names_pages_that_exist():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    assert len(pages) > 8
    assert [page for page in pages if not (DOCS / page).is_file()] == []
