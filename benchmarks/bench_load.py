"""Loading a 16-bit model from safetensors into 4 bits: bytes a second beside what disk and bus give.

    python benchmarks/bench_load.py
    python benchmarks/bench_load.py --layers 8 --folder /mnt/fast

Writes some decoder layers of Llama-3-8B's shapes with random weights into a folder, several files, and reads them:
as plain bytes ("disk"), as tensors on the device ("stream"), and as a quantized model (`load_quantized`); beside that
safetensors' own loader and transformers' with bitsandbytes. "cold" is read after the system was asked to drop the
files from its cache, "cached" directly afterwards. "of bound" is relative to the slower of disk and bus.
"""

import gc
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_scale
import harness
import peers
import torch

import qlora_engine as qe
from qlora_engine.models.shards import find_shards
from qlora_engine.models.streaming import PIECE, READERS, stream

SHARD = "1GB"


def write_model(folder: Path, layers: int, quick: bool) -> None:
    """A transformers folder, in bfloat16."""
    from transformers import LlamaForCausalLM

    sizes = bench_scale.MODELS["tiny" if quick else "8B"]
    config = bench_scale.configuration(bench_scale.Shapes(layers, *list(vars(sizes).values())[1:]), 4096)
    config.vocab_size = 1024  # the layers are what is to be read
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).random_(0, 60)  # as bfloat16: small numbers, none of them NaN
    model.save_pretrained(folder, max_shard_size=SHARD)


def drop_cache(folder: Path) -> None:
    """Asks the system to forget the files' content."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(folder: Path) -> None:
    """Reads every file with as many threads, and pieces as large, as the loader does."""
    pieces = [(f, first) for f in folder.glob("*.safetensors") for first in range(0, f.stat().st_size, PIECE)]

    own = threading.local()

    def read(piece):
        file, first = piece
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(PIECE)
        with open(file, "rb", buffering=0) as opened:
            opened.seek(first)
            return opened.readinto(own.buffer)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, pieces))


def stream_all(folder: Path, device: str) -> None:
    for _, tensor in stream(find_shards(folder).tensors(), device):
        del tensor


def with_safetensors(folder: Path, device: str) -> None:
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        load_file(file, device=device)


def with_bitsandbytes(folder: Path, device: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": device})


def contenders(device: str) -> dict:
    """Name -> function of folder and device."""
    found = {
        "disk": lambda folder, _: read_bytes(folder),
        "stream": stream_all,
        "load_quantized": lambda folder, device: qe.load_quantized(folder, device=device, progress=False),
        "safetensors, 16 bits": with_safetensors,
    }
    if device == "cuda" and peers.bitsandbytes_functional():
        found["transformers with bitsandbytes"] = with_bitsandbytes
    return found


def bus_rate() -> float:
    """GB/s of copies from page-locked memory to the GPU."""
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * source.nbytes / (time.perf_counter() - began) / 1e9


def measure(name, load, folder: Path, device: str) -> dict:
    """One row: cold and cached."""
    nbytes = find_shards(folder).nbytes
    row = {"case": name, "gb": nbytes / 1e9}
    for state in ("cold", "cached"):
        if state == "cold":
            drop_cache(folder)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        load(folder, device)
        if device == "cuda":
            torch.cuda.synchronize()
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row[state] = nbytes / (time.perf_counter() - began) / 1e9
    return row


def main() -> int:
    p = harness.parser(*__doc__.split("\n\n", 1))
    p.add_argument("--layers", type=int, default=16, help="decoder layers, 0.44 GB each")
    p.add_argument("--folder", type=Path, help="where to write the model (default: a temporary folder)")
    args = p.parse_args()
    quick = args.quick or args.device == "cpu"
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_model(folder, args.layers, quick)
        rows = [measure(name, load, folder, args.device) for name, load in contenders(args.device).items()]
    rates = {"bus": bus_rate()} if args.device == "cuda" else {}
    for row in rows[1:]:
        for state in ("cold", "cached"):
            row[f"{state}_of_bound"] = row[state] / min([rows[0][state], *rates.values()])
    columns = {"case": "loader", "gb": "GB", "cold": "GB/s cold", "cold_of_bound": "of bound"}
    columns |= {"cached": "GB/s cached", "cached_of_bound": "of bound", "peak_gb": "peak GB"}
    print(rates)
    print(harness.table(rows, columns))
    harness.write_json(args.out / f"bench_load_{harness.slug(args.device)}.json", args.device, rows, rates=rates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
