"""A registry in an object store (Amazon S3 and what speaks its protocol, Google Cloud Storage, Azure), by a URL.

    URL/CURRENT             the pointer
    URL/LEASE               who rebuilds, and the token; see `_LeaseRecord`
    URL/000001-…/NAME       versions

Nothing is renamed: a version's manifest is uploaded last, and what has no manifest is no version. CURRENT and LEASE
change by conditional writes alone (If-Match with the tag that was read, If-None-Match where there was nothing), so that
of two writers at the same moment one is told. Reading a version copies it to a folder of this machine first, verified.

Connection and credentials are found as the store's own tools find them: AWS_REGION, AWS_ENDPOINT_URL, instance roles, …
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import ObjectStore, from_url

from retrieval.config import Config
from retrieval.errors import (
    ConfigError,
    InputError,
    RegistryBusyError,
    SnapshotConflictError,
    SnapshotCorruptError,
    SnapshotError,
)
from retrieval.files import locked
from retrieval.snapshot.local_storage import LocalStorage
from retrieval.snapshot.manifest import (
    MANIFEST,
    check_sizes,
    is_version,
    parse_manifest,
    read_manifest,
    verify_files,
    version_number,
)
from retrieval.snapshot.storage import CURRENT, LEASE, Grant

__all__ = ["ObjectStorage", "object_store"]

_log = logging.getLogger(__name__)

_LEASE_SECONDS = 30.0
_CACHED_VERSIONS = 2
_CHUNK_BYTES = 8 * 2**20


class _LeaseRecord(Config):
    """Contents of LEASE.

    No clock is compared with another: a holder changes `beat` several times in `seconds`, and whoever wants the lease
    watches for that long. A holder that was paused longer finds its record replaced, and may do nothing any more.

    Attributes:
        token: grows with every lease.
        holder: who has it; None once it was given back.
        beat: grows while the holder lives.
        seconds: silence after which the holder is taken for dead.
    """

    token: int
    holder: str | None
    beat: int
    seconds: float

    def encoded(self) -> bytes:
        return self.model_dump_json().encode()


# What names one state of an object in conditional writes.
_Tag = dict[str, str]


def object_store(url: str) -> ObjectStore:
    """The store that a URL names.

    Raises:
        InputError: the URL or its settings cannot be used.
    """
    try:
        return from_url(url)
    except (BaseError, ValueError) as error:
        raise InputError(f"{url}: cannot be used ({_first_line(error)})") from None


class ObjectStorage:
    """See `Storage`.

    Args:
        url: where the registry is, for messages.
        store: the same, opened.
        cache: folder of this machine for copies of versions; several processes may share it.
        lease_seconds: silence after which this process, holding a lease, may be taken for dead.
    """

    def __init__(self, url: str, store: ObjectStore, cache: Path, *, lease_seconds: float = _LEASE_SECONDS) -> None:
        self.url = url.rstrip("/")
        self._store = store
        self._cache = LocalStorage(cache)
        self._lease_seconds = lease_seconds

    def versions(self) -> list[str]:
        """See `Storage`."""
        return [version for version, sizes in self._listing().items() if MANIFEST in sizes]

    def manifest(self, version: str) -> bytes:
        """See `Storage`."""
        found = self._read(f"{version}/{MANIFEST}")
        if found is None:
            raise SnapshotError(f"{self.url}/{version}: is not a snapshot ({MANIFEST} is missing)")
        return found[0]

    def folder(self, version: str) -> Path:
        """See `Storage`: a verified copy, which stays until newer ones are copied."""
        with self._cache_locked():
            copy = self._cache.folder(version)
            if version in self._cache.versions():
                try:
                    verify_files(copy, read_manifest(copy))
                    return copy
                except SnapshotError as error:
                    _log.warning("%s; it is copied again", error)
                    if not self._cache.remove(version):
                        raise
            self._cache.sweep()
            self._cache.add(partial(self._download, version))
            self._forget(version)
        return copy

    def add(self, fill: Callable[[Path], str]) -> str:
        """See `Storage`."""
        with self._cache_locked():
            self._cache.sweep()
            version = self._cache.add(fill)
            self._forget(version)
        # The manifest last: it makes the version.
        names = sorted(path.name for path in self._cache.folder(version).iterdir() if path.name != MANIFEST)
        for name in (*names, MANIFEST):
            with self._explained(f"{version}/{name}"):
                obstore.put(self._store, f"{version}/{name}", self._cache.folder(version) / name)
        return version

    def remove(self, version: str) -> bool:
        """See `Storage`: always true; who is copying the version finds a file missing."""
        self._delete([f"{version}/{MANIFEST}"])
        self._delete([f"{version}/{name}" for name in self._listing(version).get(version, {})])
        return True

    def pointer(self) -> bytes | None:
        """See `Storage`."""
        found = self._read(CURRENT)
        return found[0] if found is not None else None

    def replace_pointer(self, content: bytes, *, instead_of: bytes | None) -> None:
        """See `Storage`."""
        found = self._read(CURRENT)
        if (found[0] if found is not None else None) != instead_of:
            raise SnapshotConflictError(f"{self.url}/{CURRENT}: was changed by somebody else at the same time")
        self._write(CURRENT, content, found[1] if found is not None else None)

    @contextmanager
    def lease(self) -> Iterator[Grant]:
        """See `Storage`. Waits for as long as a holder may be silent before it takes a dead one's lease."""
        held = _Lease(self._read, self._write, f"{self.url}/{LEASE}")
        token = held.take(lambda: max(map(version_number, self.versions()), default=0), self._lease_seconds)
        try:
            self._sweep()
            yield Grant(token, confirm=held.confirm)
        finally:
            held.give_back()

    def _sweep(self) -> None:
        """Remove what an upload or a removal that was cut short has left."""
        for version, sizes in self._listing().items():
            if MANIFEST not in sizes:
                self._delete([f"{version}/{name}" for name in sizes])

    def _listing(self, version: str | None = None) -> dict[str, dict[str, int]]:
        """Size in bytes of each object, by version and by name below it."""
        found: dict[str, dict[str, int]] = {}
        with self._explained(version or ""):
            for page in obstore.list(self._store, version):
                for entry in page:
                    folder, _, name = entry["path"].partition("/")
                    if is_version(folder) and name:
                        found.setdefault(folder, {})[name] = entry["size"]
        return found

    def _download(self, version: str, folder: Path) -> str:
        """Copy a version to an empty folder; verify it on the way."""
        where = f"{self.url}/{version}"
        content = self.manifest(version)
        manifest = parse_manifest(content, version, f"{where}/{MANIFEST}")
        sizes = self._listing(version).get(version, {})
        check_sizes({name: size for name, size in sizes.items() if name != MANIFEST}, manifest, where)
        for name, entry in manifest.files.items():
            digest = hashlib.sha256()
            with self._explained(f"{version}/{name}"), (folder / name).open("wb") as file:
                for chunk in obstore.get(self._store, f"{version}/{name}").stream(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != entry.sha256:
                raise SnapshotCorruptError(f"{where}/{name}: its SHA-256 differs from the manifest's")
        (folder / MANIFEST).write_bytes(content)
        return version

    @contextmanager
    def _cache_locked(self) -> Iterator[None]:
        try:
            self._cache.path.mkdir(parents=True, exist_ok=True)
            with locked(self._cache.path / LEASE):
                yield
        except OSError as error:
            raise SnapshotError(f"{self._cache.path}: cannot be used for copies ({error.strerror})") from None

    def _forget(self, version: str) -> None:
        """Remove old copies, but not of this version."""
        others = sorted((other for other in self._cache.versions() if other != version), key=version_number)
        for other in others[: -(_CACHED_VERSIONS - 1)]:
            self._cache.remove(other)

    def _read(self, name: str) -> tuple[bytes, _Tag] | None:
        """An object and its tag; None where there is none."""
        with self._explained(name):
            try:
                found = obstore.get(self._store, name)
                return bytes(found.bytes()), _tag(found.meta)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise SnapshotError(f"{self.url}: there is no such bucket") from None
                return None

    def _write(self, name: str, content: bytes, instead_of: _Tag | None) -> _Tag:
        """Replace an object in the state that it was read in, or create it where there was none.

        Raises:
            SnapshotConflictError: it is in another state by now.
        """
        with self._explained(name):
            try:
                mode: Any = "create" if instead_of is None else instead_of
                return _tag(obstore.put(self._store, name, content, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                # A request that was sent again after its answer got lost meets its own work.
                found = self._read(name)
                if found is not None and found[0] == content:
                    return found[1]
                raise SnapshotConflictError(
                    f"{self.url}/{name}: was changed by somebody else at the same time"
                ) from None

    def _delete(self, names: list[str]) -> None:
        if names:
            with self._explained(names[0]), suppress(FileNotFoundError):
                obstore.delete(self._store, names)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn the store's errors into ours."""
        try:
            yield
        except FileNotFoundError:
            raise SnapshotError(f"{self.url}/{name}: is missing") from None
        except BaseError as error:
            raise SnapshotError(f"{self.url}/{name}: the object store failed: {_first_line(error)}") from None


class _Lease:
    """This process's side of LEASE.

    Args:
        read, write: of the store that it lies in.
        where: the object, in messages.
    """

    def __init__(
        self,
        read: Callable[[str], tuple[bytes, _Tag] | None],
        write: Callable[[str, bytes, _Tag | None], _Tag],
        where: str,
    ) -> None:
        self._read, self._write, self._where = read, write, where
        self._done = threading.Event()

    def take(self, newest: Callable[[], int], seconds: float) -> int:
        """Take the lease, from a dead holder if need be, and keep it alive; return its token.

        Args:
            newest: finds the greatest number of a version.
            seconds: silence after which this process may be taken for dead.

        Raises:
            RegistryBusyError: another has it.
        """
        found = self._free()
        before = _parse_lease(found[0], self._where).token if found is not None else 0
        token = max(before, newest()) + 1
        # Random, so that a process knows its own record also after a write of which it did not hear the end.
        holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._record = _LeaseRecord(token=token, holder=holder, beat=0, seconds=seconds)
        try:
            self._tag = self._write(LEASE, self._record.encoded(), found[1] if found is not None else None)
        except SnapshotConflictError:
            raise RegistryBusyError(f"{self._where}: another rebuild has just begun there") from None
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beating.start()
        return self._record.token

    def confirm(self) -> None:
        """Check that the lease is still this process's.

        Raises:
            SnapshotConflictError: it is not.
        """
        found = self._read(LEASE)
        record = _parse_lease(found[0], self._where) if found is not None else None
        if record is None or record.holder != self._record.holder:
            raise SnapshotConflictError(
                f"{self._where}: was taken over by {record.holder if record is not None else 'nobody'}, because this "
                "process gave no sign of life; nothing was published"
            )

    def give_back(self) -> None:
        """Let the next one have it at once. What fails here does no harm: the lease then ends by silence."""
        self._done.set()
        self._beating.join()
        try:
            self._write(LEASE, self._record.model_copy(update={"holder": None}).encoded(), self._tag)
        except SnapshotError as error:
            _log.warning("%s", error)

    def _free(self) -> tuple[bytes, _Tag] | None:
        """LEASE, once nobody has it."""
        found = self._read(LEASE)
        if found is None:
            return None
        first = _parse_lease(found[0], self._where)
        if first.holder is not None:
            _log.info("%s: is held by %s; watching it for %g s", self._where, first.holder, first.seconds)
        end = time.monotonic() + first.seconds
        while first.holder is not None and time.monotonic() < end:
            time.sleep(first.seconds / 10)
            found = self._read(LEASE)
            if found is None:
                return None
            record = _parse_lease(found[0], self._where)
            if record.holder is None:
                return found
            if (record.holder, record.beat) != (first.holder, first.beat):
                raise RegistryBusyError(f"{self._where}: another rebuild is at work there ({record.holder})")
        return found

    def _beat(self) -> None:
        while not self._done.wait(self._record.seconds / 4):
            record = self._record.model_copy(update={"beat": self._record.beat + 1})
            try:
                self._tag = self._write(LEASE, record.encoded(), self._tag)
                self._record = record
            except SnapshotConflictError:
                return
            except SnapshotError as error:
                # The store may answer again before the lease has run out; `confirm` tells.
                _log.warning("%s", error)


def _parse_lease(content: bytes, where: str) -> _LeaseRecord:
    try:
        return _LeaseRecord.parse(json.loads(content), where)
    except (ValueError, ConfigError):
        raise SnapshotError(f"{where}: is not a lease; remove it if no rebuild is at work") from None


def _tag(meta: Any) -> _Tag:
    return {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
