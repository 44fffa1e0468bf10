"""What the documentation shows, runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import qlora_engine
from qlora_engine.peft import METHODS

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(qlora_engine.__path__, "qlora_engine.") if "._C" not in m.name)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name.startswith("qlora_engine.kernels."):
        pytest.importorskip("triton")
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    documented = [name for name in MODULES if not name.startswith("qlora_engine.kernels.")]
    found = [t for name in documented for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) >= 10


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{document.name}-{index}")
    for document in DOCUMENTS
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, request.node.callspec.id, "exec"), {"__name__": "example"})


def test_every_method_is_in_the_guide():
    """The table of `docs/methods.md` and its sections name the methods that are registered, and no others."""
    text = (ROOT / "docs/methods.md").read_text()
    table = text[text.index("## All methods") : text.index("## In a training loop")]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE))
    assert rows == {name: method.config_class.__name__ for name, method in METHODS.items()}
    assert sorted(re.findall(r"^### `(\w+)`:", text, re.MULTILINE)) == sorted(METHODS)


def test_readme_names_what_exists():
    """Paths and commands that the README mentions are there."""
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for path in set(re.findall(r"(?<![\w./])(?:benchmarks|docs|demo|tests)/[\w./-]*\w", text)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", qlora_engine.__all__)
def test_public_names_are_documented(name):
    value = getattr(qlora_engine, name)
    assert (value.__doc__ or "").strip(), f"qlora_engine.{name} has no docstring"
