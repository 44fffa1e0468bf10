"""Registers, spills and shared memory of every CUDA kernel in the built library; needs cuobjdump, but no GPU.

    python benchmarks/kernel_report.py [--library FILE] [--cuobjdump FILE] [--json FILE]

Exits with 1 where a kernel spills, exceeds its budget below, or has none; with 2 where it cannot look.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_LIBRARY = Path(__file__).resolve().parents[1] / "qlora_engine" / "_C.so"

# Kernel (a regular expression over its name with template arguments) -> registers a thread, bytes of shared memory
# a block. Registers are what the kernel's launch bounds leave: 65,536 / (threads * blocks a multiprocessor). Shared
# memory is with the kilobyte of every block that sm_90 keeps for itself.
BUDGETS = {
    r"dequantize_nf4_kernel<.*, 2, 512, 4>": (32, 6144),
    r"dequantize_nf4_kernel<.*, 2, 512, 3>": (40, 6144),
    r"dequantize_nf4_kernel<.*, 4, 256, 4>": (64, 6144),
    r"dequantize_absmax_kernel": (32, 0),
    r"quantize_nf4_kernel<float, (32|64|128|256|512|1024), (1|true)>": (80, 11264),
    r"quantize_nf4_kernel<\w+, (32|64|128|256|512|1024), (0|1|false|true)>": (64, 11264),
    r"quantize_nf4_kernel<(__half|__nv_bfloat16), 2048, (0|1|false|true)>": (80, 11264),
    r"quantize_nf4_kernel<(__half|__nv_bfloat16), 4096, (0|1|false|true)>": (168, 11264),
    r"quantize_nf4_kernel<float, 2048, (0|1|false|true)>": (168, 11264),
    r"quantize_nf4_kernel<float, 4096, (0|1|false|true)>": (255, 11264),
    r"quantize_nf4_search_kernel<.*>": (80, 48384),
    r"quantize_absmax_kernel": (64, 4608),
    r"quantize_summed_absmax_kernel<.*>": (40, 4608),
    r"linear_nf4_kernel<.*>": (128, 43012),
    r"linear_few_rows_sm90_kernel<.*>": (96, 33792),  # and what a launch asks for: Layout in the source
    r"linear_sm90_kernel<.*, (16|32|64), \d, 1>": (80, 1168),  # and what linear_sm90.cuh adds up
    r"linear_sm90_kernel<.*, (128|256), \d, [12]>": (168, 1168),
    r"linear_levels_sm90_kernel<.*, (8|16), 2>": (96, 1024),  # and what a launch asks for: LevelsTiling
    r"linear_levels_sm90_kernel<.*, (32|64|128), 1>": (168, 1024),
    r"linear_backward_levels_sm90_kernel<.*, (8|16|32), 4>": (96, 1024),  # backward_levels::Tiling
    r"linear_backward_levels_sm90_kernel<.*, (64|128|256), 2>": (168, 1024),
    r"linear_sm80_kernel<.*, 128, 8, \d, 1>": (255, 1024),  # and what Sm80Tile adds up
    r"linear_sm80_kernel<.*, 64, 4, \d, 3>": (168, 1024),
    r"linear_sm80_kernel<.*, (16|32), 4, \d, 4>": (128, 1024),
    r"linear_backward_few_rows_kernel<.*, [124]>": (128, 1024),
    r"linear_backward_few_rows_kernel<.*, 8>": (255, 1024),
    r"linear_backward_kernel<.*>": (168, 1024),
    r"adamw_kernel<(0|false)>": (80, 1040),
    r"adamw_kernel<(1|true)>": (80, 10512),
    r"adamw_prepare_kernel": (64, 1024),
    r"gradient_(squares|norm)_kernel": (64, 3072),
    r"round_matrices_kernel<.*>": (32, 0),
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture. `stack` and `local` are bytes a thread: 0 where nothing spills."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    local: int
    shared: int


def find_cuobjdump() -> str | None:
    """The CUDA toolkit's cuobjdump, or the one that the triton and nvidia-cuda-cuobjdump packages carry."""
    homes = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    on_path = shutil.which("cuobjdump")
    site = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    packages = [d for s in site for d in (s / "triton/backends/nvidia/bin", *s.glob("nvidia/*/bin"))]
    places = [*homes, *([Path(on_path).parent] if on_path else []), *packages, Path("/usr/local/cuda/bin")]
    return next((str(p / "cuobjdump") for p in places if os.access(p / "cuobjdump", os.X_OK)), None)


def readable_name(symbol: str) -> str:
    """`name<arguments>` of a mangled kernel: types and integers are all the arguments that kernels here have."""
    # names are written as their length, then themselves; digits of a hash before one can read as the length of more
    lengths = re.finditer(r"(?=(\d+)([a-z]\w*))", symbol)
    split = [(found[2][: int(found[1])], found[2][int(found[1]) :]) for found in lengths]
    kernels = [(name, rest) for name, rest in split if name.endswith("_kernel")]
    if not kernels:
        return symbol
    name, rest = min(kernels, key=lambda one: len(one[0]))
    arguments = re.match(r"I(?:f|\d+__(?:half|nv_bfloat16)|L[bijl]\d+E)+E", rest)
    if not arguments:
        return name
    tokens = re.findall(r"L[bijl](\d+)E|\d+(__half|__nv_bfloat16)|(f)", arguments[0][1:-1])
    return f"{name}<{', '.join(number or kind or 'float' for number, kind, _ in tokens)}>"


def parse(text: str) -> list[Usage]:
    """Reads the output of `cuobjdump -res-usage`."""
    usages, architecture, symbol = [], "", None
    for line in text.splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif found := re.match(r"\s*Function (\S+):", line):
            symbol = found[1]
        elif symbol and "REG:" in line:
            number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            usages.append(
                Usage(
                    architecture,
                    readable_name(symbol),
                    number["REG"],
                    number["STACK"],
                    number["LOCAL"],
                    number["SHARED"],
                )
            )
            symbol = None
    return usages


def complaints(usage: Usage) -> list[str]:
    """Why a kernel fails; empty where it does not."""
    budget = next((b for pattern, b in BUDGETS.items() if re.fullmatch(pattern, usage.kernel)), None)
    if budget is None:
        return ["has no budget: add it to BUDGETS"]
    registers, shared = budget
    found = []
    if usage.stack or usage.local:
        found.append(f"spills: {usage.stack} bytes of stack, {usage.local} of local memory; 0 allowed")
    if usage.registers > registers:
        found.append(f"takes {usage.registers} registers; {registers} allowed")
    if usage.shared > shared:
        found.append(f"takes {usage.shared} bytes of shared memory; {shared} allowed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=DEFAULT_LIBRARY)
    parser.add_argument("--cuobjdump", help="default: CUDA_HOME, PATH, then this environment's packages")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()

    if not options.library.exists():
        print(f"kernel_report: {options.library} does not exist; build it first (pip install -e .)", file=sys.stderr)
        return 2
    cuobjdump = options.cuobjdump or find_cuobjdump()
    if cuobjdump is None:
        print(
            "kernel_report: cuobjdump was not found in CUDA_HOME, PATH or this environment's packages; "
            "install the CUDA toolkit, or `pip install triton`, or name one with --cuobjdump",
            file=sys.stderr,
        )
        return 2
    done = subprocess.run([cuobjdump, "-res-usage", str(options.library)], capture_output=True, text=True)
    usages = parse(done.stdout)
    if done.returncode or not usages:
        why = done.stderr.strip() or "no CUDA kernels in it; build with QLORA_ENGINE_BUILD_CUDA=1"
        print(f"kernel_report: {cuobjdump} -res-usage {options.library}: {why}", file=sys.stderr)
        return 2

    width = max(len(u.kernel) for u in usages)
    print(f"{'arch':7} {'kernel':{width}} {'registers':>9} {'stack':>6} {'local':>6} {'shared':>7}")
    for u in sorted(usages, key=lambda u: (u.architecture, u.kernel)):
        print(f"{u.architecture:7} {u.kernel:{width}} {u.registers:9} {u.stack:6} {u.local:6} {u.shared:7}")
    if options.json:
        options.json.write_text(json.dumps([asdict(u) for u in usages], indent=1) + "\n")
    failures = [f"{u.kernel} on {u.architecture} {words}" for u in usages for words in complaints(u)]
    for failure in failures:
        print(f"kernel_report: {failure}", file=sys.stderr)
    print(f"{len(usages)} kernels, {len(failures)} outside their budgets")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
