"""One DuckDB connection that works out of core in a scratch folder and fails in this package's words."""

import contextlib
import gzip
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from retrieval.errors import ConfigError, DataError, RetrievalError

__all__ = ["Engine", "Progress", "identifier", "literal"]

Progress = Callable[[str, float], None]

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
# With less than this per thread, DuckDB's sorts and joins run out of memory rather than spill.
_BYTES_PER_THREAD = 256 * 10**6
_BATCH_ROWS = 1 << 20
_POLL_SECONDS = 0.25


def identifier(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


class Engine:
    """DuckDB over a database file in `folder`; everything that it spills lies there too.

    Args:
        folder: an existing scratch folder; its owner removes it.
        memory: DuckDB's limit for its own buffers, e.g. `"2GB"`.
        progress: called with a stage's name and the share of it that is done, 0 to 1. Calls come from a helper
            thread while DuckDB computes.

    Raises:
        ConfigError: `memory` is not a size.
    """

    def __init__(self, folder: Path, memory: str, progress: Progress | None = None) -> None:
        size = _SIZE.fullmatch(memory)
        if size is None:
            raise ConfigError(f"memory: {memory!r} is not a size such as '2GB' or '512MB'")
        unit = size[2].lower()
        total = float(size[1]) * (1024 if "i" in unit else 1000) ** _POWERS[unit[0]]
        self._memory = memory
        self._progress = progress
        with _translated(memory):
            self._connection = duckdb.connect(str(folder / "work.duckdb"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings = {
            "memory_limit": literal(f"{int(total)}B"),
            "temp_directory": literal(str(folder / "spill")),
            "threads": str(max(1, min(cores, int(total) // _BYTES_PER_THREAD))),
            # A log's order is its tie rule: readers must hand rows on as they stand in the files.
            "preserve_insertion_order": "true",
            # Times without a zone are UTC.
            "TimeZone": "'UTC'",
            "python_enable_replacements": "false",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            # The bar itself stays hidden: only its figure is wanted.
            "enable_progress_bar": "true",
            "enable_progress_bar_print": "false",
        }
        for name, value in settings.items():
            self._connection.execute(f"SET {name} = {value}")

    def close(self) -> None:
        """Close the connection; DuckDB removes what it spilled."""
        self._connection.close()

    def report(self, stage: str, share: float) -> None:
        """Tell the caller how far a stage is."""
        if self._progress is not None:
            self._progress(stage, share)

    def rows(self, sql: str, stage: str | None = None) -> list[tuple[Any, ...]]:
        """Run a statement and fetch all rows of its (small) answer."""
        with self._watched(stage), _translated(self._memory):
            return self._connection.execute(sql).fetchall()

    def row(self, sql: str) -> tuple[Any, ...]:
        """Run a query that answers with one row."""
        (row,) = self.rows(sql)
        return row

    def table(self, sql: str) -> pa.Table:
        """Run a query and hold its answer in memory."""
        with _translated(self._memory):
            return self._connection.sql(sql).to_arrow_table()

    def keep(self, name: str, rows: pa.Table) -> None:
        """Copy rows into a new table."""
        with _translated(self._memory):
            self._connection.register("given", rows)
            self._connection.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
            self._connection.unregister("given")

    def batches(self, sql: str, stage: str | None = None) -> Iterator[pa.RecordBatch]:
        """Run a query and stream its answer in batches of bounded size."""
        with _translated(self._memory):
            with self._watched(stage):
                reader = self._connection.sql(sql).to_arrow_reader(_BATCH_ROWS)
            yield from reader

    @contextlib.contextmanager
    def _watched(self, stage: str | None) -> Iterator[None]:
        if stage is None or self._progress is None:
            yield
            return
        done = threading.Event()

        def poll() -> None:
            while not done.wait(_POLL_SECONDS):
                percent = self._connection.query_progress()
                if percent >= 0:
                    self.report(stage, min(percent / 100, 1.0))

        watcher = threading.Thread(target=poll, name="ingest-progress", daemon=True)
        self.report(stage, 0.0)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
        self.report(stage, 1.0)


@contextlib.contextmanager
def _translated(memory: str) -> Iterator[None]:
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise ConfigError(f"memory: {memory} is not enough for this log ({_first_line(str(error))})") from None
    except duckdb.Error as error:
        text = str(error)
        if "No space left" in text or "max_temp_directory_size" in text:
            raise RetrievalError(f"no space is left for temporary files ({_first_line(text)})") from None
        raise DataError(_sentence(text)) from None
    except (pa.ArrowException, OSError) as error:  # a stream's later batches fail through Arrow
        raise RetrievalError(f"reading sorted events failed ({_first_line(str(error))})") from None


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no reason given"
    return re.sub(r"^([A-Z][A-Za-z ]* Error: )+", "", line).rstrip(". ")


def _sentence(text: str) -> str:
    """One sentence for a reading error of DuckDB, whose own messages go on about its options for many lines."""
    if found := re.search(r"CSV Error on Line: (\d+)", text):
        file = re.search(r"^\s*file = (.+)$", text, re.MULTILINE)
        where = f"{file[1] if file else 'the file'}: line {found[1]}"
        if fields := re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", text):
            return f"{where} has {fields[2]} fields instead of {fields[1]}"
        if "not utf-8" in text:
            return f"{where} is not UTF-8; if the file is Latin-1, give encoding latin-1"
        if "unterminated quote" in text:
            return f"{where}: a quote is never closed"
        reason = next((line for line in text.splitlines()[2:] if line.strip()), "cannot be read")
        return f"{where} cannot be read ({_first_line(reason)})"
    if found := re.search(r'Malformed JSON in file "(.+?)", at byte \d+ in line (\d+): (.+)', text):
        line = _bad_json_line(Path(found[1]), int(found[2]))
        return f"{found[1]}: line {line} is not valid JSON ({found[3].rstrip('. ')})"
    if found := re.search(r'JSON transform error in file "(.+?)", in line (\d+): (.+)', text):
        return f"{found[1]}: line {found[2]}: {found[3]}"
    if found := re.search(r"Unexpected end of GZIP stream: (.+)", text):
        return f"{found[1]}: the gzip stream ends too early; the file is truncated"
    return _first_line(text)


def _bad_json_line(path: Path, near: int) -> int:
    # DuckDB counts the line after the bad one in some cases: ask the standard library which of the two it is.
    with (
        contextlib.suppress(OSError, EOFError),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        for number, line in enumerate(itertools.islice(file, max(near - 2, 0), near), max(near - 1, 1)):
            try:
                json.loads(line)
            except ValueError:
                return number
    return near
