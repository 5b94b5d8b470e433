"""Which items lie around which centre: training, assigning in bounded memory, and the file.

Legend: N items, D width, C lists, P items that a file keeps to be recognised by.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from retrieval.errors import ConfigError, InputError, SnapshotCorruptError
from retrieval.files import write_atomically

__all__ = ["REACH", "Lists", "Report", "build_lists", "check_finite", "load_lists", "radii", "save_lists"]

REACH: Final = 0.3
"""Lists are looked into in the order of q·centre + REACH · |q| · radius: of two centres alike, the wider list may hold
what is nearer to the query. At 1 that would bound what a list's items score, but hardly one lies straight towards the
query. Measured: see docs/index.md."""
_SEED: Final = 1
_ROUNDS: Final = 10
_PER_CENTRE: Final = 256
"""Items per centre that centres are trained on; more change little."""
_SHARD: Final = 1 << 18
"""Items that are assigned at once; what a build that was killed repeats at most, per thread."""
_KEPT: Final = 64

Report = Callable[[int, int], None]
"""Told how many items are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Lists:
    """A partition of the items.

    Attributes:
        centres: float32 `[C, D]`.
        counts: items of each list, int64 `[C]`.
        order: rows, list by list and ascending in each, int64 `[N]`.
    """

    centres: NDArray[np.float32]
    counts: NDArray[np.int64]
    order: NDArray[np.int64]


def check_finite(vectors: NDArray) -> None:
    """Read all embeddings once, in blocks.

    Raises:
        InputError: one is not finite.
    """
    broken, first = 0, -1
    for start in range(0, len(vectors), _SHARD):
        rows = np.flatnonzero(~np.isfinite(vectors[start : start + _SHARD]).all(axis=1))
        if len(rows) and first < 0:
            first = start + int(rows[0])
        broken += len(rows)
    if broken:
        raise InputError(f"embeddings of {broken} items are not finite, the first at row {first}")


def build_lists(
    vectors: NDArray[np.float32], count: int, *, work: Path | None = None, report: Report = lambda done, total: None
) -> Lists:
    """Partition items around centres of their own; the same items give the same lists.

    Memory: 40 bytes an item and a sample of 256 items per list; the embeddings themselves are read in shards, which
    threads assign side by side.

    Args:
        vectors: finite, float32 `[N, D]`, possibly memory-mapped.
        count: C.
        work: folder that keeps what is done, so that a build that was killed goes on; None to start anew.
        report: told of progress.

    Raises:
        ConfigError: there are fewer items than lists.
        InputError: `work` holds the beginnings of another index.
    """
    total, width = vectors.shape
    if total < count:
        raise ConfigError(f"index 'IVF{count},Int8' cannot be built over {total} items: there is not one for each list")
    if work is not None:
        _claim(work, vectors, count)
    centres = _kept(None if work is None else work / "centres.npy", lambda: _trained(vectors, count))
    quantizer = faiss.IndexFlatL2(width)
    quantizer.add(centres)
    nearest = np.empty(total, np.int32)
    done = 0

    def assign(start: int) -> int:
        faiss.omp_set_num_threads(1)  # of this thread: the shards share the processors
        part = np.ascontiguousarray(vectors[start : start + _SHARD], np.float32)
        file = None if work is None else work / f"nearest-{start}.npy"
        nearest[start : start + len(part)] = _kept(file, lambda: quantizer.search(part, 1)[1][:, 0].astype(np.int32))
        return len(part)

    with ThreadPoolExecutor(faiss.omp_get_max_threads()) as pool:
        for items in pool.map(assign, range(0, total, _SHARD)):
            done += items
            report(done, total)
    counts = np.bincount(nearest, minlength=count).astype(np.int64)
    return Lists(centres, counts, np.argsort(nearest, kind="stable"))


def _trained(vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    rows = np.arange(len(vectors))
    if len(rows) > _PER_CENTRE * count:
        rows = np.sort(np.random.default_rng(_SEED).choice(len(rows), _PER_CENTRE * count, replace=False))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=_ROUNDS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=1 << 30
    )
    means.train(np.ascontiguousarray(vectors[rows], np.float32))
    return np.asarray(means.centroids, np.float32)


def _claim(work: Path, vectors: NDArray[np.float32], count: int) -> None:
    """Bind a folder to what is built in it."""
    digest = hashlib.sha256(f"{count} {_SEED} {vectors.shape}".encode())
    for start in range(0, len(vectors), _SHARD):
        digest.update(np.ascontiguousarray(vectors[start : start + _SHARD], np.float32).data)
    mark = work / "of"
    work.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        write_atomically(mark, digest.hexdigest().encode())
    elif mark.read_bytes() != digest.hexdigest().encode():
        raise InputError(f"{work}: holds the beginnings of an index of other embeddings or another number of lists")


def _kept(file: Path | None, make: Callable[[], NDArray]) -> NDArray:
    """What a file holds; made, and kept there, if there is none."""
    if file is None:
        return make()
    if file.exists():
        return np.load(file, allow_pickle=False)
    made = make()
    unfinished = file.with_suffix(".unfinished.npy")
    np.save(unfinished, made, allow_pickle=False)
    unfinished.replace(file)
    return made


def _sampled(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """A few embeddings, spread over the rows."""
    rows = np.unique(np.linspace(0, max(len(vectors) - 1, 0), _KEPT).astype(np.int64))[: len(vectors)]
    return np.ascontiguousarray(vectors[rows], np.float32)


def radii(lists: Lists, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far from its centre the farthest item of each list lies, float32 `[C]`."""
    found = np.zeros(len(lists.centres), np.float32)
    labels = np.repeat(np.arange(len(lists.centres)), lists.counts)
    for start in range(0, len(labels), _SHARD):
        part = labels[start : start + _SHARD]
        away = np.linalg.norm(vectors[lists.order[start : start + _SHARD]] - lists.centres[part], axis=1)
        np.maximum.at(found, part, away)
    return found


def save_lists(lists: Lists, vectors: NDArray[np.float32], path: Path) -> None:
    """Write lists over these embeddings."""
    tensors = {
        "centres": lists.centres,
        "counts": lists.counts,
        "order": lists.order.astype(np.int32),
        "sample": _sampled(vectors),
    }
    path.write_bytes(save(tensors))


def load_lists(path: Path, count: int, vectors: NDArray[np.float32]) -> Lists:
    """Read lists over these embeddings, and check all that searching relies on.

    Raises:
        SnapshotCorruptError: the file is damaged, or was written for other items.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SnapshotCorruptError(f"{path}: is not a readable index ({error})") from None
    total, width = vectors.shape
    sample = _sampled(vectors)
    shapes = {
        "centres": (np.float32, (count, width)),
        "counts": (np.int64, (count,)),
        "order": (np.int32, (total,)),
        "sample": (np.float32, sample.shape),
    }
    found = {name: (tensor.dtype.type, tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise SnapshotCorruptError(f"{path}: is not an index of {count} lists over {total} items of width {width}")
    counts, order = tensors["counts"], tensors["order"].astype(np.int64)
    partition = (counts >= 0).all() and (counts <= total).all() and counts.sum() == total
    if not partition or (np.sort(order) != np.arange(total)).any() or not np.isfinite(tensors["centres"]).all():
        raise SnapshotCorruptError(f"{path}: its lists do not hold each item once")
    if not np.abs(sample - tensors["sample"]).sum() <= 0.01 * np.abs(sample).sum():
        raise SnapshotCorruptError(f"{path}: encoder and index do not belong together (it was built over other items)")
    return Lists(tensors["centres"], counts, order)
