"""A crash leaves what was there before."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_engine.models import files
from qlora_engine.models.files import atomic_directory, atomic_files, atomic_write


class Crash(Exception):
    pass


@pytest.fixture
def no_rename(monkeypatch):
    """The exchange itself fails, as on a full or vanished disk."""

    def replace(source, target):
        raise Crash

    monkeypatch.setattr(os, "replace", replace)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_write(tmp_path):
    with atomic_write(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert (tmp_path / "deep" / "a.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(Crash), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise Crash
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_crash_while_exchanging_leaves_the_old_file(tmp_path, no_rename):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(Crash), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_files_move_in_together_and_others_stay(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(Crash), atomic_files(tmp_path) as folder:
        (folder / "a").write_text("half")
        raise Crash
    assert (tmp_path / "a").read_text() == "old"
    with atomic_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
    assert names(tmp_path) == ["a", "b", "kept"]
    assert (tmp_path / "a").read_text() == "new"


def test_directory_replaces_what_it_names_and_keeps_the_rest(tmp_path):
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "model-1.safetensors").write_text("old")
        (folder / "notes.md").write_text("mine")
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("mine")
    with atomic_directory(target, replaces=("*.safetensors",)) as folder:
        (folder / "model.safetensors").write_text("new")
    assert names(target) == ["model.safetensors", "notes.md", "sub"]
    assert (target / "sub" / "x").read_text() == "mine"
    with atomic_directory(target) as folder:
        (folder / "only").write_text("new")
    assert names(target) == ["only"]
    assert names(tmp_path) == ["model"]


REPLACE_UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from qlora_engine.models.files import atomic_directory

for turn in itertools.count():
    with atomic_directory(sys.argv[1]) as folder:
        for name in "abc":
            (folder / name).write_text(str(turn))
    print(turn, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange in one step is Linux's")
def test_at_every_moment_the_directory_is_whole(tmp_path):
    """Another process replaces the folder again and again, and is killed: what is seen is always one whole turn."""
    target = tmp_path / "model"
    command = [sys.executable, "-c", REPLACE_UNTIL_KILLED, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stdout.readline() == b"0\n"
            last, deadline = 0, time.monotonic() + 60
            while last < 30 and time.monotonic() < deadline:
                assert read_whole(target) >= last
                last = read_whole(target)
        finally:
            process.kill()
    assert last >= 30
    assert read_whole(target) >= last


def read_whole(target):
    """The turn that wrote the folder, read through one handle, which a replacement does not change."""
    while True:
        handle = os.open(target, os.O_RDONLY)
        contents = set()
        try:
            for name in "abc":
                file = os.open(name, os.O_RDONLY, dir_fd=handle)
                contents.add(os.read(file, 20))
                os.close(file)
        except FileNotFoundError:
            continue  # the folder behind the handle had been replaced, and was being removed
        finally:
            os.close(handle)
        assert len(contents) == 1
        return int(contents.pop())


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_crash_in_the_exchange_leaves_the_old_directory(tmp_path, monkeypatch, fail_at):
    """Where two folders cannot be exchanged in one step."""
    monkeypatch.setattr(files, "_swap", lambda one, other: False)
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old")
    real, calls = os.replace, []

    def replace(source, destination):
        calls.append(source)
        if len(calls) == fail_at:
            raise Crash
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Crash), atomic_directory(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [n for n in names(tmp_path) if not n.endswith(".old")] == ["model"]


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError, match="expected a folder"), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "a file"
