"""Stores of users' events: LMDB against SQLite, and Redis, behind the same histories.

Each engine is filled with the same users, then by turns read at random and
appended to durably, alone and by many at once. Figures
are medians of the turns, kept only after what was read back was compared with what was written.

Usage: python -m benchmarks.histories [--users 1000000] [--redis URL] [--folder DIR]
"""

import argparse
import functools
import math
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import WrongAnswerError, append_rows, environment
from retrieval.histories.blobs import Blobs, Change
from retrieval.histories.codec import Columns
from retrieval.histories.embedded import EmbeddedBlobs
from retrieval.histories.event import Event
from retrieval.histories.recorded import RecordedHistories
from retrieval.histories.shared import SharedBlobs

RESULTS = Path(__file__).parent / "results" / "histories.csv"
_MEAN_EVENTS = 50
_MAX_EVENTS = 1000
_CHUNK = 1024
_NOW = 1_800_000_000
_OUTSTANDING = 256
_SECONDS = 5.0
_ROUNDS = 5


class SqliteBlobs:
    """Bytes by key in SQLite, as durable as LMDB: a write-ahead log that is synced at every commit."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._local = folder / "histories.sqlite", threading.local()
        self._connection().execute(
            "CREATE TABLE IF NOT EXISTS blobs (key BLOB PRIMARY KEY, content BLOB) WITHOUT ROWID"
        )

    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            connection = sqlite3.connect(self._path, isolation_level=None)
            for setting in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=34359738368"):
                connection.execute(f"PRAGMA {setting}").fetchall()
            self._local.connection = connection
        found: sqlite3.Connection = self._local.connection
        return found

    def get(self, key: bytes) -> bytes | None:
        """See `Blobs`."""
        row = self._connection().execute("SELECT content FROM blobs WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See `Blobs`. One transaction."""
        connection = self._connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for key in sorted(keys):
                held = self.get(key)
                content = change(key, held)
                if content != held:
                    connection.execute("REPLACE INTO blobs VALUES (?, ?)", (key, content))
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def close(self) -> None:
        """See `Blobs`."""
        self._connection().close()


@dataclass
class Counting:
    """Passes everything on, and counts durable writes."""

    blobs: Blobs
    writes: int = 0

    def get(self, key: bytes) -> bytes | None:
        """See `Blobs`."""
        return self.blobs.get(key)

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See `Blobs`."""
        self.writes += 1
        self.blobs.update(keys, change)

    def close(self) -> None:
        """See `Blobs`."""
        self.blobs.close()


@functools.lru_cache(maxsize=4)
def _users(chunk: int) -> dict[int | str, Columns]:
    """Users of a chunk, always the same: 1 to 999 events, about 50 on average."""
    rng = np.random.default_rng(chunk)
    histories: dict[int | str, Columns] = {}
    for user in range(chunk * _CHUNK, (chunk + 1) * _CHUNK):
        count = int(np.clip(rng.geometric(1 / _MEAN_EVENTS), 1, _MAX_EVENTS - 1))
        histories[user] = Columns(
            timestamps=_NOW - np.sort(rng.integers(1, 10_000_000, count))[::-1],
            items=rng.integers(0, 2**40, count),
            names=["view", "like"],
            codes=rng.integers(0, 2, count).astype(np.uint16),
            digests=np.zeros(count, np.uint64),
        )
    return histories


def _anonymous_mbytes() -> float:
    """Memory of this process that no file stands for."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def _check(store: RecordedHistories, users: Sequence[int]) -> None:
    for user in users:
        expected, found = _users(user // _CHUNK)[user], store.read(user)
        if found is None or not (
            np.array_equal(found.timestamps[: len(expected.timestamps)], expected.timestamps)
            and np.array_equal(np.asarray(found.items)[: len(expected.timestamps)], expected.items)
        ):
            raise WrongAnswerError(f"user {user}: what was read is not what was written")


def _read(store: RecordedHistories, users: NDArray[np.int64]) -> tuple[float, float]:
    """Median and 99th percentile of microseconds."""
    taken = []
    for user in users.tolist():
        begun = time.perf_counter()
        store.read(user)
        taken.append(time.perf_counter() - begun)
    p50, p99 = np.quantile(taken, [0.5, 0.99]) * 1e6
    return float(p50), float(p99)


def _events(users: NDArray[np.int64]) -> Iterator[Event]:
    for place, user in enumerate(users.tolist()):
        yield Event(
            user_id=user, item_id=place, timestamp=_NOW, action="view", event_id=f"00000000-0000-0000-0000-{place:012}"
        )


def _append_alone(store: RecordedHistories, events: Iterator[Event]) -> tuple[float, float]:
    """Median and 99th percentile of milliseconds of appends one after the other."""
    taken = []
    end = time.perf_counter() + _SECONDS / 2
    while time.perf_counter() < end:
        begun = time.perf_counter()
        store.append([next(events)]).result()
        taken.append(time.perf_counter() - begun)
    p50, p99 = np.quantile(taken, [0.5, 0.99]) * 1e3
    return float(p50), float(p99)


def _append_together(store: RecordedHistories, events: Iterator[Event]) -> tuple[float, float]:
    """Events per second with many appends of one event outstanding, and the median milliseconds of one."""
    outstanding: deque[tuple[float, Future[None]]] = deque()
    taken = []
    begun = time.perf_counter()
    while time.perf_counter() < begun + _SECONDS:
        while len(outstanding) < _OUTSTANDING:
            outstanding.append((time.perf_counter(), store.append([next(events)])))
        started, done = outstanding.popleft()
        done.result()
        taken.append(time.perf_counter() - started)
    for _, done in outstanding:
        done.result()
    seconds = time.perf_counter() - begun
    return (len(taken) + len(outstanding)) / seconds, float(np.median(taken)) * 1e3


class Measured:
    """A store that is filled, then measured in rounds."""

    def __init__(self, name: str, open_blobs: Callable[[], Blobs], users: int, folder: Path) -> None:
        self._open_blobs, self._users = open_blobs, users // _CHUNK * _CHUNK
        rng = np.random.default_rng(0)
        self._sample = rng.integers(0, self._users, 20_000)
        self._fresh = _events(rng.integers(0, self._users, 10_000_000))
        store = RecordedHistories(open_blobs(), _MAX_EVENTS)
        events, seconds = 0, 0.0
        for chunk in range(users // _CHUNK):
            histories = _users(chunk)
            events += sum(len(columns.timestamps) for columns in histories.values())
            begun = time.perf_counter()
            store.fill(histories)
            seconds += time.perf_counter() - begun
        self._filled = {
            "store": name,
            "users": self._users,
            "events": events,
            "fill_seconds": seconds,
            "gbytes": sum(path.stat().st_blocks * 512 for path in (folder / name).glob("*")) / 1e9 or math.nan,
            "anonymous_mbytes": _anonymous_mbytes(),
        }
        store.close()
        self._counting = Counting(open_blobs())
        self._store = RecordedHistories(self._counting)
        _check(self._store, self._sample[:200].tolist())
        _read(self._store, self._sample)
        self._rounds: list[dict[str, float]] = []

    def round(self) -> None:
        """Read and append once more."""
        read_p50, read_p99 = _read(self._store, self._sample)
        alone_p50, alone_p99 = _append_alone(self._store, self._fresh)
        self._counting.writes = 0
        rate, together_p50 = _append_together(self._store, self._fresh)
        self._rounds.append(
            {
                "read_p50_us": read_p50,
                "read_p99_us": read_p99,
                "append_alone_p50_ms": alone_p50,
                "append_alone_p99_ms": alone_p99,
                "append_256_per_second": rate,
                "append_256_p50_ms": together_p50,
                "appends_per_write": rate * _SECONDS / self._counting.writes,
            }
        )

    def row(self) -> dict[str, object]:
        """Medians of the rounds, once the store has been opened again and checked."""
        self._store.close()
        store = RecordedHistories(self._open_blobs())
        _check(store, self._sample[:200].tolist())
        store.close()
        return self._filled | {name: float(np.median([one[name] for one in self._rounds])) for name in self._rounds[0]}


def main() -> None:
    """Measure each engine and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--redis", metavar="URL", help="an empty database of a Redis that is durable at every write")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as name:
        folder = Path(name)
        engines: dict[str, Callable[[], Blobs]] = {
            "lmdb": lambda: EmbeddedBlobs(folder / "lmdb"),
            "sqlite": lambda: SqliteBlobs(folder / "sqlite"),
        }
        if parsed.redis:
            engines["redis"] = lambda: SharedBlobs(parsed.redis)
        measured = [Measured(name, open_blobs, parsed.users, folder) for name, open_blobs in engines.items()]
        # By turns: what the disk does for others must not meet one of them alone.
        for _ in range(_ROUNDS):
            for one in measured:
                one.round()
        rows = [one.row() for one in measured]
    for row in rows:
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    append_rows(RESULTS, [row | environment(torch.device("cpu")) for row in rows])


if __name__ == "__main__":
    main()
