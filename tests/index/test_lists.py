"""Lists: deterministic, built in shards that survive a kill, and read from a file that is not trusted."""

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.index import lists as module
from retrieval.index.builder import build_index, open_index
from retrieval.index.lists import Lists, build_lists, load_lists, save_lists
from retrieval.index.spec import IndexSpec

COUNT, WIDTH = 1000, 12


def catalogue(seed: int = 0) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(COUNT, WIDTH)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def assert_equal(one: Lists, other: Lists) -> None:
    for name in Lists.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_every_item_lies_around_the_centre_nearest_to_it() -> None:
    vectors = catalogue()
    lists = build_lists(vectors, 8)
    assert sorted(lists.order.tolist()) == list(range(COUNT))
    mine = np.repeat(np.arange(8), lists.counts)
    distances = ((vectors[lists.order, None] - lists.centres[None]) ** 2).sum(2)
    np.testing.assert_allclose(distances[np.arange(COUNT), mine], distances.min(1), atol=1e-6)


def test_neither_shards_nor_threads_nor_a_file_in_between_change_the_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = catalogue()
    expected = build_lists(vectors, 8)
    np.save(tmp_path / "vectors.npy", vectors)
    monkeypatch.setattr(module, "_SHARD", 130)
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: 3)
    told: list[tuple[int, int]] = []
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert_equal(build_lists(mapped, 8, report=lambda done, total: told.append((done, total))), expected)
    assert told[0] == (130, COUNT)
    assert told[-1] == (COUNT, COUNT)


def test_a_build_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = catalogue()
    expected = build_lists(vectors, 8)
    monkeypatch.setattr(module, "_SHARD", 100)
    monkeypatch.setattr(faiss, "omp_get_max_threads", lambda: 1)

    def killed(done: int, total: int) -> None:
        if done >= 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lists(vectors, 8, work=tmp_path, report=killed)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("nearest-*.npy")}
    assert len(done) >= 4
    (tmp_path / "nearest-900.unfinished.npy").write_bytes(b"half")

    def never(*args: object) -> None:
        raise AssertionError("is trained already")

    monkeypatch.setattr(module, "_trained", never)
    assert_equal(build_lists(vectors, 8, work=tmp_path), expected)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_work_on_other_embeddings_is_not_taken_up(tmp_path: Path) -> None:
    build_lists(catalogue(), 8, work=tmp_path)
    for vectors, count in ((catalogue(1), 8), (catalogue(), 9)):
        with pytest.raises(InputError, match="holds the beginnings of an index of other embeddings"):
            build_lists(vectors, count, work=tmp_path)


def test_as_many_lists_as_items_or_items_alike_are_no_trouble_but_more_lists_are_refused() -> None:
    vectors = catalogue()[:8]
    assert build_lists(vectors, 8).counts.tolist() == [1] * 8
    alike = build_lists(np.repeat(vectors[:1], 50, axis=0), 4)
    assert alike.counts.sum() == 50
    with pytest.raises(ConfigError, match="index 'IVF9,Int8' cannot be built over 8 items"):
        build_index(vectors, IndexSpec(factory="IVF9,Int8"))


def _swapped(lists: dict[str, NDArray]) -> None:
    lists["order"][0] = lists["order"][1]


def _beyond(lists: dict[str, NDArray]) -> None:
    lists["order"][5] = COUNT


def _negative(lists: dict[str, NDArray]) -> None:
    lists["counts"][:2] += [-2_000_000, 2_000_000]


def _short(lists: dict[str, NDArray]) -> None:
    lists["counts"][0] -= 1


def _not_finite(lists: dict[str, NDArray]) -> None:
    lists["centres"][1, 1] = np.nan


def _another_shape(lists: dict[str, NDArray]) -> None:
    lists["centres"] = lists["centres"][:-1]


def _another_type(lists: dict[str, NDArray]) -> None:
    lists["counts"] = lists["counts"].astype(np.float64)


def _too_many(lists: dict[str, NDArray]) -> None:
    lists["more"] = np.zeros(3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_swapped, "do not hold each item once"),
        (_beyond, "do not hold each item once"),
        (_negative, "do not hold each item once"),
        (_short, "do not hold each item once"),
        (_not_finite, "do not hold each item once"),
        (_another_shape, "is not an index of 8 lists over 1000 items of width 12"),
        (_another_type, "is not an index of 8 lists"),
        (_too_many, "is not an index of 8 lists"),
    ],
)
def test_a_file_that_would_lead_the_search_astray_is_refused(
    tmp_path: Path, change: Callable[[dict[str, NDArray]], None], sentence: str
) -> None:
    vectors, path = catalogue(), tmp_path / "index.safetensors"
    save_lists(build_lists(vectors, 8), vectors, path)
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(SnapshotCorruptError, match=sentence):
        load_lists(path, 8, vectors)


def test_lists_over_other_items_are_told_by_their_embeddings(tmp_path: Path) -> None:
    spec = IndexSpec(factory="IVF8,Int8", search={"nprobe": 8})
    build_index(catalogue(), spec).save(tmp_path / spec.file)
    rounded = catalogue().astype(np.float16).astype(np.float32)
    assert open_index(tmp_path / spec.file, spec, rounded).search(rounded[:1], 1).rows.tolist() == [[0]]
    with pytest.raises(SnapshotCorruptError, match="do not belong together"):
        open_index(tmp_path / spec.file, spec, catalogue(1))
