"""Compiles the emulated kernels: the files side by side, and once for all processes of a test run."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.emulation.translate import write_sources

HERE = Path(__file__).parent


def cuda_headers() -> Path | None:
    """A folder with cuda_fp16.h."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    homes += [Path(nvcc).resolve().parents[1] if nvcc else None, *sorted(Path("/usr/local").glob("cuda*"))]
    includes = [Path(home) / "include" for home in homes if home]
    return next((p for p in includes if (p / "cuda_fp16.h").exists()), None)


HEADERS, COMPILER = cuda_headers(), shutil.which(os.environ.get("CXX", "g++"))
# what the GPU refuses must not pass here
ALIGNED = ["-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all"]
needs_compiler = pytest.mark.skipif(not (HEADERS and COMPILER), reason="needs g++ and the CUDA toolkit's headers")


def build(
    tmp_path_factory, entry: str, options: Sequence[str], hopper: bool = False, only: str | None = None
) -> ctypes.CDLL:
    """The library of an entry file and the translated kernels.

    Args:
        entry: a file of this folder.
        options: of the compiler, besides the usual ones.
        hopper: translate the kernels for compute capability 9.0.
        only: the one kernel file to take, as in "adamw.cpp".
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"emulation_{Path(entry).stem}"
    folder.mkdir(exist_ok=True)
    library = folder / "kernels.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = [s for s in write_sources(folder, hopper=hopper) if only in (None, s.name)]
            _compile([HERE / entry, *sources], options, folder, library)
    return ctypes.CDLL(str(library))


def _compile(sources: list[Path], options: Sequence[str], folder: Path, library: Path) -> None:
    command = [COMPILER, "-std=c++20", "-fPIC", "-ffp-contract=off", "-Wno-attributes", *options]
    command += ["-I", str(HERE), "-I", str(folder), "-isystem", str(HEADERS)]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def one(source: Path, target: Path) -> None:
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sources, objects))
    # its own stand-ins for CUDA's functions, also where the process has a CUDA runtime
    link = [COMPILER, "-shared", "-Wl,-Bsymbolic", *(o for o in options if o.startswith("-f"))]
    made = library.with_suffix(".new")
    subprocess.run([*link, *map(str, objects), "-o", str(made)], check=True)
    made.rename(library)
