from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.index import backend, builder
from retrieval.index.backend import write_flat
from retrieval.index.builder import build_index, open_index
from retrieval.index.spec import IndexSpec

VECTORS = np.eye(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (IndexSpec(factory="Nonsense"), "'Nonsense' cannot be built over 8 items: could not parse"),
        (IndexSpec(factory="IVF9,Flat"), "Number of training points"),
        (IndexSpec(search={"nprobe": 4}), "takes no parameter nprobe=4"),
    ],
)
def test_an_impossible_index_is_named(spec: IndexSpec, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_index(VECTORS, spec)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(value: float) -> None:
    broken = VECTORS.copy()
    broken[3, 1] = value
    with pytest.raises(InputError, match="1 items are not finite, the first at row 3"):
        build_index(broken, IndexSpec())


@pytest.mark.parametrize("shape", [(8,), (8, 0), (2, 2, 2)])
def test_what_is_no_table_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="are not a row of numbers for each item"):
        build_index(np.zeros(shape, np.float32), IndexSpec())


@pytest.mark.parametrize("spec", [IndexSpec(), IndexSpec(factory="IVF1,Int8")])
def test_few_items_zeros_and_copies_are_ordinary(spec: IndexSpec) -> None:
    vectors = np.zeros((3, 4), np.float32)
    vectors[1:, 0] = 1
    found = build_index(vectors, spec).search(np.eye(4, dtype=np.float32)[:2], 5)
    assert found.rows.tolist() == [[1, 2, 0, -1, -1], [0, 1, 2, -1, -1]]


def test_no_items_give_no_answers() -> None:
    found = build_index(np.zeros((0, 4), np.float32), IndexSpec()).search(np.ones((1, 4), np.float32), 2)
    assert found.rows.tolist() == [[-1, -1]]


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "SQbf16", "IVF2,Int8", "IVF2,Flat"])
def test_a_written_index_answers_as_before(tmp_path: Path, factory: str) -> None:
    spec = IndexSpec(factory=factory, search={"nprobe": 2} if factory.startswith("IVF") else {})
    index = build_index(VECTORS, spec)
    index.save(tmp_path / spec.file)
    again = open_index(tmp_path / spec.file, spec, VECTORS)
    mine, theirs = index.search(VECTORS, 3), again.search(VECTORS, 3)
    np.testing.assert_array_equal(mine.rows, theirs.rows)
    np.testing.assert_array_equal(mine.scores, theirs.scores)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    for spec in (IndexSpec(), IndexSpec(factory="IVF2,Int8")):
        (tmp_path / spec.file).write_bytes(b"no index at all")
        with pytest.raises(SnapshotCorruptError, match=rf"{spec.file}: is not a readable"):
            open_index(tmp_path / spec.file, spec, VECTORS)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_file_of_an_exact_index_is_the_one_that_faiss_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(backend, "_WRITTEN", 128)
    vectors = np.random.default_rng(0).normal(size=(count, 7)).astype(np.float32)
    index = faiss.IndexFlatIP(7)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "faiss"))
    write_flat(vectors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "faiss").read_bytes()


@pytest.mark.parametrize("factory", ["IVF4,Flat", "IVF4,PQ2x4fs,RFlat", "HNSW8"])
def test_faiss_takes_items_in_blocks_and_tells_of_each(monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    monkeypatch.setattr(builder, "_ADDED", 130)
    vectors = np.random.default_rng(1).normal(size=(400, 8)).astype(np.float32)
    told: list[tuple[int, int]] = []
    index = build_index(vectors, IndexSpec(factory=factory), report=lambda *what: told.append(what))
    assert told == [(done, 400) for done in (0, 130, 260, 390, 400)]
    assert index.count == 400
    assert index.search(vectors[399:], 1).rows.tolist() == [[399]], "a row is its place in the whole"
