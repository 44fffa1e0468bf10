"""The Triton kernels on a CPU, in Triton's interpreter, which a process must choose before it imports them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")


def test_kernels_in_the_interpreter():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "QLORA_ENGINE_LORA": "triton", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted"]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "all equal"
