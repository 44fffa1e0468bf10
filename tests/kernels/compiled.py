"""What Triton makes of a launch, without a GPU: the launch's own tiles and arguments, compiled ahead of time."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Launch:
    """One launch as its host code asked for it."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple
    options: dict


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append(Launch(self.kernel, grid, arguments, options))


def record(monkeypatch, modules, function, *arguments) -> list[Launch]:
    """The launches of a function called with tensors of the meta device."""
    launches = []
    with monkeypatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(value, launches))
        function(*arguments)
    return launches


@dataclass
class Usage:
    """What a compiled kernel takes: registers, stack and local memory a thread, shared memory a block."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Usage:
    """Compiles a launch for a GPU, specialised as the launcher would: divisibility by 16, ones, None."""
    signature, constants, attributes = {}, {}, {}
    options = dict(launch.options)
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[index] if index < len(launch.arguments) else options.pop(name)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or launch.kernel.params[index].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    return Usage(numbers["REG"], numbers["STACK"], numbers["LOCAL"], compiled.metadata.shared, compiled.asm["ptx"])
