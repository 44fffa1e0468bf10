"""Which kernel serves which case on a device, and why not a faster one: a part of `qlora env`."""

import os

# rows of x of a 4096 x 4096 product that `collect` asks about
ROWS = (1, 16, 64, 512, 2048, 8192)
HOPPER = (9, 0)
VARIABLES = ("BACKEND", "LINEAR", "LORA", "CPU", "BACKWARD", "CACHE")


def collect(device: str) -> list[dict]:
    """Rows of `case`, `served_by` and `why_not` (None where nothing faster exists) for "cpu" or "cuda:N"."""
    return _cpu() if device == "cpu" else _cuda(device)


def variables() -> dict[str, str]:
    """The environment variables of this library that are set."""
    names = [f"QLORA_ENGINE_{name}" for name in VARIABLES]
    return {name: os.environ[name] for name in names if name in os.environ}


def _row(case: str, served_by: str, why_not: str | None = None) -> dict:
    return {"case": case, "served_by": served_by, "why_not": why_not}


def _why_no_operators(device: str) -> str | None:
    """Why the compiled operators do not serve a device, or None where they do."""
    from qlora_engine.ops import backend

    if backend.implementation("dequantize_nf4", device) == "compiled":
        return None
    reason = backend.library_error() or backend.build_info().get("reason")
    return (
        reason or "the library was built without the CUDA operators: QLORA_ENGINE_BUILD_CUDA=1 says what is missing"
    )


def _cpu() -> list[dict]:
    from qlora_engine.ops import backend

    missing = _why_no_operators("cpu")
    if missing:
        return [_row("everything", "the pure-PyTorch reference", missing)]
    kernels = backend.cpu_kernels()
    if kernels is None:
        return [
            _row("everything", "nothing", f"QLORA_ENGINE_CPU={os.environ.get('QLORA_ENGINE_CPU')} cannot run here")
        ]
    whys = {
        "baseline": "the processor has no AVX2",
        "avx2": "the processor has no AVX-512",
        "avx512": "the processor has no instructions for bfloat16 products",
    }
    forced = os.environ.get("QLORA_ENGINE_CPU")
    why = f"QLORA_ENGINE_CPU={forced}" if forced else whys.get(kernels)
    narrow = "the processor has no instructions for bfloat16" if kernels != "avx512bf16" else None
    return [
        _row("quantize, dequantize, AdamW", f"C++, {kernels}", None if kernels.startswith("avx512") else why),
        _row("products, float32 x", f"C++, {kernels}", None if kernels.startswith("avx512") else why),
        _row("products, bfloat16 x", f"C++, {kernels}", (forced and why) or narrow),
        _row("adapters' narrow products", "torch's matrix products", None),
        _row("products, float16 x", "converted to float32", "processors have no products of float16"),
    ]


def _cuda(device: str) -> list[dict]:
    import torch

    missing = _why_no_operators("cuda")
    if missing:
        return [_row("everything", "the pure-PyTorch reference", missing)]
    rows = [_row("quantize, dequantize", "CUDA")]
    capability = torch.cuda.get_device_capability(device)
    rows += _products(device, capability)
    rows.append(_row("products, float32 x", "dequantize, then cuBLAS", "tensor cores take float16 and bfloat16 here"))
    rows.append(
        _row("products, blocks of 32", "dequantize, then cuBLAS", "the fused kernels take blocks of 64 or more")
    )
    rows.append(_adapters())
    rows.append(_paging(device))
    return rows


def _products(device: str, capability: tuple[int, int]) -> list[dict]:
    import torch

    from qlora_engine.ops.linear import linear_path

    names = {"few rows": "CUDA, reads the packed weight"}
    names |= dict.fromkeys(("levels", "fused", "fused sm80"), "CUDA, tensor cores on the packed weight")
    found: list[dict] = []
    paths = {rows: linear_path(rows, 4096, 4096, torch.bfloat16, device=device).name for rows in ROWS}
    fused = paths[64] in ("levels", "fused")
    for rows, path in paths.items():
        found.append(_row(f"products, {rows} rows of 16-bit x", names.get(path, "dequantize, then cuBLAS")))
        if path == "dequantize":
            found[-1]["why_not"] = _why_decoded(fused, capability)
    return found


def _why_decoded(fused: bool, capability: tuple[int, int]) -> str:
    if os.environ.get("QLORA_ENGINE_LINEAR") == "dequantize":
        return "QLORA_ENGINE_LINEAR=dequantize"
    if capability != HOPPER:
        return f"the kernel for many rows is for compute capability 9.0; this is {capability[0]}.{capability[1]}"
    if not fused:
        return "the library was built without sm_90a: see TORCH_CUDA_ARCH_LIST"
    return "measured: decoding once and cuBLAS is faster"


def _adapters() -> dict:
    from qlora_engine import kernels

    choice = os.environ.get("QLORA_ENGINE_LORA", "auto")
    case = "adapters' narrow products"
    if kernels.why_not():
        return _row(case, "the pure-PyTorch reference", kernels.why_not())
    if choice != "auto":
        return _row(case, "Triton" if choice == "triton" else "cuBLAS", f"QLORA_ENGINE_LORA={choice}")
    return _row(case, "Triton or cuBLAS, by size")


def _paging(device: str) -> dict:
    import torch

    from qlora_engine.ops import host_memory

    case = "PagedAdamW's state in host memory"
    if host_memory.concurrent_managed_access(torch.device(device)):
        return _row(case, "CUDA, managed memory")
    return _row(case, "CUDA, pinned memory", "host and device may not use managed memory at the same time here")
