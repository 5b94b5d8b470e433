"""A registry in a folder of this machine, or of a file system that it mounts.

    FOLDER/CURRENT          the pointer
    FOLDER/CURRENT.lock     held while the pointer is replaced
    FOLDER/LEASE            held by the rebuild or publication at work
    FOLDER/000001-…/        versions

Locks are the system's, so that they end with whoever holds them.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from retrieval.errors import InputError, RegistryBusyError, SnapshotConflictError, SnapshotError
from retrieval.files import fsync_folder, locked, new_folder, remove_temporary_files, write_atomically
from retrieval.snapshot.manifest import MANIFEST, is_version, version_number
from retrieval.snapshot.storage import CURRENT, LEASE, Grant

__all__ = ["LocalStorage"]

_STAGING, _REMOVING = "staging", "removing-"
_POINTER_LOCK = f"{CURRENT}.lock"


class LocalStorage:
    """See `Storage`; the folder need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[str]:
        """See `Storage`."""
        try:
            entries = list(self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SnapshotError(f"{self.path}: cannot be read ({error.strerror})") from None
        return [entry.name for entry in entries if is_version(entry.name) and entry.is_dir() and not entry.is_symlink()]

    def manifest(self, version: str) -> bytes:
        """See `Storage`."""
        file = self.path / version / MANIFEST
        try:
            return file.read_bytes()
        except OSError as error:
            raise SnapshotError(f"{file}: cannot be read ({error.strerror})") from None

    def folder(self, version: str) -> Path:
        """See `Storage`: the version's own folder."""
        return self.path / version

    def add(self, fill: Callable[[Path], str]) -> str:
        """See `Storage`."""
        staging = self.path / _STAGING
        with self._writable():
            with new_folder(staging) as folder:
                version = fill(folder)
            staging.rename(self.path / version)
            fsync_folder(self.path)
        return version

    def remove(self, version: str) -> bool:
        """See `Storage`."""
        # `open_snapshot` shares this lock while it reads.
        try:
            with locked(self.path / version / MANIFEST, wait=False):
                # First out of sight, so that no half-removed folder ever bears a version's name.
                doomed = (self.path / version).rename(self.path / f"{_REMOVING}{version}")
        except BlockingIOError:
            return False
        shutil.rmtree(doomed)
        return True

    def pointer(self) -> bytes | None:
        """See `Storage`."""
        try:
            return (self.path / CURRENT).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SnapshotError(f"{self.path / CURRENT}: cannot be read ({error.strerror})") from None

    def replace_pointer(self, content: bytes, *, instead_of: bytes | None) -> None:
        """See `Storage`."""
        with self._writable(), locked(self.path / _POINTER_LOCK):
            if self.pointer() != instead_of:
                raise SnapshotConflictError(f"{self.path / CURRENT}: was changed by somebody else at the same time")
            write_atomically(self.path / CURRENT, content)

    @contextmanager
    def lease(self) -> Iterator[Grant]:
        """See `Storage`; it cannot pass to another while its holder lives."""
        with ExitStack() as held:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path / LEASE, wait=False))
                self.sweep()
            except BlockingIOError:
                raise RegistryBusyError(f"{self.path}: another rebuild is at work there") from None
            except OSError as error:
                raise InputError(f"{self.path}: cannot be used ({error.strerror})") from None
            # The live one may have lost its folder; its number is not given twice.
            named = re.findall(rb"\d{6,}-[0-9a-f]{12}", self.pointer() or b"")
            newest = max(map(version_number, [*self.versions(), *(name.decode() for name in named)]), default=0)
            yield Grant(newest + 1, confirm=lambda: None)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SnapshotError(f"{self.path}: cannot be written ({error.strerror})") from None

    def sweep(self) -> None:
        """Remove what processes that were killed have left; only for who holds the lease."""
        for pattern in (f".tmp-{_STAGING}-*", _STAGING, f"{_REMOVING}*"):
            for path in self.path.glob(pattern):
                shutil.rmtree(path)
        with locked(self.path / _POINTER_LOCK):
            remove_temporary_files(self.path)
