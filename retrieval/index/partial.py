"""An index over some rows of a table, seen as one whose answers are rows of the whole table.

Shape legend: N rows of the table, M of them in the index, D width, B queries, K answers.
"""

import weakref

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
        # As long as a bitmap of rows is held, by its identity, so is that of the index's own items.
        self._inner_bitmaps: dict[int, NDArray[np.uint8]] = {}

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
        of_inner = None if allowed is None else self._of_inner(allowed)
        found = self._inner.search(queries, k, allowed=of_inner, effort=effort)
        return SearchResult(rows=np.where(found.rows >= 0, self._rows[found.rows], -1), scores=found.scores)

    def _of_inner(self, allowed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A bitmap of rows as one of the index's items: made once, since that reads all of it."""
        found = self._inner_bitmaps.get(id(allowed))
        if found is None:
            mask = np.unpackbits(allowed, count=len(self.vectors), bitorder="little")
            found = self._inner_bitmaps[id(allowed)] = np.packbits(mask[self._rows], bitorder="little")
            weakref.finalize(allowed, self._inner_bitmaps.pop, id(allowed), None).atexit = False
        return found
