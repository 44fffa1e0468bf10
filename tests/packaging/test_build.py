"""What setup.py plans, and what the compiled library asks of the system that loads it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_engine.ops import backend

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(not backend.library_path().exists(), reason="no compiled library in this installation")


def setup(*arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("QLORA_ENGINE", "CUDA", "FORCE_CUDA"))}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**variables, **environment}, capture_output=True, text=True)


def test_asking_for_cuda_without_nvcc_fails_in_one_line(tmp_path):
    done = setup("--name", QLORA_ENGINE_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert f"QLORA_ENGINE_BUILD_CUDA=1, but missing nvcc: CUDA_HOME={tmp_path} has no bin/nvcc" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"QLORA_ENGINE_BUILD_CUDA": "auto", "CUDA_HOME": "/nowhere"}, "without CUDA kernels: missing at build time"),
        ({"QLORA_ENGINE_BUILD_CUDA": "0"}, "without CUDA kernels: QLORA_ENGINE_BUILD_CUDA=0"),
        ({"QLORA_ENGINE_BUILD": "0"}, "without any kernels: QLORA_ENGINE_BUILD=0"),
        ({"CXX": "no-such-compiler"}, "without any kernels: missing a C++20 compiler"),
    ],
)
def test_building_less_says_why(environment, words):
    done = setup("--name", **environment)
    assert done.returncode == 0, done.stderr
    assert words in done.stderr


def test_an_unknown_choice_is_refused():
    done = setup("--name", QLORA_ENGINE_BUILD_CUDA="perhaps")
    assert done.returncode != 0
    assert "expected auto, 1 or 0" in done.stderr


def test_the_pure_package_falls_back_to_the_reference(tmp_path):
    """A copy without a library imports, works, and says why it has none."""
    package = tmp_path / "qlora_engine"
    shutil.copytree(
        ROOT / "qlora_engine", package, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    (package / "_build.json").write_text(json.dumps({"compiled": False, "reason": "missing a C++20 compiler"}))
    script = (
        "import torch, qlora_engine as qe\n"
        "from qlora_engine.ops import backend\n"
        "print(qe.__file__, backend.implementation('linear_nf4', 'cpu'), backend.library_error())\n"
        "qe.QLoRALinear(64, 32, r=4)(torch.randn(2, 64)).sum().backward()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "QLORA_ENGINE_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert "reference not compiled: missing a C++20 compiler" in done.stdout
    environment["QLORA_ENGINE_BACKEND"] = "compiled"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the compiled library is missing: not compiled: missing a C++20 compiler" in done.stderr


def symbols(*options):
    command = ["nm", "-D", *options, str(backend.library_path())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@compiled
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_needs_only_the_stable_abi():
    """No Python, no C++ of torch, nothing of libtorch_cuda: one file for every torch from 2.11 and every Python."""
    undefined = re.findall(r" U (\S+)", symbols("--undefined-only"))
    names = [name.split("@")[0] for name in undefined]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    forbidden = [n for n in names if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch)|cuda|cu[A-Z]|cublas", n)]
    assert forbidden == []
    assert "aoti_torch_get_current_cuda_stream" not in names
    glibc = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d+\.\d+)", " ".join(undefined))}
    assert max(glibc) <= (2, 35)


@compiled
def test_the_library_is_in_use_unless_switched_off():
    if os.environ.get("QLORA_ENGINE_BACKEND") == "reference":
        assert backend.library_error() == "QLORA_ENGINE_BACKEND=reference"
    else:
        assert backend.library_error() is None
        assert backend.implementation("linear_nf4", "cpu") == "compiled"
