"""Exact search by scoring every row: the way out when an index cannot fill an answer, and the answer among few rows.

Some rows are scored by 8-bit codes made of them on the spot (`codes`): making a code takes no longer than fetching the
vector, and scoring by it a fraction of that. All rows, or without a compiler, are scored by their vectors.

Shape legend: B queries, N vectors, D width, M rows of some, K answers per query.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.attributes import Eligible
from retrieval.index.codes import Codes, library

__all__ = ["Scanner", "keeps", "prefer_products", "scan"]

_SCAN_ROWS: Final = 1 << 16
_KEPT_BYTES: Final = 1 << 27
"""Codes of sets of rows that a scanner keeps; no set takes more than a quarter."""
_Best = tuple[NDArray[np.int64], NDArray[np.float32]]
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
    native = library() if rows is not None and _can_be_coded(vectors) else None

    def best_of(start: int, stop: int) -> _Best:
        if native is not None and rows is not None:
            found = Codes.of_rows(native, vectors, rows[start:stop]).search(queries, min(fetch, stop - start))
            return found.rows, found.scores
        prefer_products(vectors.shape[1])
        block = vectors[start:stop] if rows is None else vectors[rows[start:stop]]
        block = np.ascontiguousarray(block, np.float32)
        scores, places = faiss.knn(queries, block, min(fetch, stop - start), metric=faiss.METRIC_INNER_PRODUCT)
        return (places + start if rows is None else rows[places + start]), scores

    return _best_of_blocks(best_of, total, fetch)


def _can_be_coded(vectors: NDArray) -> bool:
    return vectors.dtype == np.float32 and vectors.flags.c_contiguous and len(vectors) < 2**31


def _best_of_blocks(best_of: Callable[[int, int], _Best], total: int, fetch: int) -> _Best:
    """The best of what each block gives, blocks being ranges of `total`."""
    best: _Best | None = None
    for start in range(0, total, _SCAN_ROWS):
        found = best_of(start, min(start + _SCAN_ROWS, total))
        if best is not None:
            rows, scores = np.hstack([best[0], found[0]]), np.hstack([best[1], found[1]])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :fetch]
            found = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        best = found
    assert best is not None
    return best


def keeps(vectors: NDArray, count: int) -> bool:
    """Whether a scanner keeps codes of so many of these vectors."""
    return _can_be_coded(vectors) and library() is not None and count * vectors.shape[1] <= _KEPT_BYTES / 4


class Scanner:
    """Scans among sets of rows that come again: the codes of those asked for last are kept.

    Args:
        vectors: `[N, D]`, possibly memory-mapped.
    """

    def __init__(self, vectors: NDArray) -> None:
        self._vectors = vectors
        self._kept: OrderedDict[Eligible, Codes] = OrderedDict()
        self._lock = threading.Lock()

    def scan(self, queries: NDArray[np.float32], fetch: int, eligible: Eligible) -> _Best:
        """As `scan`, among the rows of a set; two sets are the same if they are one object."""
        codes = self._codes(eligible)
        if codes is None:
            rows = eligible.rows if eligible.count < len(self._vectors) else None
            return scan(self._vectors, queries, fetch, rows)
        found = codes.search(queries, fetch)
        return found.rows, found.scores

    def _codes(self, eligible: Eligible) -> Codes | None:
        """Codes of a set's rows; None where it has too many to keep."""
        with self._lock:
            if eligible in self._kept:
                self._kept.move_to_end(eligible)
                return self._kept[eligible]
        native = library()
        if native is None or not keeps(self._vectors, eligible.count):
            return None
        codes = Codes.of_rows(native, self._vectors, eligible.rows)
        with self._lock:
            self._kept[eligible] = codes
            held = sum(other.bytes + set_.nbytes for set_, other in self._kept.items())
            while held > _KEPT_BYTES:
                set_, other = self._kept.popitem(last=False)
                held -= other.bytes + set_.nbytes
        return codes
