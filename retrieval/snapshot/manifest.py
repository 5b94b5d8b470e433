"""`manifest.json`: what a snapshot holds. The format is described in docs/snapshot-format.md."""

import hashlib
import json
from pathlib import Path

from retrieval.config import Config
from retrieval.errors import SnapshotCorruptError, SnapshotError
from retrieval.files import sha256_of
from retrieval.index.spec import IndexSpec

__all__ = [
    "MANIFEST",
    "SNAPSHOT_FORMAT",
    "FileEntry",
    "Manifest",
    "read_manifest",
    "verify_files",
    "version_suffix",
]

SNAPSHOT_FORMAT = 1
MANIFEST = "manifest.json"


class FileEntry(Config):
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


class Manifest(Config):
    """Contents of `manifest.json`.

    Attributes:
        format: number of the snapshot's format.
        created: time of writing, ISO 8601, UTC.
        files: every other file of the folder, by name.
        dataset: fingerprint of the dataset that the encoder was trained on.
        items: N, size of vocabulary, item table and index.
        width: D of the embeddings.
        index: what was built and how it is searched.
        ann_recall: recall@100 of the index against exact search on real users' embeddings.
        tools: versions of what wrote it.
    """

    format: int
    created: str
    files: dict[str, FileEntry]
    dataset: str
    items: int
    width: int
    index: IndexSpec
    ann_recall: float
    tools: dict[str, str]


def version_suffix(manifest: bytes) -> str:
    """The part of a version's name that binds it to its manifest: 12 hex digits of the manifest's SHA-256."""
    return hashlib.sha256(manifest).hexdigest()[:12]


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest itself.

    Raises:
        SnapshotError: the folder holds no snapshot, or one of another format.
        SnapshotCorruptError: the manifest is not the one that the folder's name was given for.
    """
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
    except OSError:
        raise SnapshotError(f"{folder}: is not a snapshot ({MANIFEST} cannot be read)") from None
    if not folder.name.endswith(f"-{version_suffix(content)}"):
        raise SnapshotCorruptError(f"{file}: differs from the manifest that the version {folder.name} was made with")
    values = json.loads(content)
    if values.get("format") != SNAPSHOT_FORMAT:
        number = values.get("format")
        raise SnapshotError(f"{file}: format {number!r} is not the format {SNAPSHOT_FORMAT} that this version reads")
    return Manifest.parse(values, str(file))


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check that the folder holds exactly the files of its manifest, byte for byte.

    Raises:
        SnapshotCorruptError: a file is missing, unexpected, or has other contents; the sentence names it.
    """
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(manifest.files.keys() - present):
        raise SnapshotCorruptError(f"{folder / name}: is missing")
    for name in sorted(present - manifest.files.keys()):
        raise SnapshotCorruptError(f"{folder / name}: does not belong to the snapshot")
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise SnapshotCorruptError(f"{path}: is not a plain file")
        size = path.stat().st_size
        if size != entry.bytes:
            raise SnapshotCorruptError(f"{path}: has {size} bytes instead of {entry.bytes}")
        if sha256_of(path) != entry.sha256:
            raise SnapshotCorruptError(f"{path}: its SHA-256 differs from the manifest's")
