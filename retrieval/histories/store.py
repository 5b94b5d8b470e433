"""What is kept of users' events, and what the server needs of a store of them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.histories.event import Event

__all__ = ["HistoryStore", "StoredHistory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHistory:
    """The stored events of one user, oldest first.

    Attributes:
        items: item id of each event, int64 `[T]` or strings.
        actions: name of each event's action, "" where there is none.
        timestamps: seconds since 1970 (UTC), int64 `[T]`, never falling.
        context: static attributes by name.
        auxiliary: slowly changing values by the name of their series: seconds and value of each event, oldest first.
    """

    items: NDArray[np.int64] | Sequence[int] | Sequence[str]
    actions: Sequence[str]
    timestamps: NDArray[np.int64]
    context: Mapping[str, str] = field(default_factory=dict)
    auxiliary: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)


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
