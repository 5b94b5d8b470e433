"""Where a night works: its folder, named by what goes in, the lock that keeps others out, and what is live."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval.config import Config
from retrieval.errors import DataError, InputError, NoSnapshotError
from retrieval.files import remove_temporary_files
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot

__all__ = ["Clock", "alone", "live_snapshot", "made_by", "name_of_night", "night_folder"]


@dataclass(slots=True)
class Clock:
    """Seconds by stage; says what begins."""

    on_stage: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        self.on_stage(name)
        begun = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begun, 2)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "rebuild.lock").open("a")
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another rebuild is at work there") from None
        yield


def live_snapshot(registry: Registry) -> Snapshot | None:
    """The live snapshot, opened; None before the first."""
    try:
        return open_snapshot(registry.folder(registry.current()))
    except NoSnapshotError:
        return None


def name_of_night(sources: Path, config: Config, live: str | None) -> str:
    """What goes into a night, as 16 hex digits."""
    if not sources.exists():
        raise DataError(f"{sources}: no such file or folder")
    files = sorted(path for path in (sources.rglob("*") if sources.is_dir() else [sources]) if path.is_file())
    # By size and time of writing: reading a log of months to hash it would take longer than ingest.
    stats = [(str(path.relative_to(sources)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([stats, config.model_dump(mode="json"), live])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def made_by(registry: Registry, live: Snapshot | None) -> dict[str, Any]:
    """The report that the live snapshot was published with; empty if it is not a rebuild's."""
    if live is None:
        return {}
    found = json.loads((registry.folder(live.version) / "report.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and "night" in found else {}


def night_folder(work: Path, night: str) -> Path:
    """The folder of a night, made or found; those of other nights are removed."""
    folder = work / f"night-{night}"
    for other in work.glob("night-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    remove_temporary_files(folder)
    return folder
