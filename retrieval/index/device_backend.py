"""Exact search where the items are on a device: this room knows neither torch nor the device, only who scores.

Legend: B queries, N items, D width, K answers per query.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.index.spec import IndexSpec
from retrieval.types import SearchResult

__all__ = ["DeviceBackend", "ItemScorer"]


class ItemScorer(Protocol):
    """Holds the items on a device and scores them there. May be called from several threads."""

    def best(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None) -> SearchResult:
        """The k best of all items, or of those of a packed bitmap; answers `[B, K]`, −1 past the last."""
        ...


class DeviceBackend:
    """An index "Flat" behind the protocol of indexes; bitmaps are kept to, however many or few items they leave.

    Args:
        scorer: over these items.
        vectors: `[N, D]`, to find true scores by, in this machine's memory.
    """

    spec = IndexSpec()
    max_k: int | None = None
    true_scores = False
    supports_allowed = True
    exact_from = 1.0

    def __init__(self, scorer: ItemScorer, vectors: NDArray) -> None:
        self.vectors, self._scorer = vectors, scorer

    @property
    def count(self) -> int:
        """N."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """As the protocol says."""
        assert allowed is None or len(allowed) == math.ceil(self.count / 8)
        return self._scorer.best(np.ascontiguousarray(queries, np.float32), k, allowed)
