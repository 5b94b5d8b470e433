"""The last pass of ingest: sorted events stream by, duplicates go, figures are taken, columns grow on disk.

Memory is bounded by a batch and the longest run of events that one user has at one time.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.data.spill import Spill

__all__ = ["Rows", "Sweep"]

_MICROSECONDS = 1_000_000
# A sort key of (user's place in the chunk, row of the log): 2^40 rows and 2^23 users of a chunk fit in 63 bits.
_ORDINAL_BITS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Events by user, then time, then place in the log.

    Attributes:
        user: user codes, int32 or int64 `[T]`.
        time: microseconds since 1970, int64 `[T]`.
        ordinal: place in the log, int64 `[T]`.
        item: vocabulary rows, int32 `[T]`.
        action: action codes, uint8 `[T]`.
    """

    user: NDArray[np.integer]
    time: NDArray[np.int64]
    ordinal: NDArray[np.int64]
    item: NDArray[np.int32]
    action: NDArray[np.uint8]

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Self:
        """Columns of a batch of the same names, without a copy."""
        return cls(**{field.name: batch.column(field.name).to_numpy() for field in fields(cls)})

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, part: Any) -> "Rows":
        return Rows(**{field.name: getattr(self, field.name)[part] for field in fields(self)})

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(
            **{
                field.name: np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            }
        )


class Sweep:
    """Writes `item`, `action`, `timestamp` and `end` as raw columns while sorted rows are fed to it.

    Attributes:
        events: events written.
        users: users whose last event is written.
        duplicates: rows dropped because an earlier row has the same user, item, time and action.
        out_of_order: events that stand in the log before an event of the same user with an earlier time.
        tied: events in the same second as the user's event before.
        first, last: earliest and latest second.
        action_counts: events per action code, int64 `[256]`.
        met_items: which vocabulary rows have events, bool `[N]`.
    """

    def __init__(self, spill: Spill, items: int) -> None:
        self.events = self.users = self.duplicates = self.out_of_order = self.tied = 0
        self.first, self.last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self.action_counts: NDArray[np.int64] = np.zeros(256, np.int64)
        self.met_items: NDArray[np.bool_] = np.zeros(items, bool)
        self._carry: Rows | None = None
        self._user = -1  # of the last event written, and its second and the latest row of the log up to it
        self._second = 0
        self._latest = 0
        self._files = {name: spill.file(name) for name in ("item", "action", "timestamp", "end")}

    def feed(self, rows: Rows) -> None:
        """Take the next rows. The last run of one user and time waits, as the next rows may go on with it."""
        if self._carry is not None:
            rows = self._carry + rows
        if not len(rows):
            return
        ends = (rows.user != rows.user[-1]) | (rows.time != rows.time[-1])
        cut = len(rows) - int(np.argmax(ends[::-1])) if ends.any() else 0
        self._carry = rows[cut:]
        self._write(rows[:cut])

    def finish(self) -> None:
        """Write what waits and close the files."""
        if self._carry is not None:
            self._write(self._carry)
        if self.events:
            self._files["end"].write(np.array([self.events], np.int64).data)
            self.users += 1
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _write(self, rows: Rows) -> None:
        kept = rows[_first_of_its_kind(rows)]
        self.duplicates += len(rows) - len(kept)
        if not len(kept):
            return
        seconds = kept.time // _MICROSECONDS
        users = np.concatenate([np.array([self._user]), kept.user])
        follows = users[1:] == users[:-1]
        before = np.concatenate([np.array([self._second]), seconds])
        self.tied += int(np.count_nonzero(follows & (before[1:] == before[:-1])))
        self._count_disorder(kept, bool(follows[0]))
        started = np.flatnonzero(~follows)
        if self._user < 0:
            started = started[1:]  # nobody ends where the first user starts
        self._files["end"].write((self.events + started).astype(np.int64).data)
        self._files["item"].write(np.ascontiguousarray(kept.item, np.int32).data)
        self._files["action"].write(np.ascontiguousarray(kept.action, np.uint8).data)
        self._files["timestamp"].write(seconds.data)
        self.users += len(started)
        self.events += len(kept)
        self.first, self.last = min(self.first, int(seconds.min())), max(self.last, int(seconds.max()))
        self.action_counts += np.bincount(kept.action, minlength=256)
        self.met_items[kept.item] = True
        self._user, self._second = int(kept.user[-1]), int(seconds[-1])

    def _count_disorder(self, rows: Rows, goes_on: bool) -> None:
        # Ties stand in the log's order, so a row is out of order exactly if a later row of the log stands before it.
        place = rows.user.astype(np.int64) - rows.user[0]
        key = (place << _ORDINAL_BITS) | rows.ordinal
        start = self._latest if goes_on else int(key[0])
        latest = np.maximum.accumulate(np.concatenate([np.array([start]), key]))
        self.out_of_order += int(np.count_nonzero(latest[:-1] > key))
        self._latest = int(latest[-1]) & ((1 << _ORDINAL_BITS) - 1)


def _first_of_its_kind(rows: Rows) -> NDArray[np.bool_]:
    """Which rows have no earlier row of the same user, time, item and action: bool `[T]`."""
    keep = np.ones(len(rows), bool)
    if len(rows) < 2:
        return keep
    same = (rows.user[1:] == rows.user[:-1]) & (rows.time[1:] == rows.time[:-1])
    tied = np.zeros(len(rows), bool)
    tied[1:] |= same
    tied[:-1] |= same
    (places,) = np.nonzero(tied)
    if not len(places):
        return keep
    run = np.concatenate([np.zeros(1, np.int64), np.cumsum(~same)])[places]
    item, action = rows.item[places], rows.action[places]
    order = np.lexsort((action, item, run))  # stable: the log's first stays first
    repeated = np.ones(len(order) - 1, bool)
    for key in (run, item, action):
        ordered = key[order]
        repeated &= ordered[1:] == ordered[:-1]
    keep[places[order[1:][repeated]]] = False
    return keep
