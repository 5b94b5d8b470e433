"""Exact search: the ground truth for every index, and the way out when an index cannot fill an answer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.types import SearchResult

__all__ = ["best_first", "exact_search", "no_answers"]


def no_answers(queries: int, k: int) -> SearchResult:
    """`[queries, k]` answers that are all empty, to be filled in."""
    return SearchResult(rows=np.full((queries, k), -1, np.int64), scores=np.full((queries, k), -np.inf, np.float32))


def best_first(
    rows: NDArray[np.int64], scores: NDArray[np.float32], k: int, tie_rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best of one query's candidates, highest score first, equal scores by `tie_rank[row]`."""
    order = np.lexsort((tie_rank[rows], -scores))[:k]
    return rows[order], scores[order]


def exact_search(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    ks: Sequence[int],
    excluded: Sequence[NDArray[np.int64]],
    tie_rank: NDArray[np.int64],
) -> SearchResult:
    """The best items by inner product, by scoring every item.

    Args:
        vectors: item embeddings `[N, D]`.
        queries: user embeddings `[B, D]`.
        ks: answers wanted by each query.
        excluded: rows that each query must not get.
        tie_rank: order among equal scores, int64 `[N]`.

    Returns:
        Answers `[B, max(ks)]`; query b has min(ks[b], items not excluded).
    """
    result = no_answers(len(queries), max(ks, default=0))
    for b, (k, without) in enumerate(zip(ks, excluded, strict=True)):
        scores = vectors @ queries[b]
        scores[without] = -np.inf
        eligible = int(np.count_nonzero(scores > -np.inf))
        k = min(k, eligible)
        if k == 0:
            continue
        # Everything that ties with the k-th best competes for the last places.
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero(scores >= threshold)
        result.rows[b, :k], result.scores[b, :k] = best_first(rows, scores[rows], k, tie_rank)
    return result
