"""The seam between searching and what is searched: one protocol, and Faiss behind it."""

import math
import re
import struct
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError
from retrieval.index.exact import prefer_products
from retrieval.index.spec import IndexSpec
from retrieval.types import SearchResult

__all__ = ["FaissBackend", "Index", "IndexBackend", "faiss_reason", "write_faiss", "write_flat"]

_WRITTEN = 1 << 16

# Its stubs know neither the keyword arguments of search parameters nor selectors made from arrays.
_FAISS: Any = faiss


class IndexBackend(Protocol):
    """An index over N vectors of width D whose answers are rows.

    Attributes:
        spec: what was built.
        vectors: the embeddings in it, `[N, D]`, possibly memory-mapped.
        supports_allowed: whether a search can be restricted to some rows.
        max_k: the most answers that a search gives; None for no limit.
        true_scores: whether scores are inner products of the float32 embeddings, rounded the same wherever in a batch
            or the index a query and an item stand.
    """

    spec: IndexSpec
    vectors: NDArray
    supports_allowed: bool
    max_k: int | None
    true_scores: bool

    @property
    def exact_from(self) -> float:
        """The effort from which on a search is exact: 1 where it always is, infinity where it never promises to be."""
        ...

    @property
    def count(self) -> int:
        """N."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """The best rows of each query, as far as the index finds them.

        Args:
            queries: float32 `[B, D]`.
            k: answers per query, at most `max_k`.
            allowed: packed bitmap of the rows to look at, lowest bit first, uint8 `[ceil(N / 8)]`; None for all. It
                must not change while it is held: what is made of it may be kept.
            effort: how much harder to look than tuned, at least 1; an exact index ignores it.

        Returns:
            Answers `[B, k]`, best first, −1 past the last.
        """
        ...


class Index(IndexBackend, Protocol):
    """An index as it is built, tuned and kept."""

    @property
    def size(self) -> int:
        """Bytes that the index takes, without `vectors`."""
        ...

    def tuned(self, search: dict[str, float]) -> "Index":
        """The same index searched with these parameters; this one must not be searched any more.

        Raises:
            ConfigError: the index has no such parameter.
        """
        ...

    def save(self, path: Path) -> None:
        """Write the index's file, `spec.file` of a snapshot.

        Raises:
            OSError: it cannot be written.
        """
        ...


class FaissBackend:
    """A Faiss index whose labels are rows.

    Args:
        index: the index.
        vectors: the embeddings in it, `[N, D]`.
        spec: what it was built from.

    Raises:
        ConfigError: the index has no such search parameter.
    """

    max_k: int | None = None
    true_scores = False
    exact_from = math.inf

    def __init__(self, index: faiss.Index, vectors: NDArray, spec: IndexSpec) -> None:
        assert vectors.shape == (index.ntotal, index.d)
        self.spec, self.vectors, self._index = spec, vectors, index
        self._apply(spec)
        self.supports_allowed = self._honours_a_selector()

    def _apply(self, spec: IndexSpec) -> None:
        for name, value in spec.search.items():
            try:
                faiss.ParameterSpace().set_index_parameter(self._index, name, value)
            except RuntimeError as error:
                raise ConfigError(
                    f"index {spec.factory!r} takes no parameter {name}={value:g}: {faiss_reason(error)}"
                ) from None

    @property
    def count(self) -> int:
        """N."""
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        """D."""
        return int(self._index.d)

    @property
    def size(self) -> int:
        """As the protocol says: the bytes that the index is written in."""
        writer = _Counter()
        faiss.write_index(self._index, _FAISS.PyCallbackIOWriter(writer))
        return writer.bytes

    def tuned(self, search: dict[str, float]) -> "FaissBackend":
        """As the protocol says."""
        return FaissBackend(self._index, self.vectors, self.spec.model_copy(update={"search": search}))

    def save(self, path: Path) -> None:
        """As the protocol says."""
        write_faiss(self._index, path)

    def moved(self, resources: Any, device: int) -> faiss.Index:
        """A copy of the index on a GPU; RuntimeError where it does not run there."""
        return _FAISS.index_cpu_to_gpu(resources, device, self._index)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """As the protocol says."""
        assert allowed is None or self.supports_allowed
        parameters = None
        if allowed is not None or effort != 1.0:
            selector = _FAISS.IDSelectorBitmap(np.ascontiguousarray(allowed)) if allowed is not None else None
            parameters = _parameters(self._index, selector, effort)
        prefer_products(self.width)
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
        return SearchResult(rows=rows, scores=scores)

    def _honours_a_selector(self) -> bool:
        """Whether a search keeps to a selector: some indexes refuse one, and some ignore it without a word."""
        if self.count == 0:
            return False
        one = np.zeros(math.ceil(self.count / 8), np.uint8)
        one[0] = 1
        try:
            parameters = _parameters(self._index, _FAISS.IDSelectorBitmap(one), 1.0)
            query = np.ones((1, self.width), np.float32)
            _, rows = self._index.search(query, min(8, self.count), params=parameters)
        except RuntimeError:
            return False
        return bool((rows <= 0).all())


def _parameters(index: faiss.Index, selector: faiss.IDSelector | None, effort: float) -> Any:
    """Search parameters of an index and the indexes inside it."""
    index = faiss.downcast_index(index)
    given = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexPreTransform):
        return _FAISS.SearchParametersPreTransform(index_params=_parameters(index.index, selector, effort))
    if isinstance(index, faiss.IndexRefine):
        base = _parameters(index.base_index, selector, effort)
        return _FAISS.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=base)
    if isinstance(index, faiss.IndexIVF):
        return _FAISS.SearchParametersIVF(nprobe=min(math.ceil(index.nprobe * effort), index.nlist), **given)
    if isinstance(index, faiss.IndexHNSW):
        return _FAISS.SearchParametersHNSW(efSearch=math.ceil(index.hnsw.efSearch * effort), **given)
    return _FAISS.SearchParameters(**given)


def faiss_reason(error: RuntimeError) -> str:
    """A Faiss error without the C++ function and file before it, which say nothing to a user."""
    return re.sub(r"^.* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])


def write_faiss(index: faiss.Index, path: Path) -> None:
    """Write a Faiss index.

    Raises:
        OSError: it cannot be written.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({faiss_reason(error)})") from None


def write_flat(vectors: NDArray[np.float32], path: Path) -> None:
    """Write what Faiss writes of an `IndexFlatIP` over these vectors, without holding a second copy of them.

    Raises:
        OSError: it cannot be written.
    """
    header = faiss.serialize_index(faiss.IndexFlatIP(vectors.shape[1])).tobytes()
    count, size = struct.Struct("<q"), struct.Struct("<Q")
    # Four letters and the width, then the number of vectors; at the end, of four-byte words that follow.
    with path.open("wb") as file:
        file.write(header[:8] + count.pack(len(vectors)) + header[16 : -size.size] + size.pack(vectors.size))
        for start in range(0, len(vectors), _WRITTEN):
            file.write(np.ascontiguousarray(vectors[start : start + _WRITTEN], "<f4").data)


class _Counter:
    """Counts what is written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, block: bytes) -> None:
        self.bytes += len(block)
