"""Builds qlora_engine/_C.so with g++ and nvcc on LibTorch's stable ABI; torch itself is never imported here.

QLORA_ENGINE_BUILD_CUDA = auto (default: CUDA operators if nvcc is found) | 1 (fail without nvcc) | 0 (CPU only)
QLORA_ENGINE_BUILD = auto (default: compile if torch's headers and g++ are found) | 0 (pure Python)
CUDA_HOME, TORCH_CUDA_ARCH_LIST (default "8.0;9.0a;9.0+PTX"), MAX_JOBS, CXX and NVCC_APPEND_FLAGS are honoured.

One file per object, compiled in parallel, and only when its text, a header, or the command changed.
"""

import concurrent.futures
import hashlib
import importlib.machinery
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11: the oldest torch whose stable ABI has what we use
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"
ON, OFF = ("1", "on", "true", "yes"), ("0", "off", "false", "no")


def find_torch():
    """The installed torch's folder. Under pip's build isolation sys.path is an overlay, but sysconfig still
    names the target environment's site-packages."""
    paths = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", [p for p in paths if p])
    if spec and spec.origin:
        root = Path(spec.origin).parent
        if (root / "include/torch/csrc/stable/library.h").exists():
            return root
    return None


def find_cuda():
    """The toolkit's folder, or None and why. nvcc on PATH may be a wrapper script, so nvcc is asked for its root."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        named = os.environ.get(variable)
        if named:  # what was asked for by name is not replaced by something else that happens to be there
            found = (Path(named) / "bin/nvcc").exists()
            return (Path(named), None) if found else (None, f"nvcc: {variable}={named} has no bin/nvcc")
    nvcc = shutil.which("nvcc")
    if nvcc:
        done = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        for line in done.stderr.splitlines():
            if "TOP=" in line:
                return Path(line.split("TOP=", 1)[1].strip()).resolve(), None
    standard = Path("/usr/local/cuda")
    return (standard, None) if (standard / "bin/nvcc").exists() else (None, "nvcc (install the CUDA toolkit)")


def plan():
    """What will be built: (torch, cuda or None, one-line reason why not more). SystemExit if more was asked for."""
    want_cuda = os.environ.get("QLORA_ENGINE_BUILD_CUDA", os.environ.get("FORCE_CUDA", "auto")).lower()
    if want_cuda not in (*ON, *OFF, "auto"):
        raise SystemExit(f"qlora_engine: QLORA_ENGINE_BUILD_CUDA={want_cuda!r}; expected auto, 1 or 0")
    if os.environ.get("QLORA_ENGINE_BUILD", "auto").lower() in OFF:
        return None, None, "QLORA_ENGINE_BUILD=0 asked for the pure-Python package"
    torch, cxx = find_torch(), shutil.which(os.environ.get("CXX", "g++"))
    missing = []
    if torch is None:
        missing.append("torch >= 2.11 in the environment that is installed into (pip install torch first)")
    if cxx is None:
        missing.append("a C++20 compiler (g++ >= 11)")
    cuda, no_cuda = (None, "QLORA_ENGINE_BUILD_CUDA=0") if want_cuda in OFF else find_cuda()
    if cuda is None and want_cuda in ON:
        missing.append(no_cuda)
    if missing:
        reason = "missing " + ", ".join(missing)
        if want_cuda in ON:
            raise SystemExit(f"qlora_engine: QLORA_ENGINE_BUILD_CUDA=1, but {reason}.")
        return None, None, reason
    if cuda is None:
        return torch, None, no_cuda if want_cuda in OFF else f"missing at build time: {no_cuda}"
    return torch, cuda, None


def architecture_flags():
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES).replace(" ", ";").split(";"):
        if not arch:
            continue
        number = arch.removesuffix("+PTX").replace(".", "")
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
            if number == "90" and "9.0a" in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES):
                continue  # the 9.0a code serves that card; only the PTX for later ones is added
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    return flags


class Build(build_ext):
    def get_ext_filename(self, name):  # a plain .so: there is no PyInit_ in it, torch.ops loads it
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext):
        torch, cuda, _ = PLAN
        objects_dir = Path(self.build_temp)
        objects_dir.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        common = [
            "-std=c++20",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            "-isystem",
            str(torch / "include"),
        ]
        common += ["-I", str(ROOT / "csrc")]
        host = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
        host += ["-fno-math-errno"]  # a square root that sets errno cannot be vectorised
        host += ["-Wno-maybe-uninitialized"]  # gcc 12 sees it in its own AVX-512 headers
        if cuda:
            common += ["-DUSE_CUDA", "-DQLORA_ENGINE_CUDA", "-isystem", str(cuda / "include")]
        headers = hashlib.sha256()
        for header in sorted(ROOT.glob("csrc/**/*.h")) + sorted(ROOT.glob("csrc/**/*.cuh")):
            headers.update(header.read_bytes())
        commands, objects = [], []
        for source in ext.sources:
            obj = objects_dir / (source.replace("/", "_") + ".o")
            objects.append(str(obj))
            if source.endswith(".cu"):
                nvcc = [str(cuda / "bin/nvcc"), "-O3", "-lineinfo", *architecture_flags(), "-Xcompiler"]
                command = [*nvcc, "-fPIC,-fvisibility=hidden", *common]
            else:
                command = [cxx, *host, *common]
            command += ["-c", str(ROOT / source), "-o", str(obj)]
            stamp = hashlib.sha256((ROOT / source).read_bytes())
            stamp.update(headers.digest() + shlex.join(command).encode())
            stamp.update(str((torch / "version.py").read_bytes()).encode())
            commands.append((command, obj, obj.with_suffix(".stamp"), stamp.hexdigest()))

        def compile_one(item):
            command, obj, stamp_file, stamp = item
            if obj.exists() and stamp_file.exists() and stamp_file.read_text() == stamp:
                return
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
            stamp_file.write_text(stamp)

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, commands))
        link = [cxx, "-shared", *objects, "-o", str(out), "-Wl,--no-as-needed", f"-L{torch / 'lib'}"]
        link += ["-lc10", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
        if cuda:
            # static: the CUDA runtime's shared object may be absent, or of another version, where this is loaded
            library = next(p for p in (cuda / "lib64", cuda / "lib") if (p / "libcudart_static.a").exists())
            link += [f"-L{library}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        subprocess.run(link, check=True)

    def run(self):
        super().run()
        # `qlora env` reads this: what was built, and why not more
        base = Path(self.get_ext_fullpath("qlora_engine._C")).parent
        base.mkdir(parents=True, exist_ok=True)
        (base / "_build.json").write_text(json.dumps(build_record(), indent=1) + "\n")


def build_record():
    torch, cuda, reason = PLAN
    return {
        "compiled": torch is not None,
        "cuda": cuda is not None,
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES) if cuda else "",
        "reason": reason,
    }


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = PLAN[0] is None

    def get_tag(self):  # no Python symbols inside: one wheel for every Python
        return ("py3", "none", "any") if self.root_is_pure else ("py3", "none", super().get_tag()[2])


class PureBuild(build_ext):
    """Writes the record that says why nothing was compiled."""

    def run(self):
        target = ROOT if self.inplace else Path(self.build_lib)
        (target / "qlora_engine").mkdir(parents=True, exist_ok=True)
        (target / "qlora_engine/_build.json").write_text(json.dumps(build_record(), indent=1) + "\n")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


PLAN = plan()
if PLAN[2]:
    print(f"qlora_engine: building without {'CUDA' if PLAN[0] else 'any'} kernels: {PLAN[2]}", file=sys.stderr)


def sources():
    found = sorted(ROOT.glob("csrc/*.cpp")) + sorted(ROOT.glob("csrc/cpu/*.cpp"))
    if PLAN[1]:
        # kernels by nvcc; their torch bindings by g++, which reads torch's headers several times faster
        found += sorted(ROOT.glob("csrc/cuda/*.cu")) + sorted(ROOT.glob("csrc/cuda/*.cpp"))
    return [str(p.relative_to(ROOT)) for p in found]


setup(
    ext_modules=[Extension("qlora_engine._C", sources())] if PLAN[0] else [Extension("qlora_engine._pure", [])],
    cmdclass={"build_ext": Build if PLAN[0] else PureBuild, "bdist_wheel": Wheel},
)
