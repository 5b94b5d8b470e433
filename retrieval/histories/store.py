"""What is kept of users, and what the server needs of a store of it."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from retrieval.histories.event import Event

__all__ = ["HistoryStore", "Series", "StoredHistory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Slowly changing values, oldest first; runs of equal values need not be compressed.

    Attributes:
        timestamps: seconds since 1970 (UTC), int64 `[P]`, never falling.
        codes: place of each value in `values`, integer `[P]`.
        values: texts without repeats.
    """

    timestamps: NDArray[np.int64]
    codes: NDArray[np.integer]
    values: Sequence[str]

    @classmethod
    def of(cls, points: Iterable[tuple[int, str]]) -> Self:
        """A series of times and values."""
        places: dict[str, int] = {}
        listed = [(time, places.setdefault(value, len(places))) for time, value in points]
        timestamps, codes = np.array(listed, np.int64).reshape(-1, 2).T
        return cls(timestamps=timestamps, codes=codes, values=list(places))

    def lists(self) -> tuple[list[int], list[str]]:
        """Times and values."""
        return self.timestamps.tolist(), [self.values[code] for code in self.codes.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHistory:
    """What is stored of one user; events are oldest first.

    Attributes:
        items: item id of each event, int64 `[T]` or strings.
        actions: name of each event's action, "" where there is none.
        timestamps: seconds since 1970 (UTC), int64 `[T]`, never falling.
        context: static attributes by name.
        auxiliary: slowly changing values by the name of their series.
    """

    items: NDArray[np.int64] | Sequence[int] | Sequence[str]
    actions: Sequence[str]
    timestamps: NDArray[np.int64]
    context: Mapping[str, str] = field(default_factory=dict)
    auxiliary: Mapping[str, Series] = field(default_factory=dict)


class HistoryStore(Protocol):
    """Stored histories by user id. Implementations are asked from several threads at once."""

    def read(self, user_id: int | str) -> StoredHistory | None:
        """A user's events, or None for a user that is not known. May block.

        Raises:
            HistoryStoreError: the store cannot be read.
        """
        ...

    def append(self, events: Sequence[Event]) -> "Future[None]":
        """Record events; does not block. Appending an event again changes nothing.

        Returns:
            Done once all of them are durable and `read` answers with them. Fails with `HistoryStoreError` if the
            store cannot be written, and then none, some or all of them are there. Cancelled before its events are
            written, they never are.
        """
        ...

    def close(self) -> None:
        """Finish the appends in hand and give the store back. Nothing may be called any more."""
        ...
