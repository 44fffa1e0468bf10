"""What the documentation shows, runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import qlora_engine

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


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("index", range(len(python_blocks())))
def test_readme_example(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_blocks()[index], f"README.md, example {index}", "exec"), {"__name__": "readme"})


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
