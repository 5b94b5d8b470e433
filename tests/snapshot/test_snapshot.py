"""Real snapshots on disk, published, opened, damaged and rolled back."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from retrieval.encoder.inference import item_vectors
from retrieval.errors import RetrievalError, SnapshotCorruptError, SnapshotError
from retrieval.files import sha256_of
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import MANIFEST, version_name
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.snapshot.make import ITEMS, publish, writer


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    publish(registry)
    return registry


def test_a_published_snapshot_opens_and_answers(registry: Registry) -> None:
    snapshot = open_snapshot(registry.folder(registry.current()))
    vectors = item_vectors(snapshot.encoder)
    assert snapshot.searcher.search(vectors, [1] * ITEMS).rows[:, 0].tolist() == list(range(ITEMS))
    assert snapshot.vocabulary.ids_of(np.array([3])) == ["item-3"]
    assert snapshot.popular[:2].tolist() == [4, 9]
    assert snapshot.version == registry.current()


def test_the_manifest_says_what_was_published(registry: Registry) -> None:
    first = registry.current()
    second = registry.publish(writer(1, parent=first))
    manifest = registry.manifest(second)
    assert manifest.parent == first
    assert manifest.items == ITEMS
    assert manifest.model == manifest.files["encoder.safetensors"].sha256 != registry.manifest(first).model
    assert manifest.vocabulary == registry.manifest(first).vocabulary
    assert manifest.trained_on is not None
    assert manifest.trained_on.last - manifest.trained_on.first == 86_400
    assert [gate.gate for gate in manifest.gates] == ["ann-recall"]
    assert {"retrieval", "python", "torch", "faiss", "pyarrow", "safetensors"} == set(manifest.tools)


def test_an_index_over_another_encoders_items_is_not_published(registry: Registry) -> None:
    with pytest.raises(SnapshotCorruptError, match="encoder and index do not belong together"):
        registry.publish(writer(1, index_of=2))
    assert len(registry.versions()) == 1


def test_an_index_of_another_night_is_refused_even_where_the_checksums_were_made_to_agree(registry: Registry) -> None:
    first = registry.folder(registry.current())
    second = registry.folder(publish(registry, seed=1))
    shutil.copy(first / "index.faiss", second / "index.faiss")
    files = json.loads((second / MANIFEST).read_text())["files"]
    files["index.faiss"]["sha256"] = sha256_of(second / "index.faiss")
    with pytest.raises(SnapshotCorruptError, match="encoder and index do not belong together"):
        open_snapshot(rewrite_manifest(second, files=files))


def test_an_index_of_lists_has_a_file_of_its_own(registry: Registry) -> None:
    version = publish(registry, expired=[2], spec=IndexSpec(factory="IVF3,Int8", search={"nprobe": 3}))
    assert "index.safetensors" in registry.manifest(version).files
    snapshot = open_snapshot(registry.folder(version))
    vectors = item_vectors(snapshot.encoder)
    found = snapshot.searcher.search(vectors, [1] * ITEMS).rows[:, 0].tolist()
    assert [row for row in range(ITEMS) if found[row] != row] == [2]


FILES = ("encoder.json", "encoder.safetensors", "index.faiss", "report.json", "vocabulary.arrow", MANIFEST)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused(registry: Registry, name: str) -> None:
    folder = registry.folder(registry.current())
    content = (folder / name).read_bytes()
    rng = np.random.default_rng(0)
    for place in {0, len(content) - 1, *rng.integers(0, len(content), 30).tolist()}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(flipped)
        with pytest.raises(SnapshotCorruptError, match=name):
            open_snapshot(folder)
    (folder / name).write_bytes(content)
    open_snapshot(folder)


@pytest.mark.parametrize("name", FILES)
def test_truncation_trailing_bytes_holes_and_absence_are_refused(registry: Registry, name: str) -> None:
    folder = registry.folder(registry.current())
    content = (folder / name).read_bytes()
    hole = bytearray(content)
    hole[len(hole) // 3 : len(hole) // 2] = bytes(len(hole) // 2 - len(hole) // 3)
    for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"\0", bytes(hole)):
        (folder / name).write_bytes(damaged)
        with pytest.raises(SnapshotCorruptError, match=name):
            open_snapshot(folder)
    (folder / name).unlink()
    with pytest.raises(SnapshotError, match=name):
        open_snapshot(folder)


def test_expired_items_are_in_no_answer_and_still_in_the_encoder(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    snapshot = open_snapshot(registry.folder(publish(registry, expired=[0, 5])))
    assert (snapshot.manifest.items, snapshot.manifest.expired) == (ITEMS, 2)
    assert np.flatnonzero(~snapshot.served).tolist() == [0, 5]
    found = snapshot.searcher.search(item_vectors(snapshot.encoder), [ITEMS] * ITEMS).rows
    others = [row for row in range(ITEMS) if row not in (0, 5)]
    assert all(sorted(rows[rows >= 0].tolist()) == others for rows in found)
    assert sorted(snapshot.popular.tolist()) == others
    assert snapshot.vocabulary.rows_of(["item-5"]).tolist() == [5]


def test_a_manifest_that_counts_other_expired_items_is_refused(registry: Registry) -> None:
    folder = rewrite_manifest(registry.folder(registry.current()), expired=1)
    with pytest.raises(SnapshotCorruptError, match="are not those of the manifest"):
        open_snapshot(folder)


@pytest.mark.parametrize("name", ["encoder.safetensors", "index.faiss", "vocabulary.arrow", "encoder.json"])
def test_a_file_of_another_night_is_refused(registry: Registry, name: str) -> None:
    first = registry.folder(registry.current())
    second = registry.folder(publish(registry, seed=1))
    assert (first / name).read_bytes() != (second / name).read_bytes()
    shutil.copy(first / name, second / name)
    with pytest.raises(SnapshotCorruptError, match=name):
        open_snapshot(second)


def test_a_file_that_does_not_belong_is_refused(registry: Registry) -> None:
    folder = registry.folder(registry.current())
    (folder / "extra.bin").write_bytes(b"?")
    with pytest.raises(SnapshotCorruptError, match=r"extra\.bin: does not belong"):
        open_snapshot(folder)


def test_a_link_out_of_the_folder_is_not_followed(registry: Registry, tmp_path: Path) -> None:
    folder = registry.folder(registry.current())
    shutil.move(folder / "index.faiss", tmp_path / "elsewhere")
    (folder / "index.faiss").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotCorruptError, match="not a plain file"):
        open_snapshot(folder)


def rewrite_manifest(folder: Path, **changes: object) -> Path:
    """Change the manifest and name the folder as if it had been published so."""
    values = json.loads((folder / MANIFEST).read_text()) | changes
    content = json.dumps(values).encode()
    (folder / MANIFEST).write_bytes(content)
    return folder.rename(folder.with_name(version_name(1, content)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 4}, "format 4 is newer than the format 3 that this version reads; upgrade it"),
        ({"format": 1}, "format 1 is none of the formats 2 and 3"),
        ({"format": None}, "format None is none of the formats 2 and 3"),
        ({"items": 13}, "are not those of the manifest"),
        ({"width": 9}, "are not those of the manifest"),
        ({"model": "0" * 64}, "are not those of the manifest"),
        ({"vocabulary": "0" * 64}, "are not those of the manifest"),
        ({"surprise": 1}, "surprise"),
        ({"parent": "../000001-000000000000"}, "parent"),
        ({"files": {}}, "files: must be encoder.json, .* not none"),
        ({"files": {"../CURRENT": {"bytes": 1, "sha256": "0" * 64}}}, r"not \.\./CURRENT"),
    ],
)
def test_a_manifest_that_cannot_be_honoured_is_refused(
    registry: Registry, changes: dict[str, object], sentence: str
) -> None:
    folder = rewrite_manifest(registry.folder(registry.current()), **changes)
    with pytest.raises(RetrievalError, match=sentence):
        open_snapshot(folder)


def test_publishing_killed_at_any_moment_leaves_the_live_snapshot_whole(registry: Registry) -> None:
    """kill -9 in real processes, at moments spread over the whole of publishing."""
    live = registry.current()
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from retrieval.snapshot.registry import Registry
        from tests.snapshot.make import publish
        left = int(sys.argv[1])
        def die(event, arguments):
            global left
            if event in ("open", "os.rename", "os.remove", "os.rmdir") and "registry" in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        publish(Registry(Path({str(registry.location)!r})), seed=5)
        print("published")
    """)
    killed = 0
    for moment in range(1, 60, 6):
        process = subprocess.run(
            [sys.executable, "-c", script, str(moment)], capture_output=True, text=True, check=False, cwd=Path.cwd()
        )
        now = registry.current()
        assert open_snapshot(registry.folder(now)).version == now
        if process.returncode == 0:
            assert process.stdout == "published\n"
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
        killed += 1
        assert now == live or moment > 20, "the live version changed before the new one was complete"
    assert killed >= 3
    assert publish(registry, seed=6) == registry.current()
