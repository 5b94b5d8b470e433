"""What the server needs of a store of users' events."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["HistoryStore", "StoredHistory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHistory:
    """All stored events of one user, oldest first.

    Attributes:
        items: item id of each event.
        actions: name of each event's action, "" where there is none.
        timestamps: seconds since 1970 (UTC), int64 `[T]`, never falling.
    """

    items: NDArray[np.int64] | Sequence[int] | Sequence[str]
    actions: Sequence[str]
    timestamps: NDArray[np.int64]


class HistoryStore(Protocol):
    """Stored histories by user id. Implementations are asked from several threads at once."""

    def get(self, user_id: int | str) -> StoredHistory | None:
        """A user's events, or None for a user that is not known. May block."""
        ...
