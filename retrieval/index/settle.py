"""From what was fetched for some queries, the answers that it determines.

What is not eligible is dropped from what the index and the added items gave. Are enough left, and does nothing that
was not fetched score as well as the last answer, then the best of them by their true scores are the answer, equal ones
in the order of their tie rank. Compiled where there is a compiler (`settle_native.cpp`); `settle_reference` says the
same, one query at a time.

Legend: B queries of a group, M of them that are asked for now, N items of the index, A added items, D width, F fetched
candidates per query, X excluded rows of all queries together.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.index.attributes import in_bitmap
from retrieval.index.codes import library
from retrieval.native import address
from retrieval.types import Answers

__all__ = ["Excluded", "Fetched", "Goal", "Table", "settle", "settle_reference"]

ROUNDING: Final = 1e-6
"""Scores closer than this times the query's norm may be equal but for rounding (vectors have unit length)."""
_TABLE: Final = struct.Struct("@2q3P")
_ROUND: Final = struct.Struct("@2q7P 2q2P 2q2P q3P")
"""`Table` and `Round` of the C++ source; packed, since filling a structure of ctypes takes longer."""
_NOTHING: Final = (0, 1, 0, 0)


@dataclass(frozen=True, slots=True)
class Excluded:
    """Rows that queries must not get: those of query b are `rows[starts[b]:starts[b + 1]]`, int64 `[X]`, `[B + 1]`."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, excluded: Sequence[NDArray[np.int64]] | None) -> "Excluded | None":
        """None where nothing is excluded."""
        if excluded is None or not any(map(len, excluded)):
            return None
        starts = np.cumsum([0, *map(len, excluded)])
        return cls(np.concatenate(excluded).astype(np.int64, copy=False), starts)

    def of_query(self, b: int) -> NDArray[np.int64]:
        """What one query excludes."""
        return self.rows[self.starts[b] : self.starts[b + 1]]

    def count(self, bitmap: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.int64]:
        """How many of the rows `begin:end` that are in a bitmap of these each query excludes, int64 `[B]`."""
        inside = (self.rows >= begin) & (self.rows < end)
        inside &= in_bitmap(bitmap, np.where(inside, self.rows - begin, 0)) if end > begin else False
        counted = np.concatenate([np.zeros(1, np.int64), np.cumsum(inside)])
        return np.asarray(np.diff(counted[self.starts]))


@dataclass(slots=True)
class Fetched:
    """Candidates of the index, or of the added items: rows and scores `[M, F]`, best first, −1 past the last.

    Attributes:
        rows: int64, counted from the first of these items.
        scores: float32.
        complete: whether nothing else could be fetched.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    complete: bool

    def packed(self) -> tuple[int, int, int, int]:
        """`Fetched` of the C++ source."""
        return self.rows.shape[1], self.complete, address(self.rows), address(self.scores)


@dataclass(slots=True)
class Goal:
    """What a group of queries wants.

    Attributes:
        queries: float32 `[B, D]`, contiguous.
        wanted: how many answers each gets, int64 `[B]`.
        from_index: how many answers the index must be able to give each, int64 `[B]`.
        excluded: what they must not get.
        allowed: bitmap of the index's items that they may get.
    """

    queries: NDArray[np.float32]
    wanted: NDArray[np.int64]
    from_index: NDArray[np.int64]
    excluded: Excluded | None
    allowed: NDArray[np.uint8]


class Table:
    """The items, whose scores are settled by their vectors.

    Args:
        vectors: of the index, `[N, D]`, possibly memory-mapped.
        added: of the added items, float32 `[A, D]`.
        tie_rank: order among equal scores, int64 `[N + A]`.
    """

    def __init__(self, vectors: NDArray, added: NDArray[np.float32], tie_rank: NDArray[np.int64]) -> None:
        self.vectors = vectors
        self.added, self.tie_rank = np.ascontiguousarray(added, np.float32), np.ascontiguousarray(tie_rank, np.int64)
        plain = vectors.dtype == np.float32 and vectors.flags.c_contiguous
        self.native = library() if plain else None
        held = (vectors, self.added, self.tie_rank)
        self.packed = _TABLE.pack(*vectors.shape, *(array.ctypes.data for array in held))

    def scores(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products with a query `[D]`, float32 in the shape of `rows` `[F]`."""
        count = len(self.vectors)
        gathered = np.empty((len(rows), len(query)), np.float32)
        indexed = rows < count
        gathered[indexed], gathered[~indexed] = self.vectors[rows[indexed]], self.added[rows[~indexed] - count]
        # Not a matrix product: its rounding would depend on where in the matrix an item stands.
        return np.asarray(np.einsum("fd,d->f", gathered, query))


def settle(
    table: Table,
    goal: Goal,
    members: NDArray[np.int64],
    index: Fetched | None,
    added: Fetched | None,
    check_index: bool,
    are_true: bool,
    answers: Answers,
) -> NDArray[np.bool_]:
    """Write down the answers that are determined; which of the members have one: bool `[M]`.

    Args:
        table: the items.
        goal: what the group of queries wants.
        members: those that were asked for, int64 `[M]`; each wants an answer.
        index: what was fetched of the index for them.
        added: likewise of the added items.
        check_index: whether the index may have given what is not allowed.
        are_true: whether the scores are those of `IndexBackend.true_scores`.
        answers: of the group; written to.
    """
    if table.native is None:
        return settle_reference(table, goal, members, index, added, check_index, are_true, answers)
    settled, excluded = np.empty(len(members), np.bool_), goal.excluded
    asked = _ROUND.pack(
        len(members),
        are_true,
        address(members),
        address(goal.queries),
        address(goal.wanted),
        address(goal.from_index),
        0 if excluded is None else address(excluded.starts),
        0 if excluded is None else address(excluded.rows),
        address(goal.allowed) if check_index else 0,
        *(_NOTHING if index is None else index.packed()),
        *(_NOTHING if added is None else added.packed()),
        answers.rows.shape[1],
        address(answers.rows),
        address(answers.scores),
        address(settled),
    )
    table.native.settle(table.packed, asked)
    return settled


def settle_reference(
    table: Table,
    goal: Goal,
    members: NDArray[np.int64],
    index: Fetched | None,
    added: Fetched | None,
    check_index: bool,
    are_true: bool,
    answers: Answers,
) -> NDArray[np.bool_]:
    """As `settle`."""
    settled = np.zeros(len(members), bool)
    for m, b in enumerate(members.tolist()):
        query, wanted = goal.queries[b], int(goal.wanted[b])
        rows, scores, cut, of_index = np.empty(0, np.int64), np.empty(0, np.float32), -np.inf, 0
        for part, first in ((index, 0), (added, len(table.vectors))):
            if part is None:
                continue
            keep = part.rows[m] >= 0
            if check_index and part is index:
                keep &= in_bitmap(goal.allowed, np.maximum(part.rows[m], 0))
            if goal.excluded is not None:
                keep &= ~np.isin(part.rows[m] + first, goal.excluded.of_query(b))
            if not part.complete and part.rows[m, -1] >= 0:
                cut = max(cut, part.scores[m, -1])
            of_index += int(keep.sum()) if part is index else 0
            rows = np.concatenate([rows, part.rows[m, keep] + first])
            scores = np.concatenate([scores, part.scores[m, keep]])
        if of_index < goal.from_index[b] or len(rows) < wanted:
            continue
        margin = 0 if are_true else ROUNDING * np.linalg.norm(query)
        # What was not fetched must score worse than the last answer.
        if np.isfinite(cut) and not -np.sort(-scores)[wanted - 1] > cut + margin:
            continue
        true = scores if are_true else table.scores(query, rows)
        best = np.lexsort((table.tie_rank[rows], -true))[:wanted]
        answers.rows[b, :wanted], answers.scores[b, :wanted] = rows[best], true[best]
        settled[m] = True
    return settled
