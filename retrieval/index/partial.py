"""An index over some rows of a table, seen as one whose answers are rows of the whole table.

Shape legend: N rows of the table, M of them in the index, D width, B queries, K answers.
"""

import numpy as np
from numpy.typing import NDArray

from retrieval.index.backend import IndexBackend
from retrieval.types import SearchResult

__all__ = ["PartialBackend"]


class PartialBackend:
    """See `IndexBackend`; `count` is M, and `vectors` are those of all rows, so that a row finds its own.

    Args:
        inner: the index; its i-th item is row `rows[i]`.
        vectors: embeddings of all rows, `[N, D]`.
        rows: those in the index, ascending, int64 `[M]`.
    """

    def __init__(self, inner: IndexBackend, vectors: NDArray, rows: NDArray[np.int64]) -> None:
        assert inner.count == len(rows)
        self.spec, self.vectors, self.max_k = inner.spec, vectors, inner.max_k
        self.supports_allowed, self.true_scores = inner.supports_allowed, inner.true_scores
        self._inner, self._rows = inner, rows

    @property
    def exact_from(self) -> float:
        """As the protocol says."""
        return self._inner.exact_from

    @property
    def count(self) -> int:
        """M."""
        return len(self._rows)

    @property
    def width(self) -> int:
        """D."""
        return self._inner.width

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """As the protocol says; `allowed` is a bitmap of rows of the table."""
        if allowed is not None:
            mask = np.unpackbits(allowed, count=len(self.vectors), bitorder="little")
            allowed = np.packbits(mask[self._rows], bitorder="little")
        found = self._inner.search(queries, k, allowed=allowed, effort=effort)
        return SearchResult(rows=np.where(found.rows >= 0, self._rows[found.rows], -1), scores=found.scores)
