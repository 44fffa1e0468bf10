"""Reading safetensors in pieces: every dtype and odd size, damage, order, and what is held at a time."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from qlora_engine.models import streaming
from qlora_engine.models.streaming import checksums_of, stored_tensors, stream

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def some_tensors() -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    found = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    for index, dtype in enumerate(DTYPES):
        raw = torch.randint(0, 2 if dtype == torch.bool else 100, (7 + 50 * index, 13), generator=numbers)
        found[f"layer.{index}"] = raw.to(dtype)
    return found


@pytest.fixture
def pieces_of_1000_bytes(monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 1000)


@pytest.fixture
def file(tmp_path, pieces_of_1000_bytes):
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata=checksums_of(tensors))
    return path


def test_every_tensor_arrives_whole(file, device):
    expected = some_tensors()
    found = dict(stream(stored_tensors(file), device))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.device.type == device
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_files_without_checksums_are_read(tmp_path, pieces_of_1000_bytes):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "b.safetensors")
    assert all(torch.equal(t, tensors[n]) for n, t in stream(stored_tensors(tmp_path / "b.safetensors")))


def test_a_changed_byte_is_found_and_named(file):
    stored = {tensor.name: tensor for tensor in stored_tensors(file)}["layer.3"]
    content = bytearray(file.read_bytes())
    content[stored.first + 2345] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors: bytes 2000 to 3000 of the tensor layer\.3 are not those"):
        dict(stream(stored_tensors(file)))


def test_a_file_cut_short_is_named_with_its_tensor(file):
    last = stored_tensors(file)[-1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"cut short.*ends within the tensor {last.name}"):
        stored_tensors(file)


def test_a_file_cut_short_while_it_is_read_is_named(file):
    stored = stored_tensors(file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"ends within the tensor {stored[-1].name}"):
        dict(stream(stored))


HEADERS = {
    "no header": b"",
    "long header": struct.pack("<Q", 1 << 40) + b"{}",
    "no json": struct.pack("<Q", 2) + b"{x",
    "a list": struct.pack("<Q", 2) + b"[]",
    "another dtype": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
    "another size": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    "a negative offset": {"dtype": "U8", "shape": [2], "data_offsets": [-2, 0]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "checksums of another kind": {"__metadata__": {"crc32": "[1]"}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_explained(tmp_path, case):
    content = HEADERS[case]
    if isinstance(content, dict):
        entries = content if "__metadata__" in content else {"a": content}
        entries = {"b": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, **entries}
        text = json.dumps(entries).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(16)
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.safetensors cannot be read \(damaged or cut short\)"):
        stored_tensors(tmp_path / "c.safetensors")


def test_two_tensors_at_a_time(file, monkeypatch):
    """The one that is asked for, and the next: no reading ahead of those."""
    started, original = [], streaming._Reader.start

    def start(reader, pool, stored):
        started.append(stored.name)
        return original(reader, pool, stored)

    monkeypatch.setattr(streaming._Reader, "start", start)
    for count, _ in enumerate(stream(stored := stored_tensors(file)), 1):
        assert len(started) == min(count + 1, len(stored))


def test_a_reader_left_early_ends_its_threads(file):
    tensors = stream(stored_tensors(file))
    next(tensors)
    tensors.close()
    import threading

    assert not [t for t in threading.enumerate() if t.name.startswith("read safetensors") and t.is_alive()]


@pytest.mark.gpu
def test_bounded_memory_on_a_gpu(tmp_path):
    """Sixteen tensors of 24 MiB and one of 96: two of them, and page-locked buffers, at a time."""
    size = 24 << 20
    tensors = {f"{i}": torch.randint(256, (size * (4 if i == 9 else 1),), dtype=torch.uint8) for i in range(16)}
    save_file(tensors, tmp_path / "large.safetensors", metadata=checksums_of(tensors))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for name, tensor in stream(stored_tensors(tmp_path / "large.safetensors"), "cuda"):
        tensor.bitwise_xor_(0)  # work that the memory's next user must wait for
        assert torch.equal(tensor.cpu(), tensors[name])
        del tensor
    assert torch.cuda.max_memory_allocated() - before <= 5 * size + (1 << 20)
