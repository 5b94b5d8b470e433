"""Numpy-only types that flow between the packages.

Legend of shape suffixes used across the project: B rows (users) of a batch, T tokens of all rows together,
N items of the catalogue, D embedding width, K answers per query.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from retrieval.config import Config

__all__ = ["Answers", "EventColumns", "JaggedBatch", "Plan", "SearchResult", "SideRows", "TokenKind"]


class TokenKind(Config):
    """What tokens beside the main series tell: an attribute of the user, or a series of slowly changing values.

    Attributes:
        name: of the attribute or series.
        context: whether it is static and stands in front; else it is an auxiliary series, merged by time.
        values: those with an embedding of their own, the first in row 1. Row 0 is for all others and for none.
    """

    name: str
    context: bool
    values: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of the kind's embedding table."""
        return len(self.values) + 1


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
class SideRows:
    """What is read beside the main series of B rows. Kinds count from 1, context before auxiliary series.

    Attributes:
        num_kinds: K.
        context: row of each context kind's value in its table, int64 `[B, C]`.
        kinds: kind of each auxiliary event, integer `[M]`, from C + 1 to K.
        values: row of its value in the kind's table, integer `[M]`.
        timestamps: seconds, int64 `[M]`, never falling within one kind of one row.
        starts, ends: row b has auxiliary events `starts[b]:ends[b]`, int64 `[B]`.
    """

    num_kinds: int
    context: NDArray[np.int64]
    kinds: NDArray[np.integer]
    values: NDArray[np.integer]
    timestamps: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: Sequence["SideRows"]) -> "SideRows":
        """All rows of several, at least one, of the same kinds."""
        begins = np.cumsum([0, *(len(part.kinds) for part in parts)])
        return cls(
            num_kinds=parts[0].num_kinds,
            context=np.concatenate([part.context for part in parts]),
            kinds=np.concatenate([part.kinds for part in parts]),
            values=np.concatenate([part.values for part in parts]),
            timestamps=np.concatenate([part.timestamps for part in parts]),
            starts=np.concatenate([part.starts + begin for part, begin in zip(parts, begins, strict=False)]),
            ends=np.concatenate([part.ends + begin for part, begin in zip(parts, begins, strict=False)]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JaggedBatch:
    """Histories of B users without padding: row b holds tokens `offsets[b]:offsets[b + 1]`, oldest first.

    Attributes:
        offsets: int64 `[B + 1]`, starting at 0 and ending at T.
        items: vocabulary rows, int64 `[T]`; of a token of another kind, the row in that kind's table.
        actions: action codes, int64 `[T]`; 0 of other kinds.
        timestamps: time of each event in seconds, int64 `[T]`.
        query_times: time at which the *next* item is asked for, in seconds, int64 `[T]`: the next token's time
            inside a row, the request's time at a row's last token.
        query_actions: action for which it is asked for, int64 `[T]`: the next token's inside a row, the request's at
            a row's last token, 0 for any; None where no encoder asks.
        kinds: kind of each token, int64 `[T]`, 0 for the main series; None where all are of it.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    actions: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    query_times: NDArray[np.int64]
    query_actions: NDArray[np.int64] | None = None
    kinds: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: slice) -> "JaggedBatch":
        """The histories of consecutive users, without a copy."""
        starts, ends = self.offsets[:-1][rows], self.offsets[1:][rows]
        part = slice(int(starts[0]), int(ends[-1])) if len(starts) else slice(0, 0)
        offsets = np.concatenate([starts[:1], ends]) - part.start if len(starts) else np.zeros(1, np.int64)
        return self.mapped(offsets, lambda tokens: tokens[part])

    def mapped(
        self, offsets: NDArray[np.int64], change: Callable[[NDArray[np.int64]], NDArray[np.int64]]
    ) -> "JaggedBatch":
        """A batch of other tokens: `change` is applied to every field of tokens."""
        names = [field.name for field in fields(self) if field.name != "offsets"]
        present = {name: one for name in names if (one := getattr(self, name)) is not None}
        return JaggedBatch(offsets=offsets, **{name: change(one) for name, one in present.items()})

    def shortened(self, length: int, *, spread: bool) -> "JaggedBatch":
        """Rows of at most `length` tokens, each with its own times and action asked for.

        Tokens beside the main series stay, in rows that are cut at least one event does, and the last token does, at
        which the request is made. Of the others the latest stay, or with `spread` the latest for one half and for the
        other some of the older ones, evenly spaced. Which ones follows from the row's length alone.
        """
        stays, main = np.ones(len(self.items), bool), self.main
        for row in np.flatnonzero(self.lengths > length).tolist():
            part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
            events = part.start + np.flatnonzero(main[part])
            room = max(1, length - (part.stop - part.start - len(events)))
            if len(events) <= room:
                continue
            latest = room - room // 2 if spread else room
            older = events[:-latest]
            places = (2 * np.arange(room - latest) + 1) * len(older) // (2 * max(room - latest, 1))
            stays[older] = False
            stays[older[places]] = True
        kept = np.flatnonzero(stays)
        return self.mapped(np.searchsorted(kept, self.offsets).astype(np.int64), lambda tokens: tokens[kept])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per row, int64 `[B]`."""
        return np.diff(self.offsets)

    @property
    def main_lengths(self) -> NDArray[np.int64]:
        """Tokens of the main series per row, int64 `[B]`."""
        return np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(self.main)])[self.offsets])

    @property
    def main(self) -> NDArray[np.bool_]:
        """Which tokens are of the main series, bool `[T]`."""
        return np.ones(len(self.items), bool) if self.kinds is None else self.kinds == 0


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
