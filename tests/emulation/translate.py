"""Turns the CUDA kernels into C++ for cuda_on_cpu.h: launches, shared variables, and inline PTX are rewritten."""

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

# A PTX instruction, and what it means with the names of the function it stands in. An instruction that is not
# here stops the translation, so that a new one cannot go unnoticed.
PTX = {
    "ld.global.nc.L1::no_allocate.b32": "r = *static_cast<const uint32_t*>(p);",
    "ld.global.nc.L1::no_allocate.v4.b32": "r = *static_cast<const uint4*>(p);",
    "mul.ftz.f32": "r = emulated::flush(emulated::flush(a) * emulated::flush(b));",
    "rcp.approx.ftz.f32": "r = emulated::flush(1.0f / emulated::flush(a));",
    "ld.shared.f32": "r = *reinterpret_cast<const float*>(uintptr_t({0}));",
    "ld.shared.v2.b32": (
        "{{ const uint32_t* q = reinterpret_cast<const uint32_t*>(uintptr_t({0})); threshold = q[0]; below = q[1]; }}"
    ),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (
        "emulated::mma_m16n8k16<__half>(c, a0, a1, a2, a3, b0, b1);"
    ),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (
        "emulated::mma_m16n8k16<__nv_bfloat16>(c, a0, a1, a2, a3, b0, b1);"
    ),
}


def _ptx(match: re.Match) -> str:
    statement = match[0]
    instruction = re.search(r'"([\w.:]+) ', statement)[1]
    if instruction not in PTX:
        raise NotImplementedError(f"tests/emulation/translate.py does not know the PTX instruction {instruction}")
    operand = re.search(r':\s*"r"\((.*)\)\);$', statement, re.S)
    return PTX[instruction].format(operand[1] if operand else "")


def _shared(match: re.Match) -> str:
    alignment, kind, name, dimensions = match.groups()
    return f"using {name}_type = {kind}{dimensions}; auto& {name} = emulated::shared<{name}_type>({alignment or ''});"


def translate(text: str) -> str:
    """C++ of a .cu or .cuh file. Raises NotImplementedError for CUDA that is not emulated."""
    text = re.sub(r"asm(?: volatile)?\(.*?\);$", _ptx, text, flags=re.S | re.M)
    text = re.sub(r"__shared__ (?:__align__\((\d+)\) )?([\w:<> ]+?) (\w+)((?:\[[^;]*\])+);", _shared, text)
    text = re.sub(
        r"(\w+(?:<[^;<>]*>)?)\s*<<<(.*?), (.*?), 0, stream>>>\((.*?)\);",
        r"emulated::launch(\2, \3, [&] { \1(\4); });",
        text,
        flags=re.S,
    )
    text = text.replace("__cvta_generic_to_shared(p)", "reinterpret_cast<uintptr_t>(p)")
    for left in ("asm(", "asm volatile(", "__shared__ ", "<<<"):
        if left in text:
            raise NotImplementedError(f"tests/emulation/translate.py left {left!r} in the text")
    return text


def write_sources(folder: Path) -> list[Path]:
    """Writes the translated kernels, and what they include, below `folder`; returns the files to compile."""
    target = folder / "csrc" / "cuda"
    target.mkdir(parents=True)
    for header in CSRC.glob("*.h"):
        (target.parent / header.name).write_text(header.read_text())
    sources = []
    for source in sorted((CSRC / "cuda").iterdir()):
        hopper = "sm90" in source.name or source.name == "wgmma.cuh"  # tile copies and wgmma are not emulated
        own = Path(__file__).with_name(source.name)  # what the emulation has its own text for
        if own.exists():
            (target / source.name).write_text(own.read_text())
        elif source.suffix in (".cu", ".cuh") and not hopper:
            text = '#include "cuda_on_cpu.h"\n' + translate(source.read_text())
            name = source.name.replace(".cu", ".cpp") if source.suffix == ".cu" else source.name
            (target / name).write_text(text)
            if source.suffix == ".cu":
                sources.append(target / name)
    for header in ("kernels.h", "launch.h", "adamw_kernels.h"):
        (target / header).write_text((CSRC / "cuda" / header).read_text())
    return sources
