"""Exact search by scoring every row: the way out when an index cannot fill an answer, and the answer among few rows.

Shape legend: B queries, N vectors, D width, K answers per query.
"""

from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["prefer_products", "scan"]

_SCAN_ROWS: Final = 1 << 16
# From so many queries on, one matrix product beats scoring vector by vector. Measured: see docs/filters.md.
_QUERIES_PER_PRODUCT: Final = 8


def prefer_products(width: int) -> None:
    """Let Faiss score vectors of this width by matrix products from 8 queries on; its default waits for thousands.

    The setting belongs to the whole process and changes speed only, so it is made before each search.
    """
    faiss.cvar.distance_compute_blas_threshold = _QUERIES_PER_PRODUCT * width


def scan(
    vectors: NDArray, queries: NDArray[np.float32], fetch: int, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best of some rows by scoring them all, best first: rows int64 and scores float32 `[B, fetch]`.

    Args:
        vectors: `[N, D]`, possibly memory-mapped.
        queries: `[B, D]`.
        fetch: how many, at most as many as there are rows.
        rows: which rows, ascending; None for all.
    """
    total = len(vectors) if rows is None else len(rows)
    assert 0 < fetch <= total
    prefer_products(vectors.shape[1])
    best_places: NDArray[np.int64] | None = None
    best_scores: NDArray[np.float32] | None = None
    for start in range(0, total, _SCAN_ROWS):
        stop = min(start + _SCAN_ROWS, total)
        block = vectors[start:stop] if rows is None else vectors[rows[start:stop]]
        block = np.ascontiguousarray(block, np.float32)
        scores, places = faiss.knn(queries, block, min(fetch, stop - start), metric=faiss.METRIC_INNER_PRODUCT)
        places += start
        if best_scores is None or best_places is None:
            best_places, best_scores = places, scores
            continue
        scores, places = np.hstack([best_scores, scores]), np.hstack([best_places, places])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :fetch]
        best_places = np.take_along_axis(places, order, axis=1)
        best_scores = np.take_along_axis(scores, order, axis=1)
    assert best_places is not None
    assert best_scores is not None
    return best_places if rows is None else rows[best_places], best_scores
