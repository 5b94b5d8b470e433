from pathlib import Path

import numpy as np
import pytest

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.index.builder import build_index, read_index, write_index
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


def test_a_written_index_answers_as_before(tmp_path: Path) -> None:
    spec = IndexSpec(factory="IVF2,Flat", search={"nprobe": 2})
    index = build_index(VECTORS, spec)
    write_index(index, tmp_path / "index.faiss")
    again = read_index(tmp_path / "index.faiss", spec)
    for mine, theirs in zip(index.search(VECTORS, 3), again.search(VECTORS, 3), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.faiss").write_bytes(b"no index at all")
    with pytest.raises(SnapshotCorruptError, match=r"index\.faiss: is not a readable Faiss index"):
        read_index(tmp_path / "index.faiss", IndexSpec())
