"""Numpy-only types that flow between the packages.

Legend of shape suffixes used across the project: B rows (users) of a batch, T tokens of all rows together,
N items of the catalogue, D embedding width, K answers per query.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answers", "EventColumns", "JaggedBatch", "Plan", "SearchResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventColumns:
    """Events of many users laid end to end, one array per field; often memory-mapped.

    Attributes:
        items: vocabulary rows, int32 or int64 `[T]`.
        actions: action codes, uint8 `[T]`; 0 means that no action was recorded.
        timestamps: seconds since 1970 (UTC), int64 `[T]`, never falling within one user.
    """

    items: NDArray[np.integer]
    actions: NDArray[np.uint8]
    timestamps: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class JaggedBatch:
    """Histories of B users without padding: row b holds tokens `offsets[b]:offsets[b + 1]`, oldest first.

    Attributes:
        offsets: int64 `[B + 1]`, starting at 0 and ending at T.
        items: vocabulary rows, int64 `[T]`.
        actions: action codes, int64 `[T]`.
        timestamps: time of each event in seconds, int64 `[T]`.
        query_times: time at which the *next* item is asked for, in seconds, int64 `[T]`: the next event's time
            inside a row, the request's time at a row's last token.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    actions: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    query_times: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> "JaggedBatch":
        """The histories of consecutive users, without a copy."""
        starts, ends = self.offsets[:-1][rows], self.offsets[1:][rows]
        part = slice(int(starts[0]), int(ends[-1])) if len(starts) else slice(0, 0)
        return JaggedBatch(
            offsets=np.concatenate([starts[:1], ends]) - part.start if len(starts) else np.zeros(1, np.int64),
            items=self.items[part],
            actions=self.actions[part],
            timestamps=self.timestamps[part],
            query_times=self.query_times[part],
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row, int64 `[B]`."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Answers of one search, best first.

    Attributes:
        rows: vocabulary rows, int64 `[B, K]`; −1 where a query has fewer than K eligible items.
        scores: inner products, float32 `[B, K]`; −inf where `rows` is −1.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class Plan(IntEnum):
    """How a query was answered.

    Attributes:
        INDEX: the index was asked for more than wanted, and what is not eligible was dropped.
        SELECTOR: the index looked at eligible items only.
        SCAN: every eligible item was scored; exact whatever the index.
    """

    INDEX = 0
    SELECTOR = 1
    SCAN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers(SearchResult):
    """Answers of a search among eligible items, and how they were found.

    Attributes:
        plans: the `Plan` that answered each query, int8 `[B]`.
        eligible: how many items each query could have been answered with, int64 `[B]`; a query that wanted k falls
            short by k − eligible where that is positive, and never otherwise.
    """

    plans: NDArray[np.int8]
    eligible: NDArray[np.int64]
