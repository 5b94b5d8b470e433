"""Damage to every file of a snapshot, by the hundreds: all of it is refused, and nothing crashes the reader.

The environment's RETRIEVAL_CORRUPTIONS says how many damages of each kind every file gets (20 by default; a thorough
run takes 1000).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval.errors import SnapshotError
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import MANIFEST, files_of, version_name
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.snapshot.make import publish

FILES = files_of(IndexSpec())
COUNT = int(os.environ.get("RETRIEVAL_CORRUPTIONS", "20"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two versions."""
    registry = Registry(tmp_path_factory.mktemp("corruption"))
    first, second = (registry.folder(publish(registry, seed)) for seed in (0, 1))
    return first, second


def flipped(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """1 to 8 bits the other way."""
    damaged = bytearray(content)
    for place in rng.choice(8 * len(content), rng.integers(1, 9), replace=False):
        damaged[place // 8] ^= 1 << (place % 8)
    return bytes(damaged)


def truncated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The beginning."""
    return content[: rng.integers(len(content))]


def trailed(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """More at the end."""
    return content + rng.bytes(int(rng.integers(1, 100)))


def holed(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A run of zeros, where there were none before."""
    while True:
        start, stop = np.sort(rng.integers(0, len(content) + 1, 2))
        damaged = content[:start] + bytes(stop - start) + content[stop:]
        if damaged != content:
            return damaged


def shifted(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes missing or twice."""
    while True:
        start, stop = np.sort(rng.integers(0, len(content) + 1, 2))
        damaged = content[:stop] + content[start:] if rng.random() < 0.5 else content[:start] + content[stop:]
        if damaged != content:
            return damaged


def swapped(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """The other version's bytes, from somewhere on to somewhere."""
    while True:
        start, stop = np.sort(rng.integers(0, max(len(content), len(other)) + 1, 2))
        damaged = content[:start] + other[start:stop] + content[stop:]
        if damaged != content:
            return damaged


DAMAGE = (flipped, truncated, trailed, holed, shifted, swapped)


def damages(content: bytes, other: bytes, name: str, damage: Callable[..., bytes]) -> Iterator[bytes]:
    rng = np.random.default_rng([*name.encode(), *damage.__name__.encode()])
    for _ in range(COUNT):
        yield damage(content, other, rng)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_is_refused_by_the_name_of_the_file(
    pair: tuple[Path, Path], name: str, damage: Callable[..., bytes]
) -> None:
    folder, other = pair
    content = (folder / name).read_bytes()
    try:
        for damaged in damages(content, (other / name).read_bytes(), name, damage):
            (folder / name).write_bytes(damaged)
            with pytest.raises(SnapshotError, match=name):
                open_snapshot(folder)
    finally:
        (folder / name).write_bytes(content)
    open_snapshot(folder)


def test_a_whole_file_of_any_other_name_or_version_is_refused(pair: tuple[Path, Path]) -> None:
    folder, other = pair
    for name in (*FILES, MANIFEST):
        content = (folder / name).read_bytes()
        try:
            for source in (*(folder / one for one in FILES), *(other / one for one in (*FILES, MANIFEST))):
                if source.read_bytes() == content:
                    continue
                (folder / name).write_bytes(source.read_bytes())
                with pytest.raises(SnapshotError, match=name):
                    open_snapshot(folder)
        finally:
            (folder / name).write_bytes(content)
    open_snapshot(folder)


def test_a_manifest_damaged_before_its_version_was_named_is_refused_in_one_sentence(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its hash is right, so that what is read is the damage itself."""
    content = (pair[0] / MANIFEST).read_bytes()
    texts = [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{",
        b"[" * 100_000,
        b'{"format": 1e999}',
        b'{"format": true}',
        b"\xff",
    ]
    for damage in DAMAGE:
        texts += damages(content, (pair[1] / MANIFEST).read_bytes(), MANIFEST, damage)
    for number, text in enumerate(texts):
        folder = tmp_path / version_name(number, text)
        folder.mkdir()
        (folder / MANIFEST).write_bytes(text)
        with pytest.raises(SnapshotError) as refused:
            open_snapshot(folder)
        assert str(folder) in str(refused.value)
        assert len(str(refused.value)) < 1000
