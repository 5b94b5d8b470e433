"""What only an object store can do: lose holders, uploads, answers and the connection."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest

from retrieval.cli.main import main
from retrieval.errors import RegistryBusyError, SnapshotConflictError, SnapshotCorruptError, SnapshotError
from retrieval.files import sha256_of
from retrieval.index.spec import IndexSpec
from retrieval.snapshot import object_storage
from retrieval.snapshot.manifest import MANIFEST, files_of
from retrieval.snapshot.object_storage import ObjectStorage, object_store
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.storage import LEASE
from retrieval.snapshot.store import open_snapshot
from tests.s3 import s3_server, s3_url  # noqa: F401
from tests.snapshot.make import publish

SECONDS = 0.4


@pytest.fixture
def storage(s3_url: str, tmp_path: Path) -> ObjectStorage:  # noqa: F811
    return ObjectStorage(s3_url, object_store(s3_url), tmp_path / "here", lease_seconds=SECONDS)


@pytest.fixture
def registry(storage: ObjectStorage) -> Registry:
    registry = Registry(storage.url, storage)
    publish(registry)
    return registry


def elsewhere(storage: ObjectStorage, cache: Path) -> Registry:
    """The same registry, seen from another machine."""
    return Registry(storage.url, ObjectStorage(storage.url, storage._store, cache, lease_seconds=SECONDS))


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes from here on hold leases without a sign of life."""
    monkeypatch.setattr(object_storage._Lease, "_beat", lambda self: None)


def test_a_lease_that_shows_no_sign_of_life_passes_on_and_its_holder_publishes_nothing(
    registry: Registry, storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, there = registry.current(), elsewhere(storage, tmp_path / "there")
    silent(monkeypatch)
    with registry.lease():
        second = publish(there, seed=1)
        assert second.startswith("000003-"), "the token of the lease that was lost is nobody's number any more"
        with pytest.raises(SnapshotConflictError, match="gave no sign of life; nothing was published"):
            publish(registry, seed=2)
        with pytest.raises(SnapshotConflictError, match="gave no sign of life"):
            registry.prune(1)
    assert there.current() == second
    assert there.versions() == [first, second]


def test_a_holder_that_lost_its_lease_to_one_who_has_not_published_yet_publishes_nothing(
    registry: Registry, storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = elsewhere(storage, tmp_path / "there")
    silent(monkeypatch)
    with registry.lease(), there.lease():
        with pytest.raises(SnapshotConflictError, match="was taken over by"):
            publish(registry, seed=2)
        assert publish(there, seed=1) == there.current()


def test_a_lease_is_kept_for_as_long_as_its_holder_lives(
    registry: Registry, storage: ObjectStorage, tmp_path: Path
) -> None:
    there = elsewhere(storage, tmp_path / "there")
    with registry.lease():
        for _ in range(3):
            with pytest.raises(RegistryBusyError, match="another rebuild is at work there"):
                publish(there)
    assert publish(there, seed=1) == there.current()


def test_a_lease_that_makes_no_sense_is_refused(registry: Registry, storage: ObjectStorage) -> None:
    obstore.put(storage._store, LEASE, b"?")
    with pytest.raises(SnapshotError, match="is not a lease"):
        publish(registry)


def test_publishing_that_dies_before_any_request_leaves_the_live_snapshot_whole(
    registry: Registry, storage: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    silent(monkeypatch)
    outcomes = []
    for left in range(1, 12):
        live = registry.current()
        remaining = left

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal remaining
                remaining -= 1
                if remaining <= 0:
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            names = {name: dying(getattr(obstore, name)) for name in ("put", "delete")}
            patch.setattr(object_storage, "obstore", SimpleNamespace(get=obstore.get, list=obstore.list, **names))
            try:
                publish(elsewhere(storage, tmp_path / "dying"), seed=left)
                outcomes.append("done")
            except Killed:
                outcomes.append("killed")
        there = elsewhere(storage, tmp_path / f"there-{left}")
        assert open_snapshot(there.folder(there.current())).version == there.current()
        if outcomes[-1] == "done":
            break
        if there.current() == live:
            assert live in there.versions()
    assert outcomes.count("killed") >= 8
    assert outcomes[-1] == "done"
    versions = registry.versions()
    assert publish(registry, seed=50) == registry.current()
    assert registry.versions() == [*versions, registry.current()]
    assert set(storage._listing()) == set(registry.versions()), "uploads that were cut short are swept"


def test_a_write_whose_answer_was_lost_is_known_when_it_is_sent_again(storage: ObjectStorage) -> None:
    tag = storage._write("OBJECT", b"1", None)
    assert storage._write("OBJECT", b"1", None) == tag
    after = storage._write("OBJECT", b"2", tag)
    assert storage._write("OBJECT", b"2", tag) == after
    for instead_of in (None, tag):
        with pytest.raises(SnapshotConflictError, match="OBJECT: was changed by somebody else"):
            storage._write("OBJECT", b"3", instead_of)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a flipped bit": (lambda content: content[:9] + bytes([content[9] ^ 1]) + content[10:], "SHA-256 differs"),
    "cut short": (lambda content: content[:-1], "cut short"),
    "trailing bytes": (lambda content: content + b"\0", "1 trailing bytes"),
    "a hole": (lambda content: bytes(len(content)), "SHA-256 differs"),
}


@pytest.mark.parametrize("name", files_of(IndexSpec()))
def test_a_damaged_object_is_not_copied(registry: Registry, storage: ObjectStorage, tmp_path: Path, name: str) -> None:
    version = registry.current()
    key = f"{version}/{name}"
    content = bytes(obstore.get(storage._store, key).bytes())
    there = elsewhere(storage, tmp_path / "there")
    for damage, sentence in DAMAGE.values():
        obstore.put(storage._store, key, damage(content))
        with pytest.raises(SnapshotCorruptError, match=f"{version}/{name}: .*{sentence}"):
            there.folder(version)
    obstore.delete(storage._store, key)
    with pytest.raises(SnapshotCorruptError, match=f"{name}: is missing"):
        there.folder(version)
    assert not [path for path in (tmp_path / "there").iterdir() if path.is_dir()]
    obstore.put(storage._store, key, content)
    assert sha256_of(there.folder(version) / name) == registry.manifest(version).files[name].sha256


@pytest.mark.parametrize("name", ["extra.bin", "below/extra.bin", "below/../../../outside"])
def test_an_object_that_does_not_belong_is_refused(
    registry: Registry, storage: ObjectStorage, tmp_path: Path, name: str
) -> None:
    listing = storage._listing()
    listing[registry.current()][name] = 1
    there = elsewhere(storage, tmp_path / "there")
    there._storage._listing = lambda version=None: listing  # type: ignore[attr-defined]
    with pytest.raises(SnapshotCorruptError, match=f"{name}: does not belong"):
        there.folder(registry.current())


def test_a_damaged_manifest_and_a_manifest_of_another_version_are_refused(
    registry: Registry, storage: ObjectStorage, tmp_path: Path
) -> None:
    first, second = registry.current(), publish(registry, seed=1)
    content = storage.manifest(second)
    for wrong in (storage.manifest(first), content[:-1], b""):
        obstore.put(storage._store, f"{second}/{MANIFEST}", wrong)
        for use in (registry.manifest, elsewhere(storage, tmp_path / "there").folder):
            with pytest.raises(SnapshotCorruptError, match=f"{MANIFEST}: differs from the manifest"):
                use(second)


def test_a_copy_that_was_damaged_is_copied_again_and_old_copies_leave(
    registry: Registry, storage: ObjectStorage, tmp_path: Path
) -> None:
    versions = [registry.current(), *(publish(registry, seed) for seed in (1, 2))]
    there = elsewhere(storage, tmp_path / "there")
    folder = there.folder(versions[0])
    (folder / "index.faiss").write_bytes(b"?")
    open_snapshot(there.folder(versions[0]))
    for version in versions[1:]:
        there.folder(version)
    assert {path.name for path in (tmp_path / "there").iterdir() if path.is_dir()} == set(versions[1:])
    open_snapshot(there.folder(versions[0]))
    assert versions[0] in {path.name for path in (tmp_path / "there").iterdir()}


@pytest.mark.usefixtures("s3_url")
def test_a_bucket_that_is_not_there_is_not_taken_for_an_empty_registry() -> None:
    registry = Registry("s3://no-such-bucket-here/items")
    for use in (registry.current, lambda: publish(registry)):
        with pytest.raises(SnapshotError, match=r"^s3://no-such-bucket-here/items: there is no such bucket$"):
            use()


def test_the_commands_take_a_url(
    registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = registry.current(), publish(registry, seed=1)
    url = str(registry.location)
    said = []
    for action in (["list"], ["show"], ["verify"], ["rollback"], ["prune", "--keep", "1"]):
        assert main(["snapshots", action[0], url, *action[1:], "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == f'{{"current": "{second}", "versions": ["{first}", "{second}"]}}\n'
    assert '"format":3' in said[1]
    assert said[2] == f'{{"version": "{second}", "verified": true}}\n'
    assert said[3] == f'{{"current": "{first}", "was": "{second}"}}\n'
    assert said[4] == f'{{"removed": [], "versions": ["{first}", "{second}"]}}\n'
    assert registry.current() == first


def test_a_folder_needs_no_package_for_object_stores() -> None:
    script = "import sys, retrieval.snapshot.registry as r; r.Registry('x'); print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
