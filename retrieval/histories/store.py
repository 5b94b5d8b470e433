"""What is kept of users' events, and what the server needs of a store of them."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["HistoryStore", "StoredHistory", "UserEvent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHistory:
    """The stored events of one user, oldest first.

    Attributes:
        items: item id of each event, int64 `[T]` or strings.
        actions: name of each event's action, "" where there is none.
        timestamps: seconds since 1970 (UTC), int64 `[T]`, never falling.
    """

    items: NDArray[np.int64] | Sequence[int] | Sequence[str]
    actions: Sequence[str]
    timestamps: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEvent:
    """One event to be recorded.

    Attributes:
        user_id: whose; an integer of 64 bits, or text of at most `MAX_ID_BYTES` in UTF-8.
        item_id: on which item; likewise.
        timestamp: seconds since 1970 (UTC).
        action: what was done, by name; "" if that is not known.
        event_id: by which a repeat is recognised, unique among the user's events. Where "", by item, action and time.
    """

    user_id: int | str
    item_id: int | str
    timestamp: int
    action: str = ""
    event_id: str = ""


class HistoryStore(Protocol):
    """Stored histories by user id. Implementations are asked from several threads at once."""

    def read(self, user_id: int | str) -> StoredHistory | None:
        """A user's events, or None for a user that is not known. May block.

        Raises:
            HistoryStoreError: the store cannot be read.
        """
        ...

    def append(self, events: Sequence[UserEvent]) -> "Future[None]":
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
