"""Building, writing and reading Faiss indexes."""

import re
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.index.spec import IndexSpec

__all__ = ["apply_search_parameters", "build_index", "read_index", "write_index"]


def build_index(vectors: NDArray[np.float32], spec: IndexSpec) -> faiss.Index:
    """Train and fill an index; label i of a search is row i.

    Args:
        vectors: item embeddings of unit length, float32 `[N, D]`.
        spec: what to build.

    Raises:
        ConfigError: Faiss does not know the factory string or a search parameter, or cannot train it on so few items.
        InputError: an embedding is not finite.
    """
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise InputError(f"embeddings of {len(broken)} items are not finite, the first at row {broken[0]}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    try:
        index = faiss.index_factory(vectors.shape[1], spec.factory, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        raise ConfigError(
            f"index {spec.factory!r} cannot be built over {len(vectors)} items: {_reason(error)}"
        ) from None
    apply_search_parameters(index, spec)
    return index


def apply_search_parameters(index: faiss.Index, spec: IndexSpec) -> None:
    """Set an index's search parameters.

    Raises:
        ConfigError: the index has no such parameter.
    """
    for name, value in spec.search.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError as error:
            raise ConfigError(f"index {spec.factory!r} takes no parameter {name}={value:g}: {_reason(error)}") from None


def _reason(error: RuntimeError) -> str:
    """A Faiss error without the C++ function and file before it, which say nothing to a user."""
    return re.sub(r"^.* at \S+:\d+: ", "", str(error).strip().splitlines()[-1])


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({_reason(error)})") from None


def read_index(path: Path, spec: IndexSpec) -> faiss.Index:
    """Read an index file whose checksum has been verified: Faiss itself notices little damage.

    Raises:
        SnapshotCorruptError: Faiss cannot read it.
    """
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise SnapshotCorruptError(f"{path}: is not a readable Faiss index ({_reason(error)})") from None
    apply_search_parameters(index, spec)
    return index
