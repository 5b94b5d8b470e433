"""Writing and opening one snapshot folder."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.inference import item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import SnapshotCorruptError
from retrieval.files import sha256_of
from retrieval.index.attributes import Attributes
from retrieval.index.backend import FaissBackend
from retrieval.index.builder import read_index, write_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import MANIFEST, SNAPSHOT_FORMAT, FileEntry, Manifest, read_manifest, verify_files

__all__ = ["Snapshot", "open_snapshot", "write_snapshot"]

_VOCABULARY, _INDEX, _REPORT = "vocabulary.arrow", "index.faiss", "report.json"


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
        searcher: the index.
        popular: rows by falling popularity, int64 `[N]`: the answer for users without a usable history.
    """

    version: str
    manifest: Manifest
    encoder: UserEncoder
    info: CheckpointInfo
    vocabulary: Vocabulary
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
) -> bytes:
    """Write a snapshot's files to an empty folder; return the manifest's bytes.

    Durability and the version's name are the registry's part.
    """
    save_checkpoint(folder, encoder, info)
    vocabulary.save(folder / _VOCABULARY)
    write_index(index, folder / _INDEX)
    (folder / _REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    files = sorted(folder.iterdir())
    manifest = Manifest(
        format=SNAPSHOT_FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in files},
        dataset=info.dataset,
        items=len(vocabulary),
        width=info.encoder.width,
        index=spec,
        ann_recall=ann_recall,
        tools={"python": platform.python_version(), "torch": torch.__version__, "faiss": faiss.__version__},
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
    verify_files(folder, manifest)
    encoder, info = load_checkpoint(folder, device)
    vocabulary = Vocabulary.load(folder / _VOCABULARY)
    index = read_index(folder / _INDEX, manifest.index)
    sizes = {"items": len(vocabulary), "item table": info.encoder.num_items, "index": index.ntotal}
    if set(sizes.values()) != {manifest.items} or {info.encoder.width, index.d} != {manifest.width}:
        raise SnapshotCorruptError(f"{folder}: encoder, vocabulary and index do not belong together ({sizes})")
    for name in ("events", "popularity"):
        if name not in vocabulary.attributes:
            raise SnapshotCorruptError(f"{folder / _VOCABULARY}: has no column {name!r}")
    events, popularity = (vocabulary.attributes[name].to_numpy() for name in ("events", "popularity"))
    backend = FaissBackend(index, item_vectors(encoder), manifest.index)
    attributes = Attributes(vocabulary.attributes, len(vocabulary))
    return Snapshot(
        version=folder.name,
        manifest=manifest,
        encoder=encoder,
        info=info,
        vocabulary=vocabulary,
        searcher=Searcher(backend, vocabulary.rank_by_id, attributes=attributes),
        popular=np.lexsort((vocabulary.rank_by_id, -events, -popularity)),
    )
