"""Scans against a float64 oracle, across the sizes at which they change their ways."""

import numpy as np
import pytest

from retrieval.index import exact
from retrieval.index.exact import scan


@pytest.mark.parametrize("queries", [1, 7, 8, 40])
@pytest.mark.parametrize("some", [False, True])
def test_a_scan_in_blocks_finds_the_best_of_its_rows(monkeypatch: pytest.MonkeyPatch, queries: int, some: bool) -> None:
    monkeypatch.setattr(exact, "_SCAN_ROWS", 64)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 12)).astype(np.float32)
    asked = rng.normal(size=(queries, 12)).astype(np.float32)
    rows = np.sort(rng.permutation(300)[:130]) if some else None
    considered = rows if rows is not None else np.arange(300)
    truth = asked.astype(np.float64) @ vectors.astype(np.float64).T
    for fetch in (1, 10, 100, len(considered)):
        found, scores = scan(vectors, asked, fetch, rows)
        best = np.sort(truth[:, considered], axis=1)[:, ::-1][:, :fetch]
        np.testing.assert_allclose(scores, best, atol=1e-5)
        np.testing.assert_allclose(scores, np.take_along_axis(truth, found, axis=1), atol=1e-5)
        assert np.isin(found, considered).all()
        assert all(len(set(row)) == fetch for row in found.tolist())


def test_a_scan_takes_vectors_of_half_precision() -> None:
    vectors = np.eye(9, dtype=np.float16)
    found, scores = scan(vectors, np.eye(9, dtype=np.float32)[4:5], 1)
    assert (found.tolist(), scores.tolist()) == ([[4]], [[1.0]])
