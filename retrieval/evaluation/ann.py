"""Recall of an index against exact search: how many of the true nearest items an approximate search returns."""

import numpy as np
from numpy.typing import NDArray

from retrieval.index.exact import scan
from retrieval.index.searcher import Searcher

__all__ = ["ann_recall"]


def ann_recall(searcher: Searcher, vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int = 100) -> float:
    """Mean share of a query's k answers that score no worse than the true k-th best item.

    Compared by score, with a tolerance for rounding, so that equally good items count as found (ann-benchmarks'
    rule).

    Args:
        searcher: the index.
        vectors: the embeddings in it, `[N, D]`.
        queries: embeddings of real users, `[B, D]`: they are not distributed like items.
        k: depth; the catalogue's size if that is smaller.
    """
    k = min(k, len(vectors))
    if not len(queries):
        return 1.0
    found = searcher.search(queries, [k] * len(queries))
    thresholds = scan(vectors, queries, k)[1][:, -1:]
    return float(np.mean(found.scores[:, :k] >= thresholds - 1e-5))
