"""Writing and opening one snapshot folder."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import safetensors
import torch
from numpy.typing import NDArray

from retrieval import __version__
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.inference import item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import InputError, SnapshotCorruptError, SnapshotError
from retrieval.files import locked, sha256_of
from retrieval.index.attributes import Attributes
from retrieval.index.backend import FaissBackend, IndexBackend
from retrieval.index.builder import read_index, write_index
from retrieval.index.partial import PartialBackend
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import (
    FILES,
    MANIFEST,
    SNAPSHOT_FORMAT,
    FileEntry,
    GateVerdict,
    Interval,
    Manifest,
    read_manifest,
    verify_files,
)

__all__ = ["Snapshot", "open_snapshot", "searcher_of", "served_rows", "write_snapshot"]

_VOCABULARY, _INDEX, _REPORT = "vocabulary.arrow", "index.faiss", "report.json"

# How many items are looked up to see whether an index is one of these embeddings, and how deep.
_PROBES, _PROBE_DEPTH = 64, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An opened snapshot: everything that an answer is made from, of one version.

    Attributes:
        version: its name in the registry.
        manifest: what was checked.
        encoder: in evaluation mode.
        info: the encoder's configuration and action names.
        vocabulary: rows, ids and attributes of the items; `events` counts each item's events, `popularity`
            those of late (`data.popularity`).
        served: whether each row is an item that may be an answer, bool `[N]`; others are read in histories only.
        searcher: the index over those.
        popular: rows served, by falling popularity, int64: the answer for users without a usable history.
    """

    version: str
    manifest: Manifest
    encoder: UserEncoder
    info: CheckpointInfo
    vocabulary: Vocabulary
    served: NDArray[np.bool_]
    searcher: Searcher
    popular: NDArray[np.int64]


def write_snapshot(
    folder: Path,
    *,
    encoder: UserEncoder,
    info: CheckpointInfo,
    vocabulary: Vocabulary,
    index: faiss.Index,
    spec: IndexSpec,
    ann_recall: float,
    report: Mapping[str, Any],
    parent: str | None = None,
    trained_on: Interval | None = None,
    gates: Sequence[GateVerdict] = (),
) -> bytes:
    """Write a snapshot's files to an empty folder; return the manifest's bytes.

    Durability and the version's name are the registry's part. See `Manifest` for what the arguments are.

    Raises:
        SnapshotCorruptError: encoder, vocabulary and index do not belong together.
    """
    _check_together(folder, vocabulary, info, index, item_vectors(encoder))
    save_checkpoint(folder, encoder, info)
    vocabulary.save(folder / _VOCABULARY)
    write_index(index, folder / _INDEX)
    (folder / _REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    paths = [folder / name for name in FILES]
    files = {path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in paths}
    manifest = Manifest(
        format=SNAPSHOT_FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        parent=parent,
        model=files["encoder.safetensors"].sha256,
        dataset=info.dataset,
        trained_on=trained_on,
        items=len(vocabulary),
        expired=len(vocabulary) - int(served_rows(vocabulary).sum()),
        vocabulary=vocabulary.fingerprint,
        width=info.encoder.vector_width,
        index=spec,
        ann_recall=ann_recall,
        gates=tuple(gates),
        tools={
            "retrieval": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "faiss": faiss.__version__,
            "pyarrow": pa.__version__,
            "safetensors": safetensors.__version__,
        },
    )
    content = manifest.model_dump_json(indent=2).encode()
    (folder / MANIFEST).write_bytes(content)
    return content


def open_snapshot(folder: Path, device: torch.device | str = "cpu") -> Snapshot:
    """Verify every byte of a snapshot, then load it.

    Raises:
        SnapshotError: the folder holds no snapshot, or one of another format.
        SnapshotCorruptError: a file is missing, foreign or damaged, or the parts do not belong together.
    """
    manifest = read_manifest(folder)
    with _kept(folder):
        verify_files(folder, manifest)
        try:
            encoder, info = load_checkpoint(folder, device)
            vocabulary = Vocabulary.load(folder / _VOCABULARY)
            index = read_index(folder / _INDEX, manifest.index)
        except InputError as error:
            # Of whoever wrote it; here it is not the user's.
            raise SnapshotCorruptError(str(error)) from None
    vectors = item_vectors(encoder)
    _check_together(folder, vocabulary, info, index, vectors)
    served = served_rows(vocabulary)
    promised = (manifest.items, manifest.expired, manifest.width, manifest.model, manifest.vocabulary)
    expired = len(vocabulary) - int(served.sum())
    width = info.encoder.vector_width
    if (len(vocabulary), expired, width, info.weights_sha256, vocabulary.fingerprint) != promised:
        raise SnapshotCorruptError(f"{folder}: encoder and vocabulary are not those of the manifest")
    events, popularity = (vocabulary.attributes[name].to_numpy() for name in ("events", "popularity"))
    attributes = Attributes(vocabulary.attributes, len(vocabulary))
    order = np.lexsort((vocabulary.rank_by_id, -events, -popularity))
    return Snapshot(
        version=folder.name,
        manifest=manifest,
        encoder=encoder,
        info=info,
        vocabulary=vocabulary,
        served=served,
        searcher=searcher_of(index, vectors, manifest.index, vocabulary, attributes),
        popular=order[served[order]],
    )


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Keep a version from being pruned while it is read.

    Raises:
        SnapshotError: it was, just before.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / MANIFEST, shared=True))
        except FileNotFoundError:
            raise SnapshotError(f"{folder}: was removed as it was about to be read") from None
        # Who prunes holds the lock for itself as it takes the folder away: it may be gone by the time we have it.
        if not (folder / MANIFEST).exists():
            raise SnapshotError(f"{folder}: was removed as it was about to be read")
        yield


def served_rows(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """Which items of a snapshot's vocabulary may be answers, bool `[N]`: all that are not marked as expired."""
    expired = vocabulary.attributes.get("expired")
    if expired is None:
        return np.ones(len(vocabulary), bool)
    return ~expired.to_numpy(zero_copy_only=False)


def searcher_of(
    index: faiss.Index,
    vectors: NDArray[np.float32],
    spec: IndexSpec,
    vocabulary: Vocabulary,
    attributes: Attributes | None = None,
) -> Searcher:
    """A searcher over the items that a vocabulary serves.

    Args:
        index: over these, in the order of their rows.
        vectors: embeddings of all items, `[N, D]`.
        spec: of the index.
        vocabulary: says which are served.
        attributes: of all items; None refuses filters.
    """
    served = served_rows(vocabulary)
    backend: IndexBackend
    if served.all():
        backend = FaissBackend(index, vectors, spec)
    else:
        backend = PartialBackend(FaissBackend(index, vectors[served], spec), vectors, np.flatnonzero(served))
    return Searcher(backend, vocabulary.rank_by_id, attributes=attributes, retired=np.flatnonzero(~served))


def _check_together(
    folder: Path, vocabulary: Vocabulary, info: CheckpointInfo, index: faiss.Index, vectors: NDArray[np.float32]
) -> None:
    """Refuse parts of different snapshots, which sizes alone need not tell.

    An index knows the embeddings that it was built over: its scores of what it finds are then those of the encoder, up
    to what its codec loses. Over the embeddings of another encoder they have nothing to do with each other.

    Raises:
        SnapshotCorruptError: the parts do not belong together.
    """
    served = np.flatnonzero(served_rows(vocabulary))
    retired = len(vocabulary) - len(served)
    sizes = {"items": len(vocabulary), "item table": info.encoder.num_items, "index": index.ntotal + retired}
    if len(set(sizes.values())) > 1 or info.encoder.vector_width != index.d:
        raise SnapshotCorruptError(f"{folder}: encoder, vocabulary and index do not belong together ({sizes})")
    for name in ("events", "popularity"):
        if name not in vocabulary.attributes:
            raise SnapshotCorruptError(f"{folder / _VOCABULARY}: has no column {name!r}")
    if not len(served):
        return
    rows = served[np.unique(np.linspace(0, len(served) - 1, _PROBES).astype(np.int64))]
    scores, found = index.search(vectors[rows], min(_PROBE_DEPTH, len(served)))
    exact = np.einsum("qd,qkd->qk", vectors[rows], vectors[served[found]])
    off = float(np.abs(scores - exact)[found >= 0].sum() / np.abs(exact)[found >= 0].sum())
    if not off < 0.5:
        raise SnapshotCorruptError(
            f"{folder}: encoder and index do not belong together (the index's scores are off by {off:.0%})"
        )
