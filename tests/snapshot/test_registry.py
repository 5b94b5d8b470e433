"""What every registry promises, asked of a local folder and of an S3 server over a socket."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from retrieval.errors import (
    ConfigError,
    InputError,
    NoSnapshotError,
    RegistryBusyError,
    SnapshotConflictError,
    SnapshotError,
    UnknownVersionError,
)
from retrieval.files import locked
from retrieval.snapshot.manifest import MANIFEST, verify_files, version_number
from retrieval.snapshot.object_storage import ObjectStorage, object_store
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.storage import CURRENT
from retrieval.snapshot.store import open_snapshot
from tests.s3 import s3_server, s3_url  # noqa: F401
from tests.snapshot.make import publish

Elsewhere = Callable[[str], Registry]


@pytest.fixture(params=["folder", "s3"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Elsewhere:
    """Opens the same registry as a machine of this name would."""
    if request.param == "folder":
        return lambda machine: Registry(tmp_path / "registry")
    url = "memory://" if request.param == "memory" else request.getfixturevalue("s3_url")
    store = MemoryStore() if request.param == "memory" else object_store(url)
    return lambda machine: Registry(url, ObjectStorage(url, store, tmp_path / machine, lease_seconds=1.0))


@pytest.fixture
def registry(elsewhere: Elsewhere) -> Registry:
    registry = elsewhere("here")
    publish(registry)
    return registry


def test_a_published_snapshot_opens_on_another_machine(registry: Registry, elsewhere: Elsewhere) -> None:
    there = elsewhere("there")
    assert there.current() == registry.current()
    assert there.versions() == registry.versions()
    assert there.manifest(there.current()) == registry.manifest(registry.current())
    snapshot = open_snapshot(there.folder(there.current()))
    assert snapshot.version == registry.current()
    verify_files(registry.folder(registry.current()), snapshot.manifest)


def test_versions_grow_and_the_newest_is_live(registry: Registry) -> None:
    second = publish(registry, seed=1)
    assert [version[:7] for version in registry.versions()] == ["000001-", "000002-"]
    assert registry.current() == second


def test_rolling_back_names_the_version_before(registry: Registry) -> None:
    first = registry.current()
    publish(registry, seed=1)
    registry.activate(registry.previous())
    assert registry.current() == first
    with pytest.raises(SnapshotError, match="no version before"):
        registry.previous()


def test_a_version_after_a_rollback_does_not_reuse_a_name(registry: Registry) -> None:
    publish(registry, seed=1)
    registry.activate(registry.previous())
    assert publish(registry, seed=2).startswith("000003-")


def test_an_empty_registry_says_so(elsewhere: Elsewhere) -> None:
    registry = elsewhere("here")
    assert registry.versions() == []
    with pytest.raises(NoSnapshotError, match="holds no live snapshot yet"):
        registry.current()


@pytest.mark.parametrize("version", ["../registry", "000009-000000000000", "CURRENT", ""])
def test_a_version_that_is_not_there_is_never_opened(registry: Registry, version: str) -> None:
    for use in (registry.folder, registry.manifest, registry.activate):
        with pytest.raises(SnapshotError, match="has no version"):
            use(version)


def test_a_write_that_fails_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    live, versions = registry.current(), registry.versions()

    def fails(folder: Path) -> bytes:
        (folder / "encoder.json").write_text("half")
        raise ValueError("no such index")

    with pytest.raises(ValueError, match="no such index"):
        registry.publish(fails)
    assert (registry.current(), registry.versions()) == (live, versions)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".tmp-", "staging"))]


def test_a_disk_that_is_full_is_one_sentence_and_changes_nothing(registry: Registry) -> None:
    live, versions = registry.current(), registry.versions()

    def fails(folder: Path) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SnapshotError, match=r"^\S+ cannot be written \(No space left on device\)$"):
        registry.publish(fails)
    assert (registry.current(), registry.versions()) == (live, versions)
    publish(registry, seed=1)


def test_one_rebuild_at_a_time(registry: Registry, elsewhere: Elsewhere) -> None:
    there = elsewhere("there")
    with registry.lease():
        for use in (lambda: publish(there), lambda: there.prune(1)):
            with pytest.raises(RegistryBusyError, match="another rebuild"):
                use()
        second = publish(registry, seed=1)
    assert there.current() == second
    assert publish(there, seed=2).startswith("000003-")


def test_a_rollback_needs_no_lease_and_stops_the_publication_that_did_not_know_of_it(
    registry: Registry, elsewhere: Elsewhere
) -> None:
    first, second = registry.current(), publish(registry, seed=1)
    with registry.lease():
        elsewhere("there").activate(first)
        with pytest.raises(SnapshotConflictError, match=f"{second} was live when this began, and now {first} was live"):
            publish(registry, seed=2)
    assert registry.current() == first
    # There and back again is a change too.
    with registry.lease():
        elsewhere("there").activate(second)
        elsewhere("there").activate(first)
        with pytest.raises(SnapshotConflictError, match="was not made live"):
            publish(registry, seed=3)
    assert registry.current() == first


def test_of_two_first_publications_the_second_is_refused(elsewhere: Elsewhere) -> None:
    here = elsewhere("here")
    with here.lease():
        storage = elsewhere("there")._storage
        storage.replace_pointer(b"{}", instead_of=None)
        with pytest.raises(SnapshotError, match="does not say which version is live"):
            publish(here)
    with pytest.raises(SnapshotConflictError, match=CURRENT):
        storage.replace_pointer(b"[]", instead_of=None)
    assert storage.pointer() == b"{}"


@pytest.mark.parametrize("content", [b"", b"000001", b"[" * 10_000, b'{"version": "../x", "switches": 1, "oldest": 0}'])
def test_a_pointer_that_makes_no_sense_is_refused(registry: Registry, content: bytes) -> None:
    registry._storage.replace_pointer(content, instead_of=registry._storage.pointer())
    with pytest.raises(SnapshotError, match=CURRENT):
        registry.current()


def test_pruning_keeps_the_newest_and_whatever_is_not_older_than_the_live_one(registry: Registry) -> None:
    versions = registry.versions() + [publish(registry, seed) for seed in range(1, 5)]
    registry.activate(versions[1])
    assert registry.prune(2) == [versions[0]]
    assert registry.versions() == versions[1:]
    assert registry.prune(2) == []
    open_snapshot(registry.folder(registry.current()))
    # Whatever is there can become live.
    for version in (*versions[2:], versions[1], versions[4]):
        registry.activate(version)
    assert registry.prune(2) == versions[1:3]
    assert registry.prune(2) == []
    with pytest.raises(InputError, match="keep: must be at least 1"):
        registry.prune(0)
    assert version_number(publish(registry, seed=9)) > version_number(versions[4])


def test_what_is_being_pruned_does_not_become_live(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = registry.current(), publish(registry, seed=1)
    remove, refused = registry._storage.remove, []

    def race(version: str) -> bool:
        with pytest.raises(UnknownVersionError, match=f"{first} is being removed") as caught:
            registry.activate(first)
        refused.append(caught)
        return remove(version)

    monkeypatch.setattr(registry._storage, "remove", race)
    assert registry.prune(1) == [first]
    assert len(refused) == 1
    assert registry.current() == second


# Moto's server compares and writes in two steps; the store in memory does it in one, as S3 does.
@pytest.mark.parametrize("elsewhere", ["folder", "memory"], indirect=True)
def test_of_rollbacks_at_once_each_is_done_or_refused(registry: Registry, elsewhere: Elsewhere) -> None:
    versions = [*registry.versions(), publish(registry, seed=1), publish(registry, seed=2)]
    done: list[str] = []

    def switch(version: str) -> None:
        there = elsewhere(version)
        for _ in range(8):
            try:
                there.activate(version)
                done.append(version)
            except SnapshotConflictError:
                pass

    threads = [threading.Thread(target=switch, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pointer, _ = registry._pointer()
    assert pointer is not None
    assert pointer.switches == len(versions) + len(done)


def test_a_live_version_whose_folder_was_lost_is_followed_by_the_next_number(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first, lost = publish(registry), publish(registry, seed=1)
    shutil.rmtree(registry.folder(lost))
    assert version_number(publish(registry, seed=2)) == version_number(lost) + 1
    assert registry.previous() == first


def test_order_is_by_number_whatever_clocks_said(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    versions = [publish(registry, seed) for seed in range(4)]
    for place, version in enumerate(versions):
        # The newest was written on a machine whose clock was years behind.
        os.utime(registry.folder(version), (10**9 - place, 10**9 - place))
    assert registry.versions() == versions
    assert registry.previous() == versions[2]
    assert registry.prune(2) == versions[:2]
    assert publish(registry, 9) > versions[-1]


def test_a_version_that_is_being_opened_is_not_pruned(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first, _ = publish(registry), publish(registry, seed=1)
    with locked(registry.folder(first) / MANIFEST, shared=True):
        assert registry.prune(1) == []
        open_snapshot(registry.folder(first))
    assert registry.prune(1) == [first]


def test_who_waits_for_a_version_that_is_being_removed_is_told(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    folder = registry.folder(publish(registry))
    with ThreadPoolExecutor(1) as pool:
        with locked(folder / MANIFEST):
            opening = pool.submit(open_snapshot, folder)
            inode = f":{(folder / MANIFEST).stat().st_ino} "
            locks = Path("/proc/locks")
            wait_for(lambda: any("->" in line and inode in line for line in locks.read_text().splitlines()))
            folder.rename(tmp_path / "gone")
        with pytest.raises(SnapshotError, match="was removed as it was about to be read"):
            opening.result()


def test_a_server_that_is_loading_a_version_keeps_it_from_being_pruned(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    first = publish(registry)
    manifest = registry.folder(first) / MANIFEST
    command = [sys.executable, "-m", "retrieval.cli.main", "serve", str(tmp_path / "registry"), "--port", "0"]
    with subprocess.Popen([*command, "--poll-seconds", "0.2"], stderr=subprocess.PIPE, text=True) as server:
        try:
            while not is_locked(manifest):
                assert server.poll() is None
            server.send_signal(signal.SIGSTOP)
            assert is_locked(manifest), "the server was stopped in the middle of loading"
            second = publish(registry, seed=1)
            assert registry.prune(1) == []
            assert registry.versions() == [first, second]
            server.send_signal(signal.SIGCONT)
            assert server.stderr is not None
            for line in server.stderr:
                assert "could not be loaded" not in line
                if f"serving snapshot {second}" in line:
                    break
            assert registry.prune(1) == [first]
        finally:
            server.kill()


def is_locked(file: Path) -> bool:
    """Whether some process holds a file's lock."""
    try:
        with locked(file, wait=False):
            return False
    except BlockingIOError:
        return True


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_killed_publication_and_a_killed_removal_left_is_swept(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    live = publish(registry)
    left = [tmp_path / name for name in (".tmp-staging-x1", "staging", "removing-000001-000000000000")]
    for folder in left:
        folder.mkdir()
        (folder / "index.faiss").write_bytes(b"half")
    (tmp_path / ".tmp-1-CURRENT").write_bytes(b"half")
    assert registry.versions() == [live]
    publish(registry, seed=1)
    assert {path.name for path in tmp_path.iterdir()} == {"CURRENT", "CURRENT.lock", "LEASE", *registry.versions()}


def test_a_version_that_is_a_link_is_none(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    version = publish(registry)
    (tmp_path / "registry" / version).rename(tmp_path / version)
    (tmp_path / "registry" / version).symlink_to(tmp_path / version)
    with pytest.raises(SnapshotError, match="has no version"):
        registry.current()


def test_a_location_of_no_known_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"registries are folders or URLs that begin with s3://"):
        Registry("ftp://host/folder")
    monkeypatch.setitem(sys.modules, "retrieval.snapshot.object_storage", None)
    with pytest.raises(ConfigError, match="need the extra 's3'"):
        Registry("s3://bucket/folder")
