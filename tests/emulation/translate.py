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
    "eight of prmt.b32": (  # decode_pairs of linear_sm90.cuh
        "{{ using emulated::permute; const auto &l = table.low, &h = table.high; "
        "const uint32_t low = permute(permute(l.x, l.y, index), permute(l.z, l.w, index), half), "
        "high = permute(permute(h.x, h.y, index), permute(h.z, h.w, index), half); "
        "first = permute(low, high, 0x4051), second = permute(low, high, 0x6273); }}"
    ),
    "cp.async.cg.shared.global": "emulated::copy(to, from, kBytes, bytes);",
    "cp.async.ca.shared.global": "emulated::copy(to, from, kBytes, bytes);",
    "cp.async.commit_group": "emulated::commit_copies();",
    "cp.async.wait_group": "emulated::wait_for_copies(kPending);",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "emulated::load_matrices(address, m0, m1, m2, m3);",
    "prmt.b32": "r = emulated::permute(a, b, selector);",
    "mul.rn.bf16x2": "r = emulated::multiply_pair<__nv_bfloat16>(a, b);",
    "fma.rn.bf16x2": "r = emulated::multiply_add_pair<__nv_bfloat16>(a, b, c);",
    "add.rn.bf16x2": "r = emulated::add_pair<__nv_bfloat16>(a, b);",
    "mul.rn.f16x2": "r = emulated::multiply_pair<__half>(a, b);",
    "fma.rn.f16x2": "r = emulated::multiply_add_pair<__half>(a, b, c);",
    "add.rn.f16x2": "r = emulated::add_pair<__half>(a, b);",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (
        "emulated::mma_m16n8k16<__half>(c, a0, a1, a2, a3, b0, b1);"
    ),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (
        "emulated::mma_m16n8k16<__nv_bfloat16>(c, a0, a1, a2, a3, b0, b1);"
    ),
}


def _ptx(match: re.Match) -> str:
    statement = match[0]
    if '("" :' in statement:
        return ";"  # only keeps the compiler from reordering
    instruction = re.search(r'"([\w.:]+)[ ;]', statement)[1]
    if instruction == "prmt.b32" and "%11" in statement:
        instruction = "eight of prmt.b32"
    if instruction not in PTX:
        raise NotImplementedError(f"tests/emulation/translate.py does not know the PTX instruction {instruction}")
    operand = re.search(r':\s*"r"\((.*)\)\);$', statement, re.S)
    return PTX[instruction].format(operand[1] if operand else "")


def _shared(match: re.Match) -> str:
    alignment, kind, name, dimensions = match.groups()
    return f"using {name}_type = {kind}{dimensions}; auto& {name} = emulated::shared<{name}_type>({alignment or ''});"


def translate(text: str) -> str:
    """C++ of a .cu or .cuh file. Raises NotImplementedError for CUDA that is not emulated."""
    # what needs a GPU of 9.0 stands beside what does without
    text = re.sub(r"^#if __CUDA_ARCH__ >= 900\n.*?^#else\n(.*?)^#endif\n", r"\1", text, flags=re.S | re.M)
    text = re.sub(
        r"extern __shared__ (?:__align__\(1024\) )?char (\w+)\[\];",
        r"char* \1 = emulated::dynamic_shared();",
        text,
    )
    text = re.sub(r"asm(?: volatile)?\(.*?\);(?=$| \}$)", _ptx, text, flags=re.S | re.M)
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


def write_sources(folder: Path, hopper: bool = False) -> list[Path]:
    """Writes the translated kernels, and what they include, below `folder`; returns the files to compile.

    hopper: only the fused products for Hopper, over hopper_on_cpu.h; else all the others.
    """
    target = folder / "csrc" / "cuda"
    target.mkdir(parents=True)
    for header in CSRC.glob("*.h"):
        (target.parent / header.name).write_text(header.read_text())
    sources = []
    for source in sorted((CSRC / "cuda").iterdir()):
        if any(part in source.name for part in NOT_EMULATED):
            continue
        if source.suffix == ".h" and source.name != "libtorch_cuda.h":
            (target / source.name).write_text(source.read_text())
        elif source.suffix == ".cuh" and source.name not in ("sm90.cuh", "wgmma.cuh", "dependent_launch.cuh"):
            (target / source.name).write_text('#include "cuda_on_cpu.h"\n' + translate(source.read_text()))
        elif source.suffix == ".cu" and hopper == ("sm90" in source.name):
            path = target / source.with_suffix(".cpp").name
            path.write_text('#include "cuda_on_cpu.h"\n' + translate(source.read_text()))
            sources.append(path)
    (target / "dependent_launch.cuh").write_text(Path(__file__).with_name("dependent_launch.cuh").read_text())
    (target / "sm90.cuh").write_text('#include "decode.cuh"\n#include "hopper_on_cpu.h"\n')
    maps = (CSRC / "cuda" / "tensor_map.h").read_text()
    (target / "tensor_map.h").write_text(maps[: maps.index("inline cudaError_t encode(")] + ENCODE)
    return sources


NOT_EMULATED = ("linear_backward_sm90",)

# What encode of tensor_map.h asks of the driver
ENCODE = """
inline cudaError_t encode(const TileMap& tile, CUtensorMap* map) {
  const auto misaligned = [](uint64_t n) { return n % 16 != 0; };
  if (misaligned(reinterpret_cast<uintptr_t>(tile.data)) || misaligned(tile.pitch)) return cudaErrorInvalidValue;
  const uint32_t element = tile.type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1
                           : tile.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  if (tile.box_rows > 256 || tile.box_columns > 256) return cudaErrorInvalidValue;
  *reinterpret_cast<emulated::Map*>(map) = {static_cast<char*>(const_cast<void*>(tile.data)),
      tile.columns, tile.rows, tile.pitch, tile.box_columns, tile.box_rows, element,
      tile.swizzled ? tile.box_columns * element : 0};
  return cudaSuccess;
}

}  // namespace qlora_engine::cuda
"""
