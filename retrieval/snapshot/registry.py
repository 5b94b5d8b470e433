"""A registry: snapshots in one place, and `CURRENT`, which names the one that serves.

    REGISTRY/CURRENT
    REGISTRY/000001-4fd01c6b2a9e/…
    REGISTRY/000002-…/…

A version is a growing number and the beginning of its manifest's hash. Snapshots appear whole and are never changed;
`CURRENT` is replaced at once, and only by who knows what it read before. A reader therefore needs no lock, and of two
writers one is refused. The place is a local folder or an object store: docs/snapshot-format.md.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from retrieval.config import Config
from retrieval.errors import (
    ConfigError,
    InputError,
    NoSnapshotError,
    SnapshotConflictError,
    SnapshotError,
    UnknownVersionError,
)
from retrieval.snapshot.local_storage import LocalStorage
from retrieval.snapshot.manifest import MANIFEST, Manifest, is_version, parse_manifest, version_name, version_number
from retrieval.snapshot.storage import CURRENT, Grant, Storage

__all__ = ["Registry", "storage_at"]

_SCHEMES = ("s3", "gs", "az")


class _Pointer(Config):
    """Contents of CURRENT.

    Attributes:
        version: the live version.
        switches: how often it was changed. No two states of CURRENT are thus equal, and a rebuild notices that another
            version was live and is no more.
        oldest: number below which versions are removed or about to be; none of them becomes live.
    """

    version: str
    switches: int = Field(ge=1)
    oldest: int = Field(ge=0)


def storage_at(location: str | Path, cache: Path | None = None) -> Storage:
    """The storage that a location names: a folder, or a URL of an object store.

    Args:
        location: path or URL (s3://BUCKET/PREFIX).
        cache: folder for copies of an object store's versions; by default one in the user's cache folder.

    Raises:
        InputError: there is no such kind of store.
        ConfigError: the package for it is not installed.
    """
    url = str(location)
    scheme = re.match(r"(\w+)://", url)
    if scheme is None:
        return LocalStorage(Path(location))
    if scheme[1] not in _SCHEMES:
        raise InputError(f"{url}: registries are folders or URLs that begin with {'://, '.join(_SCHEMES)}://")
    try:
        from retrieval.snapshot.object_storage import ObjectStorage, object_store
    except ImportError:
        raise ConfigError(f"{url}: object stores need the extra 's3' (pip install 'retrieval[s3]')") from None
    if cache is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = caches / "retrieval" / hashlib.sha256(url.encode()).hexdigest()[:16]
    return ObjectStorage(url, object_store(url), cache)


class Registry:
    """Snapshots in one place, which need not exist yet.

    Args:
        location: see `storage_at`.
        storage: where that is; by default `storage_at(location)`.
    """

    def __init__(self, location: str | Path, storage: Storage | None = None) -> None:
        self.location = location
        self._storage = storage if storage is not None else storage_at(location)
        self._held: tuple[Grant, _Pointer | None] | None = None

    def versions(self) -> list[str]:
        """Names of all snapshots, oldest first."""
        return sorted(self._storage.versions(), key=version_number)

    def manifest(self, version: str) -> Manifest:
        """Manifest of a version, checked; its files are not.

        Raises:
            UnknownVersionError: there is no such version.
            SnapshotError: its manifest is damaged or of another format.
        """
        self._check(version)
        return parse_manifest(self._storage.manifest(version), version, f"{self.location}/{version}/{MANIFEST}")

    def folder(self, version: str) -> Path:
        """Folder of a version on this machine; a version of an object store is copied first.

        Raises:
            UnknownVersionError: there is no such version.
            SnapshotError: what was copied is damaged.
        """
        self._check(version)
        return self._storage.folder(version)

    def current(self) -> str:
        """Name of the live version.

        Raises:
            NoSnapshotError: nothing was published yet.
            SnapshotError: CURRENT cannot be read, or names no version.
        """
        pointer, _ = self._pointer()
        if pointer is None:
            raise NoSnapshotError(f"{self.location}: holds no live snapshot yet")
        self._check(pointer.version)
        return pointer.version

    def activate(self, version: str) -> None:
        """Make a version the live one.

        Raises:
            UnknownVersionError: there is no such version.
            SnapshotConflictError: the live version was changed at the same time.
        """
        pointer, content = self._pointer()
        self._check(version)
        if pointer is not None and version_number(version) < pointer.oldest and version != pointer.version:
            raise UnknownVersionError(f"{self.location}: version {version} is being removed")
        self._switch(version, pointer, content)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """The right to publish and prune, which one process has at a time: a rebuild holds it from its first look on.

        Raises:
            RegistryBusyError: another has it.
        """
        if self._held is not None:
            yield
            return
        with self._storage.lease() as grant:
            pointer, _ = self._pointer()
            self._held = grant, pointer
            try:
                yield
            finally:
                self._held = None

    def publish(self, write: Callable[[Path], bytes]) -> str:
        """Add a snapshot and make it the live one; return its name. Takes the lease if it is not held.

        Args:
            write: fills the empty folder that it is given and returns the manifest's bytes, as
                `store.write_snapshot` does. If it raises, nothing has changed.

        Raises:
            RegistryBusyError: another rebuild is at work.
            SnapshotConflictError: the live version has changed since the lease was taken, or the lease was lost.
        """
        with self.lease():
            assert self._held is not None
            grant, basis = self._held
            assert basis is None or version_number(basis.version) < grant.token, "one publication in a lease"
            version = self._storage.add(lambda folder: version_name(grant.token, write(folder)))
            try:
                grant.confirm()
            except SnapshotConflictError:
                self._storage.remove(version)
                raise
            pointer, content = self._pointer()
            if _switches(pointer) != _switches(basis):
                raise SnapshotConflictError(
                    f"{self.location}: {_live(basis)} when this began, and now {_live(pointer)}; "
                    f"{version} was not made live"
                )
            self._held = grant, self._switch(version, pointer, content)
            return version

    def prune(self, keep: int) -> list[str]:
        """Remove what is older than the newest `keep` versions and than the live one; return it, oldest first.

        After a rollback thus everything from the live version on stays, until a newer one is live. A version that a
        process of this machine is opening stays until the next time. A server that has loaded a version does not need
        it any more; one that is copying it while it is removed keeps what it serves.

        Raises:
            RegistryBusyError: another rebuild is at work.
        """
        if keep < 1:
            raise InputError(f"keep: must be at least 1, not {keep}")
        with self.lease():
            assert self._held is not None
            grant, _ = self._held
            versions = self.versions()
            if len(versions) <= keep:
                return []
            oldest = self._retire(version_number(versions[-keep]))
            grant.confirm()
            old = [version for version in versions[:-keep] if version_number(version) < oldest]
            return [version for version in old if self._storage.remove(version)]

    def previous(self) -> str:
        """Name of the newest version before the live one.

        Raises:
            UnknownVersionError: there is none.
        """
        live = self.current()
        older = [version for version in self.versions() if version_number(version) < version_number(live)]
        if not older:
            raise UnknownVersionError(f"{self.location}: has no version before {live} to roll back to")
        return older[-1]

    def _check(self, version: str) -> None:
        versions = self.versions()
        if version not in versions:
            known = ", ".join(versions) or "none"
            raise UnknownVersionError(f"{self.location}: has no version {version!r} (it has: {known})")

    def _pointer(self) -> tuple[_Pointer | None, bytes | None]:
        """CURRENT and its bytes."""
        content = self._storage.pointer()
        if content is None:
            return None, None
        where = f"{self.location}/{CURRENT}"
        try:
            pointer = _Pointer.parse(json.loads(content), where)
        except (ValueError, RecursionError, ConfigError):
            raise SnapshotError(f"{where}: does not say which version is live") from None
        if not is_version(pointer.version):
            raise SnapshotError(f"{where}: names {pointer.version!r}, which is no version")
        return pointer, content

    def _switch(self, version: str, pointer: _Pointer | None, content: bytes | None) -> _Pointer:
        oldest = pointer.oldest if pointer is not None else 0
        switched = _Pointer(version=version, switches=_switches(pointer) + 1, oldest=oldest)
        self._replace(switched, content)
        return switched

    def _retire(self, oldest: int) -> int:
        """Let no version below a number, or below the live one's if that is less, become live any more; return it."""
        while True:
            pointer, content = self._pointer()
            if pointer is None:
                return oldest
            # What lies between the live version and the newest ones is kept, since a version that is there and cannot
            # become live helps nobody.
            safe = min(oldest, version_number(pointer.version))
            if pointer.oldest >= safe:
                return safe
            try:
                self._replace(pointer.model_copy(update={"oldest": safe}), content)
            except SnapshotConflictError:
                # Somebody rolled back just now: perhaps to what was about to go.
                continue
            return safe

    def _replace(self, pointer: _Pointer, content: bytes | None) -> None:
        self._storage.replace_pointer(pointer.model_dump_json().encode() + b"\n", instead_of=content)


def _switches(pointer: _Pointer | None) -> int:
    return pointer.switches if pointer is not None else 0


def _live(pointer: _Pointer | None) -> str:
    return f"{pointer.version} was live" if pointer is not None else "nothing was live"
