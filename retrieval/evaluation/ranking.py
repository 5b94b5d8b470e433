"""Ranks of held-out items among the whole catalogue: nothing is sampled.

A user's history is hidden from the candidates (all of it, as `exclude_seen` does in the service, or under the protocol
`paper` what the encoder reads of it); the target itself never is. Equal scores count against the target (pessimistic),
so a constant scorer ranks it last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.sequences import user_histories
from retrieval.data.splits import Queries
from retrieval.index.searcher import Searcher
from retrieval.types import JaggedBatch

__all__ = ["QueryBatch", "query_batches", "rank_by_scores", "rank_by_search"]

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryBatch:
    """Some of a split's queries.

    Attributes:
        place: which of the queries these are.
        targets: row of the item to find, int64 `[B]`.
        seen: rows to hide from each query, never the target.
        histories: encoder input.
    """

    place: slice
    targets: NDArray[np.int64]
    seen: list[NDArray[np.int64]]
    histories: JaggedBatch


def query_batches(dataset: Dataset, queries: Queries, max_length: int, size: int = 256) -> Iterator[QueryBatch]:
    """All queries, `size` at a time. The time of the target is the time of the request."""
    events = dataset.events
    for start in range(0, len(queries), size):
        place = slice(start, min(start + size, len(queries)))
        events_at = queries.targets[place]
        begins = dataset.offsets[queries.users[place]]
        targets = events.items[events_at].astype(np.int64)
        times = events.timestamps[events_at].astype(np.int64)
        histories = user_histories(dataset, queries.users[place], events_at, times, max_length)
        hidden = events_at - histories.main_lengths if queries.hide_read_only else begins
        seen = [
            np.setdiff1d(events.items[begin:end], [target]).astype(np.int64)
            for begin, end, target in zip(hidden, events_at, targets, strict=True)
        ]
        yield QueryBatch(place=place, targets=targets, seen=seen, histories=histories)


def rank_by_scores(
    batch: QueryBatch, num_items: int, score: Callable[[slice], NDArray[np.float32]]
) -> NDArray[np.int64]:
    """Exact rank of each target.

    Args:
        batch: the queries.
        num_items: N.
        score: scores of all items for a range of the batch's queries, float32 `[b, N]`; they are overwritten.
    """
    ranks = np.empty(len(batch.targets), np.int64)
    step = max(1, _SCORES_AT_ONCE // num_items)
    for start in range(0, len(ranks), step):
        part = slice(start, min(start + step, len(ranks)))
        scores = score(part)
        wanted = np.take_along_axis(scores, batch.targets[part, None], axis=1)
        for row, seen in enumerate(batch.seen[part]):
            scores[row, seen] = -np.inf
        # The target equals itself, so counting what is at least as good starts at 1.
        ranks[part] = (scores >= wanted).sum(axis=1)
    return ranks


def rank_by_search(
    batch: QueryBatch, queries: NDArray[np.float32], searcher: Searcher, depth: int
) -> NDArray[np.int64]:
    """Rank of each target among the `depth` answers of an index; N + 1 where it is not among them."""
    result = searcher.search(queries, [depth] * len(queries), batch.seen)
    hits = result.rows == batch.targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, len(searcher) + 1)
