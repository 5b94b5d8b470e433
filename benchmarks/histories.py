"""Stores of users' events: LMDB against SQLite, and Redis, behind the same histories.

Each engine is filled with the same users, read at random and appended to durably, alone and by many at once. Figures
are kept only after what was read back was compared with what was written.

Usage: python -m benchmarks.histories [--users 1000000] [--redis URL] [--folder DIR]
"""

import argparse
import functools
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
from retrieval.histories.recorded import RecordedHistories
from retrieval.histories.shared import SharedBlobs
from retrieval.histories.store import UserEvent

RESULTS = Path(__file__).parent / "results" / "histories.csv"
_MEAN_EVENTS = 50
_MAX_EVENTS = 1000
_CHUNK = 1024
_NOW = 1_800_000_000
_OUTSTANDING = 256
_SECONDS = 10.0


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
        row = self._connection().execute("SELECT content FROM blobs WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def update(self, keys: Sequence[bytes], change: Change) -> None:
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
        self._connection().close()


@dataclass
class Counting:
    """Passes everything on, and counts durable writes."""

    blobs: Blobs
    writes: int = 0

    def get(self, key: bytes) -> bytes | None:
        return self.blobs.get(key)

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        self.writes += 1
        self.blobs.update(keys, change)

    def close(self) -> None:
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


def _events(users: NDArray[np.int64]) -> Iterator[UserEvent]:
    for place, user in enumerate(users.tolist()):
        yield UserEvent(
            user_id=user, item_id=place, timestamp=_NOW, action="view", event_id=f"00000000-0000-0000-0000-{place:012}"
        )


def _append_alone(store: RecordedHistories, events: Iterator[UserEvent]) -> tuple[float, float]:
    """Median and 99th percentile of milliseconds of appends one after the other."""
    taken = []
    end = time.perf_counter() + _SECONDS / 2
    while time.perf_counter() < end:
        begun = time.perf_counter()
        store.append([next(events)]).result()
        taken.append(time.perf_counter() - begun)
    p50, p99 = np.quantile(taken, [0.5, 0.99]) * 1e3
    return float(p50), float(p99)


def _append_together(store: RecordedHistories, events: Iterator[UserEvent]) -> tuple[float, float]:
    """Events per second with many appends of one event outstanding, and the median milliseconds until one is durable."""
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


def measure(name: str, open_blobs: Callable[[], Blobs], users: int, size: Callable[[], int]) -> dict[str, object]:
    """Fill, read, append, check; one row of the table."""
    rng = np.random.default_rng(0)
    store = RecordedHistories(open_blobs(), _MAX_EVENTS)
    events = seconds = 0.0
    for chunk in range(users // _CHUNK):
        histories = _users(chunk)
        events += sum(len(columns.timestamps) for columns in histories.values())
        begun = time.perf_counter()
        store.fill(histories)
        seconds += time.perf_counter() - begun
    anonymous, gbytes = _anonymous_mbytes(), size() / 1e9
    store.close()
    counting = Counting(open_blobs())
    store = RecordedHistories(counting)
    users = users // _CHUNK * _CHUNK
    sample = rng.integers(0, users, 50_000)
    _check(store, sample[:200].tolist())
    read_p50, read_p99 = _read(store, sample)
    fresh = _events(rng.integers(0, users, 10_000_000))
    alone_p50, alone_p99 = _append_alone(store, fresh)
    counting.writes = 0
    rate, together_p50 = _append_together(store, fresh)
    row = {
        "store": name,
        "users": users,
        "events": int(events),
        "fill_seconds": seconds,
        "gbytes": gbytes,
        "anonymous_mbytes": anonymous,
        "read_p50_us": read_p50,
        "read_p99_us": read_p99,
        "append_alone_p50_ms": alone_p50,
        "append_alone_p99_ms": alone_p99,
        "append_256_per_second": rate,
        "append_256_p50_ms": together_p50,
        "appends_per_write": rate * _SECONDS / counting.writes,
    }
    store.close()
    store = RecordedHistories(open_blobs())
    _check(store, sample[:200].tolist())
    store.close()
    return row


def main() -> None:
    """Measure each engine and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--redis", metavar="URL", help="an empty database of a Redis that is durable at every write")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the temporary folder)")
    parser.add_argument("--stores", default="lmdb,sqlite", help="comma list (default: lmdb,sqlite)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        engines: dict[str, Callable[[], Blobs]] = {
            "lmdb": lambda: EmbeddedBlobs(Path(folder) / "lmdb"),
            "sqlite": lambda: SqliteBlobs(Path(folder) / "sqlite"),
        }
        if parsed.redis:
            engines["redis"] = lambda: SharedBlobs(parsed.redis)
        for name in [*parsed.stores.split(","), *(["redis"] if parsed.redis else [])]:

            def size(name: str = name) -> int:
                return sum(path.stat().st_blocks * 512 for path in (Path(folder) / name).glob("*"))

            row = measure(name, engines[name], parsed.users, size)
            print(
                {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            append_rows(RESULTS, [row | environment(torch.device("cpu"))])


if __name__ == "__main__":
    main()
