"""Where a night works: its folder, named by what goes in, the lock that keeps others out, and what is live."""

import contextlib
import fcntl
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from retrieval.config import Config
from retrieval.encoder.checkpoint import read_info
from retrieval.errors import CheckpointError, ConfigError, InputError, NoSnapshotError, RetrievalError
from retrieval.files import remove_temporary_files
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.training.state import read_settings, read_state
from retrieval.training.trainer import TRAINING_STATE

__all__ = [
    "FINAL",
    "JUDGED",
    "Clock",
    "alone",
    "explained",
    "live_snapshot",
    "made_by",
    "name_of_night",
    "night_folder",
    "state_of_live",
]

JUDGED, FINAL = "judged", "final"
"""Folders of a night's two trainings."""


@dataclass(slots=True)
class Clock:
    """What each stage takes; says what begins.

    Attributes:
        on_stage: called with a stage's name.
        seconds: by stage.
        cpu_seconds: of all threads of the process, by stage.
        memory_mb: the most that the process had resident within the stage; up to its end, where the system does not
            begin to count anew.
    """

    on_stage: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        self.on_stage(name)
        # Linux forgets a process's peak for a 5 written there.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        begun, worked = time.monotonic(), time.process_time()
        yield
        self.seconds[name] = round(time.monotonic() - begun, 2)
        self.cpu_seconds[name] = round(time.process_time() - worked, 2)
        self.memory_mb[name] = _peak_mb()


def _peak_mb() -> int:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the system refuses, a full disk for instance, into one sentence.

    Raises:
        RetrievalError: in place of an error of the system or of a library that writes files.
    """
    try:
        yield
    except OSError as error:
        raise RetrievalError(f"{error.filename or folder}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise RetrievalError(f"{folder}: a file of weights cannot be written ({error})") from error


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


def night_folder(work: Path, night: str, live_night: str | None) -> Path:
    """The folder of a night, made or found.

    Those of other nights are removed, but for what the live snapshot's own, `live_night`, had learned last.
    """
    folder = work / f"night-{night}"
    for other in work.glob("night-*"):
        if other == folder:
            continue
        if other.name == f"night-{live_night}":
            for part in other.iterdir():
                if part.is_dir() and part.name != FINAL:
                    shutil.rmtree(part)
        else:
            shutil.rmtree(other)
    folder.mkdir(exist_ok=True)
    remove_temporary_files(folder)
    return folder


def state_of_live(
    work: Path, live: Snapshot, live_night: str | None, settings: Mapping[str, Any]
) -> tuple[Callable[[], dict[str, Tensor]] | None, str]:
    """What reads all that was learned up to the live snapshot, and where it is from; or None and why it is not there.

    Args:
        work: the job's folder, where the night that made the live snapshot left it.
        live: the live snapshot.
        live_night: that night's name; None if it was published by other means.
        settings: hyperparameters that decide what there is to learn, tonight's.
    """
    anew = "the optimiser starts anew"
    if live_night is None:
        return None, f"{live.version} was not made by a rebuild: {anew}"
    run = work / f"night-{live_night}" / FINAL
    try:
        info = read_info(run)
        before = read_settings(run / TRAINING_STATE)
    except (CheckpointError, ConfigError):
        return None, f"{work}: holds no training state of {live.version}: {anew}"
    if info.weights_sha256 != live.manifest.model:
        return None, f"{run}: is not what {live.version} was made of: {anew}"
    for name, value in settings.items():
        if before["training"].get(name) != value:
            return None, f"{live.version} was trained with another {name}: {anew}"
    return lambda: read_state(run / TRAINING_STATE), f"the optimiser goes on from {live.version}"
