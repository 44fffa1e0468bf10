import importlib
import sys
from pathlib import Path

import pytest

from tests.training.tiny_llm import save_model

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/, as a script there does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in {path.stem for path in FOLDER.glob("*.py")}:
        sys.modules.pop(name, None)
