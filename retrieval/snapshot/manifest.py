"""`manifest.json`: what a snapshot holds. The format is described in docs/snapshot-format.md."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from retrieval.config import Config
from retrieval.errors import ConfigError, SnapshotCorruptError, SnapshotError
from retrieval.files import sha256_of
from retrieval.index.spec import IndexSpec

__all__ = [
    "MANIFEST",
    "SNAPSHOT_FORMAT",
    "FileEntry",
    "GateVerdict",
    "Interval",
    "Manifest",
    "check_sizes",
    "files_of",
    "is_version",
    "parse_manifest",
    "read_manifest",
    "verify_files",
    "version_name",
    "version_number",
]

SNAPSHOT_FORMAT = 3
_READ = (2, SNAPSHOT_FORMAT)
MANIFEST = "manifest.json"

_VERSION = re.compile(r"([0-9]{6,18})-([0-9a-f]{12})")
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Version = Annotated[str, StringConstraints(pattern=rf"^{_VERSION.pattern}$")]


class FileEntry(Config):
    """Size in bytes and SHA-256 of one file."""

    bytes: int = Field(ge=0)
    sha256: _Sha256


class Interval(Config):
    """Times of the first and the last event that the encoder was trained on, in seconds."""

    first: int
    last: int


class GateVerdict(Config):
    """What one gate said of the snapshot before it was published; see `evaluation.gates.GateResult`."""

    gate: str
    passed: bool
    figure: float
    limit: float
    note: str


class Manifest(Config):
    """Contents of `manifest.json`.

    Attributes:
        format: number of the snapshot's format.
        created: time of writing, ISO 8601, UTC.
        parent: the version that was live when this one was made; None for a first one.
        files: every other file of the folder, by name.
        model: fingerprint of the encoder: SHA-256 of its weights.
        dataset: fingerprint of the dataset that the encoder was trained on.
        trained_on: interval of its events; None if unknown.
        items: N, size of vocabulary and item table.
        expired: of these, items that the index leaves out and that are no answers any more (format 3; before: none).
        vocabulary: fingerprint of the ids in row order: `Vocabulary.fingerprint`.
        width: D of the embeddings.
        index: what was built and how it is searched.
        ann_recall: recall@100 of the index against exact search on real users' embeddings.
        gates: verdicts; none if it was published without gates.
        tools: versions of what wrote it.
    """

    format: int
    created: str
    parent: _Version | None
    files: dict[str, FileEntry]
    model: _Sha256
    dataset: str
    trained_on: Interval | None
    items: int = Field(ge=0)
    expired: int = Field(default=0, ge=0)
    vocabulary: _Sha256
    width: int = Field(ge=1)
    index: IndexSpec
    ann_recall: float
    gates: tuple[GateVerdict, ...]
    tools: dict[str, str]


def files_of(index: IndexSpec) -> tuple[str, ...]:
    """Every file beside the manifest of a snapshot with this index."""
    return tuple(sorted(("encoder.json", "encoder.safetensors", index.file, "report.json", "vocabulary.arrow")))


def version_name(number: int, manifest: bytes) -> str:
    """A version's name: its number and, to bind it to its manifest, 12 hex digits of the manifest's SHA-256."""
    return f"{number:06d}-{_digest(manifest)}"


def is_version(name: str) -> bool:
    """Whether a name is one that a version can have."""
    return _VERSION.fullmatch(name) is not None


def version_number(name: str) -> int:
    """The number in a version's name."""
    return int(name.partition("-")[0])


def _digest(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:12]


def parse_manifest(content: bytes, version: str, where: str) -> Manifest:
    """Check the manifest itself.

    Args:
        content: bytes of `manifest.json`.
        version: name of the version that it lies in.
        where: the file, in messages.

    Raises:
        SnapshotCorruptError: it is not the manifest that the version's name was given for.
        SnapshotError: it is of another format, or not what its format demands.
    """
    match = _VERSION.fullmatch(version)
    if match is None or match[2] != _digest(content):
        raise SnapshotCorruptError(f"{where}: differs from the manifest that the version {version} was made with")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{where}: is not JSON ({error})") from None
    number = values.get("format") if isinstance(values, dict) else None
    if isinstance(number, int) and number > SNAPSHOT_FORMAT:
        raise SnapshotError(
            f"{where}: format {number} is newer than the format {SNAPSHOT_FORMAT} that this version reads; upgrade it"
        )
    if number not in _READ or isinstance(number, bool):
        raise SnapshotError(
            f"{where}: format {number!r} is none of the formats {_READ[0]} and {_READ[1]} that this version reads"
        )
    try:
        manifest = Manifest.parse(values, where)
    except ConfigError as error:
        raise SnapshotError(str(error)) from None
    names = files_of(manifest.index)
    if set(manifest.files) != set(names):
        raise SnapshotError(f"{where}: files: must be {', '.join(names)}, not {', '.join(manifest.files) or 'none'}")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a version's folder.

    Raises:
        SnapshotError, SnapshotCorruptError: the folder holds no snapshot; or see `parse_manifest`.
    """
    file = folder / MANIFEST
    try:
        if file.is_symlink():
            raise SnapshotCorruptError(f"{file}: is not a plain file")
        content = file.read_bytes()
    except OSError:
        raise SnapshotError(f"{folder}: is not a snapshot ({MANIFEST} cannot be read)") from None
    return parse_manifest(content, folder.name, str(file))


def check_sizes(found: Mapping[str, int], manifest: Manifest, where: str) -> None:
    """Check names and sizes of a snapshot's files.

    Args:
        found: size in bytes of each file beside the manifest.
        manifest: what there must be.
        where: the folder, in messages.

    Raises:
        SnapshotCorruptError: a file is missing, unexpected, cut short or too long; the sentence names it.
    """
    for name in sorted(manifest.files.keys() - found.keys()):
        raise SnapshotCorruptError(f"{where}/{name}: is missing")
    for name in sorted(found.keys() - manifest.files.keys()):
        raise SnapshotCorruptError(f"{where}/{name}: does not belong to the snapshot")
    for name, entry in manifest.files.items():
        if found[name] < entry.bytes:
            raise SnapshotCorruptError(f"{where}/{name}: is cut short, {found[name]} of {entry.bytes} bytes")
        if found[name] > entry.bytes:
            raise SnapshotCorruptError(
                f"{where}/{name}: has {found[name] - entry.bytes} trailing bytes after the {entry.bytes} it should have"
            )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Check that a folder holds exactly the files of its manifest, byte for byte.

    Raises:
        SnapshotCorruptError: a file is missing, unexpected, no plain file, or has other contents; the sentence names
            it.
    """
    sizes = {}
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise SnapshotCorruptError(f"{path}: is not a plain file")
        if path.name != MANIFEST:
            sizes[path.name] = path.stat().st_size
    check_sizes(sizes, manifest, str(folder))
    for name, entry in manifest.files.items():
        if sha256_of(folder / name) != entry.sha256:
            raise SnapshotCorruptError(f"{folder / name}: its SHA-256 differs from the manifest's")
