"""Embeddings in files: whole or not at all, and the same from Arrow as from memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from retrieval.errors import DataError, InputError
from retrieval.index.builder import build_index
from retrieval.index.spec import IndexSpec
from retrieval.index.vectors import arrow_batches, keep_vectors, vectors_of

COUNT, WIDTH = 300, 6
VECTORS = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)


def lists(kind: str, values: NDArray[np.float32] = VECTORS) -> pa.Array:
    if kind == "fixed":
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), WIDTH)
    wide = {"list": pa.list_(pa.float32()), "large": pa.large_list(pa.float64()), "half": pa.list_(pa.float16(), WIDTH)}
    rows = list(values.astype(np.float16)) if kind == "half" else values.tolist()
    return pa.array(rows, wide[kind])


def written(path: Path, column: pa.Array) -> Path:
    table = pa.table({"id": np.arange(len(column)), "embedding": column})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=70)
        return path
    make = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
    with make(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


@pytest.mark.parametrize("name", ["items.parquet", "items.arrow", "items.arrows"])
@pytest.mark.parametrize("kind", ["fixed", "list", "large", "half"])
def test_embeddings_come_from_arrow_as_they_are_there(tmp_path: Path, name: str, kind: str) -> None:
    source = written(tmp_path / name, lists(kind))
    found = vectors_of(arrow_batches(source, "embedding"), "embedding", tmp_path / "items.npy")
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTORS.astype(np.float16) if kind == "half" else VECTORS)


def test_an_index_over_a_file_is_the_index_over_memory(tmp_path: Path) -> None:
    source = written(tmp_path / "items.parquet", lists("fixed"))
    mapped = vectors_of(arrow_batches(source, "embedding"), "embedding", tmp_path / "items.npy")
    for factory in ("Flat", "IVF4,Int8", "IVF4,Flat"):
        spec = IndexSpec(factory=factory)
        for name, vectors in (("one", VECTORS), ("other", mapped)):
            build_index(vectors, spec).save(tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        (pa.array([[1.0, 2.0], [1.0], [1.0, 2.0]]), "row 1: 1 values instead of 2"),
        (pa.array([[1.0, 2.0], None]), "has nulls between rows 0 and 2"),
        (pa.array([[1.0, 2.0], [None, 1.0]]), "has nulls between rows 0 and 2"),
        (pa.array([1.0, 2.0]), "holds double, not lists of floats"),
        (pa.array([["a"], ["b"]]), "holds list<.*string>, not lists of floats"),
        (pa.array([[], []], pa.list_(pa.float32())), "row 0: 0 values"),
        (pa.array([], pa.list_(pa.float32(), 3)), "there are no embeddings to keep"),
    ],
)
def test_what_is_no_column_of_embeddings_is_refused(tmp_path: Path, column: pa.Array, sentence: str) -> None:
    batches = [pa.record_batch({"x": column})]
    with pytest.raises(InputError, match=sentence):
        vectors_of(batches, "x", tmp_path / "items.npy")
    assert list(tmp_path.iterdir()) == []


def test_widths_that_differ_between_batches_are_refused(tmp_path: Path) -> None:
    batches = [pa.record_batch({"x": pa.array([[1.0] * width] * 2)}) for width in (3, 3, 4)]
    with pytest.raises(InputError, match="row 4: 4 values instead of 3"):
        vectors_of(batches, "x", tmp_path / "items.npy")


@pytest.mark.parametrize("name", ["items.parquet", "items.arrow"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        next(arrow_batches(tmp_path / name, "x"))
    (tmp_path / name).write_bytes(b"nothing of the kind" * 9)
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        next(arrow_batches(tmp_path / name, "x"))
    written(tmp_path / name, lists("fixed"))
    with pytest.raises(DataError, match=f"{name}: has no column 'x'"):
        next(arrow_batches(tmp_path / name, "x"))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = keep_vectors(tmp_path / "items.npy", iter([VECTORS[:10]]))

    def broken() -> Iterator[NDArray[np.float32]]:
        yield VECTORS[:20]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        keep_vectors(tmp_path / "items.npy", broken())
    assert [path.name for path in tmp_path.iterdir()] == ["items.npy"]
    np.testing.assert_array_equal(kept, VECTORS[:10])
    with pytest.raises(InputError, match="from row 10 on have 5 values instead of 6"):
        keep_vectors(tmp_path / "items.npy", iter([VECTORS[:10], VECTORS[:, :5]]))
