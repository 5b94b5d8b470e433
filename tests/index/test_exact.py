"""Scans against a float64 oracle, across the sizes at which they change their ways."""

import numpy as np
import pytest

from retrieval.index import exact
from retrieval.index.attributes import Eligible
from retrieval.index.codes import library
from retrieval.index.exact import Scanner, scan


@pytest.mark.parametrize("queries", [1, 7, 8, 40])
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_scan_in_blocks_finds_the_best_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, queries: int, some: bool, compiled: bool
) -> None:
    monkeypatch.setattr(exact, "_SCAN_ROWS", 64)
    if not compiled:
        monkeypatch.setattr(exact, "library", lambda: None)
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


def test_a_scanner_keeps_codes_of_the_sets_that_it_met_last_within_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(1)
    vectors, asked = rng.normal(size=(900, 16)).astype(np.float32), rng.normal(size=(3, 16)).astype(np.float32)
    masks = rng.random((4, 900)) < 0.3
    masks[3] = True
    sets = [Eligible.of(mask) for mask in masks]
    monkeypatch.setattr(exact, "_KEPT_BYTES", 18_500)  # codes of two sets; not those of all items
    scanner = Scanner(vectors)
    scores = asked @ vectors.T
    for met in (0, 1, 0, 2, 0, 3, 1):
        expected = np.sort(np.where(masks[met], scores, -np.inf), axis=1)[:, ::-1][:, :50]
        rows, found = scanner.scan(asked, 50, sets[met])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert masks[met][rows].all()
    assert list(scanner._kept) == [sets[0], sets[1]]
    assert sum(codes.bytes for codes in scanner._kept.values()) <= 18_500
