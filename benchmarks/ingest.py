"""How fast, and in how much memory, a log of synthetic events becomes a dataset: one table row per run.

    python benchmarks/ingest.py --events 100000000 --memory 2GB

Events are made as Parquet files in a temporary folder, out of order across files, with many ties and some
duplicates. The answer is checked against direct DuckDB queries over the files before any figure is printed. Peak
memory is that of a child process which does nothing but the ingest.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ingest

_FILE_EVENTS = 5_000_000
_CHECKED_USERS = 200
_HEAD = "| events | users | items | ids | memory | seconds | events/s | peak RSS | log | dataset | disk peak | open |"
# One event in so many is delivered twice.
_DUPLICATED = 1000


def make_events(folder: Path, events: int, string_ids: bool) -> None:
    """Write about `events` rows: skewed users and items, a week's seconds per file, files overlapping in time."""
    folder.mkdir()
    connection = duckdb.connect()
    connection.execute("SET preserve_insertion_order = true")
    user, item = ("'user-' || u", "'item/' || i") if string_ids else ("u", "i")
    users, items = max(events // 50, 1), max(events // 500, 10)
    for number, start in enumerate(range(0, events, _FILE_EVENTS)):
        rows = min(_FILE_EVENTS, events - start)
        uniform = [f"(hash(4 * ({start} + n) + {salt}) / 18446744073709551616.0)" for salt in range(4)]
        connection.execute(
            f"""COPY (
                SELECT {user} AS user_id, {item} AS item_id, t AS timestamp, a AS action FROM (
                    SELECT n, CAST({users} * {uniform[0]} AS BIGINT) AS u,
                        CAST({items} * pow({uniform[1]}, 3) AS BIGINT) AS i,
                        {1_600_000_000 + 500_000 * number} + CAST(600000 * {uniform[2]} AS BIGINT) AS t,
                        ['view', 'click', 'purchase'][1 + CAST(2 * {uniform[3]} AS BIGINT)] AS a
                    FROM range({rows}) r(n)
                ), range(2) copies(c) WHERE c = 0 OR n % {_DUPLICATED} = 0
            ) TO '{folder}/part-{number:05}.parquet'"""
        )


def run_ingest(log: Path, out: Path, memory: str) -> None:
    """Ingest, and print wall seconds and peak resident bytes as JSON: the child process's whole work."""
    begun = time.perf_counter()
    ingest(log, out, schema=EventSchema(positive=("purchase",)), memory=memory)
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def check(log: Path, dataset: Dataset) -> None:
    """Compare with direct queries over the log.

    Raises:
        AssertionError: the dataset is not what the log says.
    """
    connection = duckdb.connect()
    files = f"read_parquet('{log}/*.parquet', filename=true, file_row_number=true)"
    rows, users, items = connection.execute(
        f"SELECT count(*), count(DISTINCT user_id), count(DISTINCT item_id) FROM {files}"
    ).fetchall()[0]
    found = (dataset.info.events + dataset.info.repairs["duplicates"], len(dataset), len(dataset.vocabulary))
    assert found == (rows, users, items), (found, (rows, users, items))
    times = dataset.events.timestamps
    for begin in range(0, len(times) - 1, 1 << 22):
        rises = np.diff(times[begin : begin + (1 << 22) + 1]) >= 0
        starts = dataset.offsets[np.searchsorted(dataset.offsets, begin, "right") :]
        rises[starts[starts <= begin + len(rises)] - begin - 1] = True
        assert rises.all(), "times fall within a user"
    sample = np.random.default_rng(0).choice(len(dataset), min(_CHECKED_USERS, len(dataset)), replace=False)
    names = dataset.user_ids.take(pa.array(sample)).to_pylist()
    wanted: dict[int | str, list[tuple[object, ...]]] = {name: [] for name in names}
    # In the log's order, the first of equal rows stays; a dictionary keeps both.
    found_rows = connection.execute(
        f"SELECT user_id, timestamp, item_id, action FROM {files} WHERE user_id IN (SELECT unnest(?)) "
        "ORDER BY user_id, timestamp, filename, file_row_number",
        [names],
    ).fetchall()
    for name, *event in dict.fromkeys(found_rows):
        wanted[name].append(tuple(event))
    for user, name in zip(sample, names, strict=True):
        span = slice(dataset.offsets[user], dataset.offsets[user + 1])
        seen = zip(
            dataset.events.timestamps[span].tolist(),
            dataset.vocabulary.ids_of(dataset.events.items[span].astype(np.int64)),
            [dataset.info.actions[code].value for code in dataset.events.actions[span]],
            strict=True,
        )
        assert list(seen) == wanted[name], f"user {name}"


class DiskWatch:
    """Notes the largest size that a folder grows to, in bytes."""

    def __init__(self, folder: Path) -> None:
        self.peak = 0
        self._folder = folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            size = 0
            for path in self._folder.rglob("*"):
                try:
                    size += path.stat().st_blocks * 512
                except OSError:  # gone since it was listed
                    continue
            self.peak = max(self.peak, size)

    def stop(self) -> int:
        """End watching; returns the peak."""
        self._done.set()
        self._thread.join()
        return self.peak


def main() -> None:
    """Make, ingest, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--string-ids", action="store_true")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        log, out = options.child
        run_ingest(log, out, options.memory)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-ingest-") as temporary:
        log, out = Path(temporary) / "log", Path(temporary) / "work" / "dataset"
        make_events(log, options.events, options.string_ids)
        out.parent.mkdir()
        watch = DiskWatch(out.parent)
        answer = subprocess.run(
            [sys.executable, __file__, "--memory", options.memory, "--child", str(log), str(out)],
            check=True,
            capture_output=True,
            text=True,
        )
        disk = watch.stop()
        figures = json.loads(answer.stdout)
        opened = []
        for _ in range(5):
            begun = time.perf_counter()
            dataset = Dataset(out)
            opened.append(1000 * (time.perf_counter() - begun))
        check(log, dataset)
        gigabyte = 1e9
        source = sum(path.stat().st_size for path in log.iterdir()) / gigabyte
        final = sum(path.stat().st_size for path in out.iterdir()) / gigabyte
        print(_HEAD)
        print("|---" * (_HEAD.count("|") - 1) + "|")
        print(
            f"| {dataset.info.events:,} | {len(dataset):,} | {len(dataset.vocabulary):,} "
            f"| {'string' if options.string_ids else 'integer'} | {options.memory} | {figures['seconds']:.1f} "
            f"| {dataset.info.events / figures['seconds']:,.0f} | {figures['peak'] / gigabyte:.2f} GB "
            f"| {source:.2f} GB | {final:.2f} GB | {disk / gigabyte:.2f} GB | {np.median(opened):.1f} ms |"
        )


if __name__ == "__main__":
    main()
