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
from retrieval.index.backend import Index, IndexBackend
from retrieval.index.builder import open_index, score_error
from retrieval.index.device_backend import DeviceBackend
from retrieval.index.partial import PartialBackend
from retrieval.index.searcher import Searcher
from retrieval.snapshot.device_items import DeviceItems
from retrieval.snapshot.manifest import (
    MANIFEST,
    SNAPSHOT_FORMAT,
    FileEntry,
    GateVerdict,
    Interval,
    Manifest,
    files_of,
    read_manifest,
    verify_files,
)

__all__ = ["Snapshot", "open_snapshot", "searcher_of", "served_rows", "write_snapshot"]

_VOCABULARY, _REPORT = "vocabulary.arrow", "report.json"

# How far off an index's scores may be, as a share: a lossy one stays far below; one of other embeddings is off by all.
_MOST_OFF = 0.5


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
    index: Index,
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
        DataError: two items have one id.
    """
    vocabulary.check_unique()
    _check_together(folder, vocabulary, info, index.count)
    answers = np.flatnonzero(served_rows(vocabulary))
    off = score_error(index, lambda rows: item_vectors(encoder, answers[rows]))
    if index.width != info.encoder.vector_width or not off < _MOST_OFF:
        raise SnapshotCorruptError(
            f"{folder}: encoder and index do not belong together (the index's scores are off by {off:.0%})"
        )
    save_checkpoint(folder, encoder, info)
    vocabulary.save(folder / _VOCABULARY)
    index.save(folder / index.spec.file)
    (folder / _REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    paths = [folder / name for name in files_of(index.spec)]
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
        index=index.spec,
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

    On a CUDA device an exact index is searched there; others are searched on the CPU.

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
            served = served_rows(vocabulary)
            _check_together(folder, vocabulary, info, int(served.sum()))
            promised = (manifest.items, manifest.expired, manifest.width, manifest.model, manifest.vocabulary)
            expired = len(vocabulary) - int(served.sum())
            width = info.encoder.vector_width
            if (len(vocabulary), expired, width, info.weights_sha256, vocabulary.fingerprint) != promised:
                raise SnapshotCorruptError(f"{folder}: encoder and vocabulary are not those of the manifest")
            vectors = item_vectors(encoder)
            answers = _answers(vectors, vocabulary)
            index: IndexBackend = open_index(folder / manifest.index.file, manifest.index, answers)
            if torch.device(device).type == "cuda" and manifest.index.factory == "Flat":
                index = DeviceBackend(DeviceItems(answers, device), answers)
        except InputError as error:
            # Of whoever wrote it; here it is not the user's.
            raise SnapshotCorruptError(str(error)) from None
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
        searcher=searcher_of(index, vectors, vocabulary, attributes),
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
    index: IndexBackend,
    vectors: NDArray[np.float32],
    vocabulary: Vocabulary,
    attributes: Attributes | None = None,
) -> Searcher:
    """A searcher over the items that a vocabulary serves.

    Args:
        index: over these, in the order of their rows.
        vectors: embeddings of all items, `[N, D]`.
        vocabulary: says which are served.
        attributes: of all items; None refuses filters.
    """
    served = served_rows(vocabulary)
    backend = index if served.all() else PartialBackend(index, vectors, np.flatnonzero(served))
    return Searcher(backend, vocabulary.rank_by_id, attributes=attributes, retired=np.flatnonzero(~served))


def _answers(vectors: NDArray[np.float32], vocabulary: Vocabulary) -> NDArray[np.float32]:
    """Embeddings of the items that are served."""
    served = served_rows(vocabulary)
    return vectors if served.all() else vectors[served]


def _check_together(folder: Path, vocabulary: Vocabulary, info: CheckpointInfo, indexed: int) -> None:
    """Refuse parts of different snapshots, as far as numbers of items tell.

    Raises:
        SnapshotCorruptError: the parts do not belong together.
    """
    retired = len(vocabulary) - int(served_rows(vocabulary).sum())
    sizes = {"items": len(vocabulary), "item table": info.encoder.num_items, "index": indexed + retired}
    if len(set(sizes.values())) > 1:
        raise SnapshotCorruptError(f"{folder}: encoder, vocabulary and index do not belong together ({sizes})")
    for name in ("events", "popularity"):
        if name not in vocabulary.attributes:
            raise SnapshotCorruptError(f"{folder / _VOCABULARY}: has no column {name!r}")
