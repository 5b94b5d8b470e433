"""Durable files: everything that another process may read appears whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "fsync_folder",
    "locked",
    "new_folder",
    "remove_temporary_files",
    "replacing",
    "sha256_of",
    "write_atomically",
]

_TEMPORARY = ".tmp-"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make a folder's entries (not the files' contents) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file, which the system releases however this process ends.

    Args:
        path: the file; created if need be, unless the lock is shared.
        shared: whether others may hold it too, if they share it as well.
        wait: whether to wait for whoever holds it.

    Raises:
        BlockingIOError: another holds it, and `wait` is false.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write, which replaces it, fsynced, when the block ends well.

    A reader, or a machine after a crash, sees the old bytes or the new ones.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        # Some libraries create files that only their owner may read.
        temporary.chmod(0o644)
        _fsync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left of `replacing` and `new_folder` in a folder to which nobody else writes."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its name, fsynced, when the block ends well.

    When the block raises, the temporary folder is removed and `target` stays as it was.

    Args:
        target: the folder to appear.
        replace: whether an existing `target` is swapped out; otherwise it is an error.

    Raises:
        FileExistsError: `target` exists and `replace` is false.
    """
    if target.exists() and not replace:
        raise FileExistsError(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync_file(path)
        fsync_folder(temporary)
        if target.exists():
            # A non-empty folder cannot be renamed over: move the old one aside first.
            old = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent))
            target.rename(old / "old")
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(target.parent)
