"""`qlora env`: what this machine can run, and why not the rest."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from qlora_engine.cli import cases
from qlora_engine.cli.common import add_command

DESCRIPTION = """\
Reports versions, devices, and what serves each operator on each device: the compiled library, Triton, or the
pure-PyTorch reference. Paste its output into a bug report."""
EXAMPLE = "  qlora env --json"
PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "transformers", "trl", "datasets", "accelerate")
PACKAGES += ("peft", "bitsandbytes", "gguf", "matplotlib", "psutil", "liger-kernel")


def add_parser(commands):
    """Describes the command."""
    parser = add_command(commands, "env", "what this machine can run, and why not the rest", DESCRIPTION, EXAMPLE)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args) -> None:
    """Runs the command."""
    report = collect()
    print(json.dumps(report, indent=1) if args.json else as_text(report))


def collect() -> dict:
    """The report: nested dicts of JSON types; None for what is not there."""
    import torch

    from qlora_engine import kernels
    from qlora_engine.ops import backend
    from qlora_engine.ops.schema import ADAPTER_SCHEMAS, LAYER_SCHEMAS, SCHEMAS

    return {
        "qlora_engine": _version("qlora_engine"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_field("model name"),
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "simd": _simd(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "toolkit": _toolkit(),
            "driver": _driver(),
            "available": torch.cuda.is_available(),
            "why_not": _why_no_cuda(torch),
            "devices": _devices(torch),
        },
        "library": {
            "path": str(backend.library_path()),
            "in_use": backend.library_error() is None,
            "why_not": backend.library_error(),
            "triton_why_not": kernels.why_not(),
            "build": backend.build_info(),
        },
        "operators": {
            name: {device: backend.implementation(name, device) for device in ("cpu", "cuda")}
            for name in (*SCHEMAS, *ADAPTER_SCHEMAS, *LAYER_SCHEMAS)
        },
        "cases": {device: cases.collect(device) for device in _device_names(torch)},
        "variables": cases.variables(),
    }


def _device_names(torch) -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(count))]


def as_text(report: dict) -> str:
    """The report for people."""
    cpu, cuda, library = report["cpu"], report["cuda"], report["library"]
    build = library["build"]
    built = [name for name, there in (("CPU", build.get("compiled")), ("CUDA", build.get("cuda"))) if there]
    lines = [
        f"qlora_engine  {report['qlora_engine']}, Python {report['python']}, {report['system']}",
        f"CPU           {cpu['model']}, {cpu['cores']} cores, {cpu['torch_threads']} threads, {cpu['simd']}, "
        f"{cpu['memory_gib']} GiB",
        f"CUDA          {'available' if cuda['available'] else 'not available: ' + cuda['why_not']}",
        f"  torch for   {cuda['torch_built_for'] or 'CPU only'}",
        f"  toolkit     {cuda['toolkit'] or 'no nvcc found'}",
        f"  driver      {cuda['driver'] or 'none found'}",
    ]
    for index, device in enumerate(cuda["devices"]):
        lines.append(f"  GPU {index}       {device['name']}, {device['capability']}, {device['memory_gib']} GiB")
    lines.append(f"library       {'in use' if library['in_use'] else 'not in use: ' + library['why_not']}")
    no_triton = library["triton_why_not"]
    lines.append(f"  Triton      {'no kernels: ' + no_triton if no_triton else 'kernels of adapters, on a GPU'}")
    if built:
        lines.append(f"  built for   {' and '.join(built)}{_of_architectures(build)}")
    if build.get("reason"):
        lines.append(f"  not more    {build['reason']}")
    width = max(map(len, report["operators"])) + 2
    lines.append(f"{'operators':<{width + 2}}{'CPU':<11}CUDA")
    lines += [f"  {name:<{width}}{served['cpu']:<11}{served['cuda']}" for name, served in report["operators"].items()]
    for device, rows in report["cases"].items():
        lines.append(f"what serves {device}")
        wide = max(len(row["case"]) for row in rows)
        for row in rows:
            why = f"  ({row['why_not']})" if row["why_not"] else ""
            lines.append(f"  {row['case']:<{wide}}  {row['served_by']}{why}")
    lines += [f"{name}={value}" for name, value in report["variables"].items()]
    lines.append("packages      " + ", ".join(f"{name} {v}" for name, v in report["packages"].items() if v))
    absent = [name for name, version in report["packages"].items() if not version]
    if absent:
        lines.append(f"  not there   {', '.join(absent)}")
    return "\n".join(lines)


def _of_architectures(build: dict) -> str:
    return f" ({build['architectures']})" if build.get("architectures") else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "qlora_engine":  # a source tree that was not installed
            import qlora_engine

            return qlora_engine.__version__
        return None


def _cpu_field(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    match = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else "unknown"


def _simd() -> str:
    """The widest vector instructions of this CPU that the kernels distinguish."""
    flags = _cpu_field("flags").split()
    if "avx512f" in flags and "avx512bw" in flags:
        extra = [name for name in ("vnni", "bf16") if f"avx512_{name}" in flags]
        return " + ".join(["AVX-512", *extra])
    return "AVX2" if "avx2" in flags else "no AVX2"


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None and not Path(command[0]).exists():
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _toolkit() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for nvcc in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        match = re.search(r"release ([\d.]+)", _output([nvcc, "--version"]) or "")
        if match:
            return f"{match[1]} ({shutil.which(nvcc) or nvcc})"
    return None


def _driver() -> str | None:
    out = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return out.splitlines()[0] if out else None


def _why_no_cuda(torch) -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this torch was built for the CPU only"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return " ".join(str(error).split())
    return "no CUDA device is visible"


def _devices(torch) -> list[dict]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "capability": f"sm_{facts.major}{facts.minor}",
                "memory_gib": round(facts.total_memory / 2**30, 1),
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return found
