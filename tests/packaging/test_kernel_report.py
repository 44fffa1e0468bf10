"""The report of registers and spills: what it reads, and what it refuses."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_report.py"
PREFIX = "_ZN12qlora_engine4cuda44_GLOBAL__N__79c86790_11_quantize_cu_61cafe66"
LINE = "  REG:{} STACK:{} SHARED:{} LOCAL:{} CONSTANT[0]:433 TEXTURE:0 SURFACE:0 SAMPLER:0"
TEXT = """
Fatbin elf code:
arch = sm_80
Resource usage:
 Common:
  GLOBAL:1088 CONSTANT[4]:16
 Function {}:
{}
"""


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("kernel_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_report"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "19quantize_nf4_kernelI13__nv_bfloat16Li4096ELb0EEEvPKT_llbPhPS2_Pd",
            "quantize_nf4_kernel<__nv_bfloat16, 4096, 0>",
        ),
        ("21dequantize_nf4_kernelIfLb1ELi2ELi512ELi3EEEvPT_lb", "dequantize_nf4_kernel<float, 1, 2, 512, 3>"),
        ("22quantize_absmax_kernelEPKfS2_lilPhPf", "quantize_absmax_kernel"),
    ],
)
def test_names(report, symbol, name):
    (usage,) = report.parse(TEXT.format(PREFIX + symbol, LINE.format(40, 0, 1024, 0)))
    assert (usage.kernel, usage.architecture, usage.registers, usage.shared) == (name, "sm_80", 40, 1024)
    assert report.complaints(usage) == []


def test_a_hash_whose_digits_read_as_lengths(report):
    """050 before c23 is the length of all that follows it as far as the name's end, by chance."""
    hashed = "_ZN12qlora_engine4cuda47_GLOBAL__N__fd050c23_14_linear_sm80_cu_55996555"
    symbol = f"{hashed}18linear_sm80_kernelI13__nv_bfloat16Li128ELi8ELi3ELi1EEEvNS1_11Sm80ProblemE"
    (usage,) = report.parse(TEXT.format(symbol, LINE.format(40, 0, 1024, 0)))
    assert usage.kernel == "linear_sm80_kernel<__nv_bfloat16, 128, 8, 3, 1>"


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((64, 8, 2048, 0), "spills: 8 bytes of stack"),
        ((64, 0, 2048, 16), "16 of local memory"),
        ((65, 0, 2048, 0), "takes 65 registers; 64 allowed"),
        ((64, 0, 4609, 0), "takes 4609 bytes of shared memory; 4608 allowed"),
    ],
)
def test_what_exceeds_the_budget_is_said(report, numbers, words):
    symbol = f"{PREFIX}22quantize_absmax_kernelEPKfS2_lilPhPf"
    (usage,) = report.parse(TEXT.format(symbol, LINE.format(*numbers)))
    (complaint,) = report.complaints(usage)
    assert words in complaint


def test_a_kernel_without_a_budget_is_refused(report):
    (usage,) = report.parse(TEXT.format("_Z10new_kernelPf", LINE.format(8, 0, 0, 0)))
    assert report.complaints(usage) == ["has no budget: add it to BUDGETS"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--library", "missing.so"], "does not exist; build it first"),
        (["--cuobjdump", "true"], "no CUDA kernels in it"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, arguments, words):
    (tmp_path / "empty.so").touch()
    command = [sys.executable, str(SCRIPT), "--library", "empty.so", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
