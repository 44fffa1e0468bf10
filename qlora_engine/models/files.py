"""Files and folders that are either whole or not there: a crash leaves what was there before."""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# linux/fcntl.h and linux/fs.h: paths are relative to the working directory; exchange both names
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a path to write to; what was written takes the place of `path` when the context ends without an error.

    The temporary file lies in the same folder, so that the exchange is one rename. Missing folders are made.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     print(Path(folder, "a.txt").read_text())
    whole
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_files(directory: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder to fill with files that belong together; they move into `directory` when all are whole.

    For a few small files in a folder that holds others. Each file is exchanged by one rename, one after another.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=directory))
    try:
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            _flush(file)
        for file in files:
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike, replaces: tuple[str, ...] = ("*",)) -> Iterator[Path]:
    """Gives an empty folder to fill; it takes the place of `path` when the context ends without an error.

    Where the system can exchange two folders in one step (Linux, on the usual file systems), `path` is the old
    folder or the new one at every moment. Elsewhere the exchange is two renames, and a crash between them leaves the
    old folder whole, beside the new one, under a name that ends in `.old`.

    Args:
        path: the folder, which may exist.
        replaces: patterns of file names; files of an older folder that match none of them are kept, as are its
            folders. Default: nothing is kept.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        os.chmod(temporary, 0o777 & ~_umask())
        _exchange(temporary, path, replaces)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path, replaces: tuple[str, ...]) -> None:
    if not path.exists():
        os.replace(new, path)
        return
    for kept in path.iterdir():
        if not (new / kept.name).exists() and not any(kept.match(pattern) for pattern in replaces):
            if kept.is_dir():
                shutil.copytree(kept, new / kept.name, copy_function=_link)
            else:
                _link(kept, new / kept.name)
    if _swap(new, path):
        return  # the old folder is now where the new one was, and goes with it
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.replace(path, aside / path.name)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside / path.name, path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where this system or its file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _link(source, target) -> None:
    try:
        os.link(source, target)  # no second copy of a large file
    except OSError:
        shutil.copy2(source, target)


def _flush(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
