"""What a run needs of memory at the least, from the headers of the model's files, before anything is loaded."""

import json
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

from qlora_engine.training.errors import MemoryShortage, ModelError

GIB = 2**30
# bytes an adapter's parameter takes in training: float32 value and gradient, two float32 moments of AdamW
ADAPTER_TRAINING_BYTES = 16
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
# parts of the names of matrices that stay in 16 bits, embeddings and output heads, unless the latter are asked for
UNQUANTIZED = ("embed", "lm_head", "wte", "wpe", "shared.", "score.", "classifier")
EMBEDDINGS, HEADS = ("embed_tokens", "embed_in", "word_embeddings", "wte"), ("lm_head", "embed_out")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model and its training state take at the least; activations come on top.

    Attributes:
        quantized: 4-bit matrices with their scales.
        rest: embeddings, head and norms in the compute dtype, unless they are quantized.
        adapter: adapters, with gradients and optimizer state where they are trained.
        transient: the largest matrix in its stored dtype, alive while it is quantized.
    """

    quantized: int
    rest: int
    adapter: int
    transient: int

    @property
    def total(self) -> int:
        return self.quantized + self.rest + self.adapter + self.transient

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.1f} GiB at the least (4-bit weights {self.quantized / GIB:.1f}, the rest "
            f"{self.rest / GIB:.1f}, adapters with gradients and optimizer {self.adapter / GIB:.1f})"
        )


def tensor_headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor in a folder; only the headers are read.

    Raises:
        ModelError: naming the file that is not a safetensors file.
    """
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > file.stat().st_size:
                    raise ValueError("the header is longer than the file")
                header = json.loads(stream.read(length))
            entries = {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items() if name != "__metadata__"}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from error
        found.update(entries)
    return found


def estimate(
    folder: str | Path,
    *,
    compute_bytes: int,
    r: int,
    blocksize: int,
    double_quant: bool,
    quantize_embeddings: bool = False,
    quantize_head: bool = False,
) -> MemoryNeed:
    """The least memory that fine-tuning (r > 0) or loading (r = 0) a model needs.

    Args:
        folder: a Hugging Face folder, in 16 bits or quantized by this engine.
        compute_bytes: bytes an element of the unquantized tensors takes once loaded.
        r: rank of adapters on all linear layers; 0: none.
        blocksize, double_quant, quantize_embeddings, quantize_head: of the quantization.
    """
    from qlora_engine.quantization.codebook import bits_per_weight

    quantized = rest = adapter = transient = 0
    bytes_per_weight = bits_per_weight(blocksize, double_quant) / 8
    asked_for = EMBEDDINGS * quantize_embeddings + HEADS * quantize_head
    for name, (dtype, shape) in tensor_headers(folder).items():
        count = 1
        for size in shape:
            count *= size
        stored = count * DTYPE_BYTES.get(dtype, 4)
        if dtype == "U8":
            quantized += stored
        elif len(shape) == 2 and name.endswith("weight") and (_has(name, asked_for) or not _has(name, UNQUANTIZED)):
            quantized += int(count * bytes_per_weight)
            adapter += 0 if _has(name, asked_for) else r * sum(shape) * ADAPTER_TRAINING_BYTES
            transient = max(transient, stored)
        else:
            rest += count * compute_bytes
    return MemoryNeed(quantized, rest, adapter, transient)


def _has(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)


def available_memory(device: str) -> int:
    """Bytes that this process may still take on a device: "cpu", or a CUDA device."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    limits = [psutil.virtual_memory().available]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - psutil.Process().memory_info().vms)
    limits += _cgroup_limits()
    return max(0, min(limits))


def check_memory(need: MemoryNeed, device: str) -> None:
    """Refuses a run that cannot fit.

    Raises:
        MemoryShortage: with both figures and what could be done.
    """
    free = available_memory(device)
    if need.total > free:
        raise MemoryShortage(
            f"too little memory on {device}: the model needs {need}, and {free / GIB:.1f} GiB are free; "
            "choose a smaller model, a lower --r, or another --device"
        )


def peak_memory(device: str) -> dict[str, int]:
    """Peak bytes of this process: resident on the CPU, and allocated by torch on a CUDA device."""
    peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device != "cpu":
        import torch

        peaks[device] = torch.cuda.max_memory_allocated(device)
    return peaks


def _cgroup_limits() -> list[int]:
    """What a container's memory limit leaves; page cache that could be dropped counts as free."""
    places = (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit_file, usage_file, cache_key in places:
        try:
            limit = int((Path(folder) / limit_file).read_text())
            usage = int((Path(folder) / usage_file).read_text())
            stat = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such controller, or "max"
            continue
        return [limit - usage + int(stat.get(cache_key, 0))]
    return []
