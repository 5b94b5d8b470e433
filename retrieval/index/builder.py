"""Building indexes and opening their files."""

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError, SnapshotCorruptError
from retrieval.index.backend import FaissBackend, Index, faiss_reason
from retrieval.index.codes_backend import CodesBackend
from retrieval.index.lists import Report, build_lists, check_finite, load_lists
from retrieval.index.spec import IndexSpec

__all__ = ["build_index", "open_index", "score_error"]

# How many items are looked up to see whether an index is one of these embeddings, and how deep.
_PROBES, _PROBE_DEPTH = 64, 10
_MOST_OFF = 0.5


def build_index(
    vectors: NDArray[np.float32],
    spec: IndexSpec,
    *,
    work: Path | None = None,
    report: Report = lambda done, total: None,
) -> Index:
    """Train and fill an index; what it answers are rows.

    Args:
        vectors: item embeddings of unit length, float32 `[N, D]`, possibly memory-mapped; an index of codes never holds
            all of them in memory, one of Faiss's does.
        spec: what to build.
        work: folder that keeps what is done of an index of lists of codes, so that a build that was killed goes on.
        report: told how many items of such an index are assigned, and of how many.

    Raises:
        ConfigError: the factory string or a search parameter is not known, or items are too few.
        InputError: an embedding is not finite.
    """
    check_finite(vectors)
    if spec.factory == "Flat":
        return CodesBackend(vectors, spec)
    if spec.lists is not None:
        return CodesBackend(vectors, spec, build_lists(vectors, spec.lists, work=work, report=report))
    vectors = np.ascontiguousarray(vectors, np.float32)
    try:
        index = faiss.index_factory(vectors.shape[1], spec.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
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
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise SnapshotCorruptError(f"{path}: is not a readable Faiss index ({faiss_reason(error)})") from None
    if (index.ntotal, index.d) != vectors.shape:
        raise SnapshotCorruptError(
            f"{path}: encoder, vocabulary and index do not belong together ({index.ntotal} items of width {index.d} in "
            f"the index, {len(vectors)} of width {vectors.shape[1]} in the encoder)"
        )
    exact = spec.factory == "Flat"
    # What it holds are the vectors that are here already.
    opened = FaissBackend(index, vectors, IndexSpec() if exact else spec)
    off = score_error(opened, vectors)
    if not off < _MOST_OFF:
        raise SnapshotCorruptError(
            f"{path}: encoder and index do not belong together (the index's scores are off by {off:.0%})"
        )
    return CodesBackend(vectors, spec) if exact else opened


def score_error(index: Index, vectors: NDArray[np.float32]) -> float:
    """How far an index's scores are from those of some embeddings, as a share.

    An index knows the embeddings that it was built over: its scores of what it finds are then theirs, up to what its
    codec loses. Those of other embeddings have nothing to do with them.
    """
    if not len(vectors):
        return 0.0
    rows = np.unique(np.linspace(0, len(vectors) - 1, _PROBES).astype(np.int64))
    found = index.search(vectors[rows], min(_PROBE_DEPTH, len(vectors)))
    exact = np.einsum("qd,qkd->qk", vectors[rows], vectors[found.rows])
    here = found.rows >= 0
    return float(np.abs(found.scores - exact)[here].sum() / np.abs(exact)[here].sum())
