"""Building indexes and opening their files."""

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.index.backend import FaissBackend, Index, faiss_reason
from retrieval.index.codes_backend import CodesBackend
from retrieval.index.faiss_gpu import cagra_degree, cagra_index
from retrieval.index.lists import Report, build_lists, check_finite, load_lists
from retrieval.index.spec import IndexSpec

__all__ = ["build_index", "open_index", "score_error"]

# How many items are looked up to see whether an index is one of these embeddings, and how deep.
_PROBES, _PROBE_DEPTH = 64, 10
_MOST_OFF = 0.5
# Items that Faiss takes at once.
_ADDED = 1 << 18


def build_index(
    vectors: NDArray[np.float32],
    spec: IndexSpec,
    *,
    work: Path | None = None,
    report: Report = lambda done, total: None,
) -> Index:
    """Train and fill an index; what it answers are rows.

    Args:
        vectors: item embeddings of unit length, float32 `[N, D]`, possibly memory-mapped: then no more of them is held
            in memory than the index itself keeps (a graph of Faiss's keeps all, codes keep what they are).
        spec: what to build.
        work: folder that keeps what is done of an index of lists of codes, so that a build that was killed goes on.
        report: told how many items are in the index, and of how many.

    Raises:
        ConfigError: the factory string or a search parameter is not known, or items are too few.
        InputError: an embedding is not finite, or they are no table.
    """
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise InputError(f"embeddings of shape {vectors.shape} are not a row of numbers for each item")
    check_finite(vectors)
    if spec.factory == "Flat":
        return CodesBackend(vectors, spec)
    report(0, len(vectors))
    if spec.lists is not None:
        return CodesBackend(vectors, spec, build_lists(vectors, spec.lists, work=work, report=report))
    vectors = np.ascontiguousarray(vectors, np.float32)
    degree = cagra_degree(spec.factory)
    try:
        if degree is not None:
            return FaissBackend(cagra_index(vectors, degree), vectors, spec)
        index = faiss.index_factory(vectors.shape[1], spec.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        for start in range(0, len(vectors), _ADDED):
            index.add(vectors[start : start + _ADDED])
            report(int(index.ntotal), len(vectors))
    except RuntimeError as error:
        raise ConfigError(
            f"index {spec.factory!r} cannot be built over {len(vectors)} items: {faiss_reason(error)}"
        ) from None
    return FaissBackend(index, vectors, spec)


def open_index(path: Path, spec: IndexSpec, vectors: NDArray[np.float32]) -> Index:
    """Open an index file whose checksum has been verified: Faiss itself notices little damage.

    Raises:
        SnapshotCorruptError: it cannot be read, or is not an index over these embeddings.
    """
    if spec.lists is not None:
        return CodesBackend(vectors, spec, load_lists(path, spec.lists, vectors))
    exact = spec.factory == "Flat"
    try:
        # The vectors of an exact index are only compared with those that are here already.
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if exact else 0)
    except RuntimeError as error:
        raise SnapshotCorruptError(f"{path}: is not a readable Faiss index ({faiss_reason(error)})") from None
    if (index.ntotal, index.d) != vectors.shape:
        raise SnapshotCorruptError(
            f"{path}: encoder, vocabulary and index do not belong together ({index.ntotal} items of width {index.d} in "
            f"the index, {len(vectors)} of width {vectors.shape[1]} in the encoder)"
        )
    opened = FaissBackend(index, vectors, IndexSpec() if exact else spec)
    off = score_error(opened, vectors.__getitem__)
    if not off < _MOST_OFF:
        raise SnapshotCorruptError(
            f"{path}: encoder and index do not belong together (the index's scores are off by {off:.0%})"
        )
    return CodesBackend(vectors, spec) if exact else opened


def score_error(index: Index, vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> float:
    """How far an index's scores are from those of some embeddings, as a share.

    An index knows the embeddings that it was built over: its scores of what it finds are then theirs, up to what its
    codec loses. Those of other embeddings have nothing to do with them.

    Args:
        index: over N items.
        vectors: gives the embeddings of some rows, float32 `[n, D]` of int64 `[n]`.
    """
    if not index.count:
        return 0.0
    rows = np.unique(np.linspace(0, index.count - 1, _PROBES).astype(np.int64))
    queries = vectors(rows)
    if queries.shape[1] != index.width:
        return float("inf")
    found = index.search(queries, min(_PROBE_DEPTH, index.count))
    theirs = vectors(np.maximum(found.rows, 0).ravel()).reshape(*found.rows.shape, index.width)
    exact = np.einsum("qd,qkd->qk", queries, theirs)
    here = found.rows >= 0
    return float(np.abs(found.scores - exact)[here].sum() / np.abs(exact)[here].sum())
