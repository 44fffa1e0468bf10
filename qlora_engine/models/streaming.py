"""Tensors of safetensors files onto a device: read in pieces by several threads, the next tensor while one is used.

A GPU gets each piece through page-locked memory: every reader has two buffers and reads into one while the other's
copy is under way. On the device there are never more than two tensors, the one in use and the one that arrives; in
host memory, 2 x READERS pieces. A CPU's tensors are read into their own memory.
"""

import json
import math
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

PIECE = 32 << 20  # bytes; also what a checksum is of
READERS = 4
LARGEST_HEADER = 100 << 20  # the format's own limit
CHECKSUMS = "crc32"  # key in a file's metadata
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        path: the file.
        name: the tensor's.
        dtype, shape: its.
        first: its first byte in the file.
        nbytes: its size.
        checksums: CRC-32 of each PIECE of it, or None where the file has none.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    nbytes: int
    checksums: tuple[int, ...] | None


def stored_tensors(path: Path) -> list[Stored]:
    """The tensors of a safetensors file in the order of their bytes; only its header is read.

    Raises:
        ValueError: names the file, and the tensor within which it ends where it was cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            (length,) = struct.unpack("<Q", start) if len(start) == 8 else (size,)
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError("its header is not whole")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        checksums = json.loads(metadata.get(CHECKSUMS, "{}"))
        found = [_stored(path, name, entry, 8 + length, checksums.get(name)) for name, entry in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read (damaged or cut short): {error}") from error
    for tensor in sorted(found, key=lambda one: one.first):
        if tensor.first + tensor.nbytes > size:
            raise ValueError(
                f"{path} cannot be read (damaged or cut short): it has {size} bytes and ends within the tensor "
                f"{tensor.name}, which ends at byte {tensor.first + tensor.nbytes}; download or save it again"
            )
    return sorted(found, key=lambda one: one.first)


def _stored(path: Path, name: str, entry: dict, start: int, checksums: list[int] | None) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the tensor {name} is {entry['dtype']}; known are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the tensor {name} of {list(shape)} {entry['dtype']} has {end - begin} bytes")
    return Stored(path, name, dtype, shape, start + begin, end - begin, checksums and tuple(checksums))


def checksums_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Metadata for a file of contiguous CPU tensors, by which `stream` tells whether its bytes are what was saved."""
    found = {}
    for name, tensor in tensors.items():
        data = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
        found[name] = [zlib.crc32(data[first : first + PIECE]) for first in range(0, len(data), PIECE)]
    return {CHECKSUMS: json.dumps(found)}


def stream(tensors: Sequence[Stored], device: torch.device | str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, one after another, on a device; each has memory of its own.

    A caller that lets go of each tensor before it asks for the next keeps two on the device at most.

    Raises:
        ValueError: names the file and the tensor, where bytes are missing or are not those that were saved.
    """
    device = torch.device(device or "cpu")
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read safetensors")
    reader = _GpuReader(device) if device.type == "cuda" else _Reader(device)
    try:
        coming = reader.start(pool, tensors[0]) if tensors else None
        for index, stored in enumerate(tensors):
            current = coming
            coming = reader.start(pool, tensors[index + 1]) if index + 1 < len(tensors) else None
            tensor = reader.finish(current)
            del current
            yield stored.name, tensor
            del tensor
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


class _Coming(NamedTuple):
    """A tensor whose pieces are being read."""

    stored: Stored
    data: torch.Tensor  # uint8 [nbytes]
    pieces: list[Future]


class _Reader:
    """Reads into CPU memory."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self, pool: ThreadPoolExecutor, stored: Stored) -> _Coming:
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        view = memoryview(data.numpy())
        pieces = [
            pool.submit(_read, stored, first, view[first : first + PIECE]) for first in range(0, stored.nbytes, PIECE)
        ]
        return _Coming(stored, data, pieces)

    def close(self) -> None:
        pass

    def finish(self, coming: _Coming) -> torch.Tensor:
        for piece in coming.pieces:
            piece.result()
        return coming.data.view(coming.stored.dtype).view(coming.stored.shape).to(self.device)


class _GpuReader:
    """Reads through page-locked buffers into a GPU's memory, on a stream of its own for each reader."""

    def __init__(self, device: torch.device):
        self.device = device
        self.own = threading.local()

    def start(self, pool: ThreadPoolExecutor, stored: Stored) -> _Coming:
        with torch.cuda.device(self.device):
            data = torch.empty(stored.nbytes, dtype=torch.uint8, device=self.device)
            ready = torch.cuda.Event()
            ready.record()  # whoever had this memory before is done with it
        pieces = [
            pool.submit(self._on_device, stored, first, data, ready) for first in range(0, stored.nbytes, PIECE)
        ]
        return _Coming(stored, data, pieces)

    def close(self) -> None:
        """Waits for the copies of a tensor that nobody will ask for: its memory is about to be another's."""
        torch.cuda.synchronize(self.device)

    def finish(self, coming: _Coming) -> torch.Tensor:
        for piece in coming.pieces:
            torch.cuda.current_stream(self.device).wait_event(piece.result())
        return coming.data.view(coming.stored.dtype).view(coming.stored.shape)

    def _on_device(self, *arguments) -> torch.cuda.Event:
        with torch.cuda.device(self.device):  # a new thread's is the first GPU
            return self._piece(*arguments)

    def _piece(self, stored: Stored, first: int, data: torch.Tensor, ready: torch.cuda.Event) -> torch.cuda.Event:
        own = self.own
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self.device)
            own.buffers = [[torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), None] for _ in range(2)]
        own.buffers.reverse()
        buffer, copied = own.buffers[0]
        if copied is not None:
            copied.synchronize()
        count = min(PIECE, stored.nbytes - first)
        _read(stored, first, memoryview(buffer.numpy())[:count])
        with torch.cuda.stream(own.stream):
            own.stream.wait_event(ready)
            data[first : first + count].copy_(buffer[:count], non_blocking=True)
            own.buffers[0][1] = copied = torch.cuda.Event()
            copied.record()
        return copied


def _read(stored: Stored, first: int, target: memoryview) -> None:
    """Fills a view with the bytes of a tensor from its byte `first` on, and checks them."""
    done = 0
    with open(stored.path, "rb", buffering=0) as file:
        file.seek(stored.first + first)
        while done < len(target):
            count = file.readinto(target[done:])
            if not count:
                raise ValueError(f"{stored.path} ends within the tensor {stored.name}; something has cut it short")
            done += count
    if stored.checksums is not None and zlib.crc32(target) != stored.checksums[first // PIECE]:
        raise ValueError(
            f"{stored.path}: bytes {first} to {first + len(target)} of the tensor {stored.name} are not those that "
            "were saved; copy or download the file again"
        )
