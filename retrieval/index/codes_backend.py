"""Exact search, and lists of 8-bit codes, behind the protocol of indexes.

Legend: B queries, N items, D width, C lists, K answers per query.
"""

import copy
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError
from retrieval.index.backend import write_flat
from retrieval.index.codes import Codes, library
from retrieval.index.exact import scan
from retrieval.index.lists import REACH, Lists, radii, save_lists
from retrieval.index.spec import IndexSpec
from retrieval.types import SearchResult

__all__ = ["CodesBackend"]


class CodesBackend:
    """An index "Flat" or "IVFC,Int8": the answers are exact among the lists that are looked at, scores the true ones.

    Without a compiler items are scored by their float32 vectors: the same answers, later.

    Args:
        vectors: `[N, D]`, possibly memory-mapped.
        spec: what it is.
        lists: where its items lie; None for "Flat".

    Raises:
        ConfigError: the index has no such search parameter.
    """

    max_k: int | None = None
    supports_allowed = True

    def __init__(self, vectors: NDArray, spec: IndexSpec, lists: Lists | None = None) -> None:
        assert (lists is None) == (spec.lists is None)
        self.vectors: NDArray = np.ascontiguousarray(vectors, np.float32)
        self._lists = lists
        self._configure(spec)
        native, parts = library(), (lists.centres, lists.counts, lists.order) if lists is not None else ()
        self._codes = Codes(native, self.vectors, *parts) if native is not None else None
        self.true_scores = self._codes is not None
        self._reach = REACH * radii(lists, self.vectors) if self._codes is None and lists is not None else None

    def _configure(self, spec: IndexSpec) -> None:
        for name, value in spec.search.items():
            if name != "nprobe" or self._lists is None:
                raise ConfigError(f"index {spec.factory!r} takes no parameter {name}={value:g}")
            if value < 1 or value != int(value):
                raise ConfigError(f"index {spec.factory!r}: nprobe={value:g} is not a whole number of lists")
        self.spec, self._probes = spec, int(spec.search.get("nprobe", 1))

    @property
    def exact_from(self) -> float:
        """As the protocol says: an effort that looks into every list is exact."""
        return 1.0 if self._lists is None else max(1.0, len(self._lists.centres) / self._probes)

    @property
    def count(self) -> int:
        """N."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    @property
    def size(self) -> int:
        """As the protocol says."""
        if self._codes is not None:
            return self._codes.bytes
        return 0 if self._lists is None else self._lists.centres.nbytes + self._lists.order.nbytes

    def tuned(self, search: dict[str, float]) -> "CodesBackend":
        """As the protocol says."""
        other = copy.copy(self)
        other._configure(self.spec.model_copy(update={"search": search}))
        return other

    def save(self, path: Path) -> None:
        """As the protocol says. Codes are made anew from the embeddings when the index is opened."""
        if self._lists is not None:
            save_lists(self._lists, self.vectors, path)
            return
        write_flat(self.vectors, path)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """As the protocol says."""
        probes = math.ceil(self._probes * effort)
        if self._codes is not None:
            return self._codes.search(queries, k, probes, allowed)
        result = SearchResult(
            rows=np.full((len(queries), k), -1, np.int64), scores=np.full((len(queries), k), -np.inf, np.float32)
        )
        if self._lists is None:
            rows = None if allowed is None else self._allowed(np.arange(self.count), allowed)
            fetch = min(k, self.count if rows is None else len(rows))
            if fetch:
                result.rows[:, :fetch], result.scores[:, :fetch] = scan(self.vectors, queries, fetch, rows)
            return result
        for query, into_rows, into_scores in zip(queries, result.rows, result.scores, strict=True):
            rows = self._near(query, probes)
            rows = rows if allowed is None else self._allowed(rows, allowed)
            scores = self.vectors[rows] @ query
            best = np.lexsort((rows, -scores))[:k]
            into_rows[: len(best)], into_scores[: len(best)] = rows[best], scores[best]
        return result

    def _near(self, query: NDArray[np.float32], probes: int) -> NDArray[np.int64]:
        """Rows of the lists that promise a query most."""
        assert self._lists is not None
        assert self._reach is not None
        centres, counts, order = self._lists.centres, self._lists.counts, self._lists.order
        near, probes = centres @ query + self._reach * np.linalg.norm(query), min(probes, len(centres))
        ends = np.cumsum(counts)
        lists = np.flatnonzero(near >= np.partition(near, len(near) - probes)[len(near) - probes])
        return np.concatenate([order[ends[at] - counts[at] : ends[at]] for at in lists])

    def _allowed(self, rows: NDArray[np.int64], allowed: NDArray[np.uint8]) -> NDArray[np.int64]:
        return rows[np.unpackbits(allowed, bitorder="little", count=self.count)[rows] == 1]
