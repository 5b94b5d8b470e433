"""Searching with a full answer guaranteed, whatever the index leaves out."""

from collections.abc import Sequence

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.exact import best_first, exact_search, no_answers
from retrieval.types import SearchResult

__all__ = ["Searcher"]


class Searcher:
    """An immutable handle on an index and the vectors in it.

    Every query gets exactly min(k, items not excluded) answers, best first, equal scores in the order of
    `tie_rank`. Excluded items cost no recall: so many more are fetched, then dropped. Where an approximate index
    still comes up short, or equal scores straddle what was fetched, that query is answered by exact search.

    Args:
        index: a Faiss index whose labels are rows.
        vectors: the embeddings in it, float32 `[N, D]`.
        tie_rank: order among equal scores, int64 `[N]`.
    """

    def __init__(self, index: faiss.Index, vectors: NDArray[np.float32], tie_rank: NDArray[np.int64]) -> None:
        assert index.ntotal == len(vectors) == len(tie_rank)
        assert index.d == vectors.shape[1]
        self._index, self._vectors, self._tie_rank = index, vectors, tie_rank

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return int(self._vectors.shape[1])

    def search(
        self, queries: NDArray[np.float32], ks: Sequence[int], excluded: Sequence[NDArray[np.int64]] | None = None
    ) -> SearchResult:
        """Find the best items of each query.

        Args:
            queries: finite user embeddings, float32 `[B, D]`.
            ks: answers wanted by each query, at least 1.
            excluded: rows that each query must not get, without repeats; None excludes nothing.

        Returns:
            Answers `[B, max(ks)]`, −1 past the last answer of a query.
        """
        without = excluded if excluded is not None else [np.empty(0, np.int64)] * len(queries)
        result = no_answers(len(queries), max(ks, default=0))
        if len(queries) == 0 or len(self) == 0:
            return result
        # One more than needed shows whether the last place is shared by equal scores.
        fetch = min(len(self), max(k + len(rows) for k, rows in zip(ks, without, strict=True)) + 1)
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), fetch)
        for b, (k, dropped) in enumerate(zip(ks, without, strict=True)):
            found = self._answer(rows[b], scores[b], k, dropped)
            if found is None:
                exact = exact_search(self._vectors, queries[b : b + 1], [k], [dropped], self._tie_rank)
                found = exact.rows[0], exact.scores[0]
            count = len(found[0])
            result.rows[b, :count], result.scores[b, :count] = found
        return result

    def _answer(
        self, rows: NDArray[np.int64], scores: NDArray[np.float32], k: int, dropped: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """The answer to one query, or None if what was fetched does not determine it."""
        keep = rows >= 0
        if len(dropped):
            keep &= ~np.isin(rows, dropped)
        kept, kept_scores = rows[keep], scores[keep]
        wanted = min(k, len(self) - len(dropped))
        if len(kept) < wanted:
            return None
        fetched_all = len(rows) == len(self)
        if wanted and not fetched_all and kept_scores[wanted - 1] == scores[-1]:
            return None
        return best_first(kept, kept_scores, wanted, self._tie_rank)
