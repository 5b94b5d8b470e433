"""A registry: a folder of snapshots, and `CURRENT`, the name of the one that serves.

    REGISTRY/CURRENT
    REGISTRY/000001-4fd01c6b2a9e/…
    REGISTRY/000002-…/…

A version is a growing number and the beginning of its manifest's hash. Snapshots appear whole (temporary name,
fsync, rename) and are never changed; `CURRENT` is replaced atomically. A reader therefore needs no lock.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from retrieval.errors import NoSnapshotError, SnapshotError
from retrieval.files import new_folder, write_atomically
from retrieval.snapshot.manifest import version_suffix

__all__ = ["Registry"]

_CURRENT = "CURRENT"
_VERSION = re.compile(r"(\d{6,})-[0-9a-f]{12}")


class Registry:
    """Snapshots below one local folder, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[str]:
        """Names of all snapshots, oldest first."""
        if not self.path.is_dir():
            return []
        names = [entry.name for entry in self.path.iterdir() if _VERSION.fullmatch(entry.name)]
        return sorted(names, key=_number)

    def folder(self, version: str) -> Path:
        """Folder of a version.

        Raises:
            SnapshotError: there is no such version.
        """
        if not _VERSION.fullmatch(version) or not (self.path / version).is_dir():
            known = ", ".join(self.versions()) or "none"
            raise SnapshotError(f"{self.path}: has no version {version!r} (it has: {known})")
        return self.path / version

    def current(self) -> str:
        """Name of the live version.

        Raises:
            NoSnapshotError: nothing was published yet.
        """
        try:
            version = (self.path / _CURRENT).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            raise NoSnapshotError(f"{self.path}: holds no live snapshot yet") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SnapshotError(f"{self.path / _CURRENT}: cannot be read ({error})") from None
        self.folder(version)
        return version

    def activate(self, version: str) -> None:
        """Make a version the live one.

        Raises:
            SnapshotError: there is no such version.
        """
        self.folder(version)
        write_atomically(self.path / _CURRENT, f"{version}\n".encode())

    def publish(self, write: Callable[[Path], bytes]) -> str:
        """Add a snapshot and make it the live one; return its name.

        Args:
            write: fills the empty folder that it is given and returns the manifest's bytes, as
                `store.write_snapshot` does. If it raises, nothing has changed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        staging = self.path / "staging"
        number = _number(self.versions()[-1]) + 1 if self.versions() else 1
        with new_folder(staging, replace=True) as folder:
            manifest = write(folder)
        version = f"{number:06d}-{version_suffix(manifest)}"
        staging.rename(self.path / version)
        self.activate(version)
        return version

    def prune(self, keep: int) -> list[str]:
        """Remove all but the newest `keep` versions and the live one; return what was removed, oldest first.

        A server that has loaded a version does not need its folder any more; one that is loading a version while it is
        removed keeps what it serves.
        """
        kept = {self.current(), *self.versions()[-keep:]} if keep else {self.current()}
        removed = [version for version in self.versions() if version not in kept]
        for version in removed:
            # First out of sight, so that no half-removed folder ever bears a version's name.
            doomed = self.path / f"removing-{version}"
            (self.path / version).rename(doomed)
        for doomed in self.path.glob("removing-*"):
            shutil.rmtree(doomed)
        return removed

    def previous(self) -> str:
        """Name of the newest version before the live one.

        Raises:
            SnapshotError: there is none.
        """
        live = self.current()
        older = [version for version in self.versions() if _number(version) < _number(live)]
        if not older:
            raise SnapshotError(f"{self.path}: has no version before {live} to roll back to")
        return older[-1]


def _number(version: str) -> int:
    match = _VERSION.fullmatch(version)
    assert match is not None
    return int(match.group(1))
