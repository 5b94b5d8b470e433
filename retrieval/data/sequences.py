"""Histories → jagged batches: the one way by which training, evaluation and the server make encoder input.

A row is one sequence of tokens (kind, id, action, timestamp), the unified sequence of arXiv 2402.17152, section 2.1:

    the user's context, a token per kind | the main series and the auxiliary ones, merged by time

Of an auxiliary series only the first event of each run of equal values is a token. At equal times the main series comes
first, then the others by kind, each in its own order: what is recorded with an engagement is not known before it. Of
`max_length` tokens one per kind is set aside, and the latest of the merged sequence take the rest; of what they cut off
the last value of each auxiliary series stays, in the place set aside: a slow attribute is not forgotten.

Legend: B rows, T tokens, C context kinds, K kinds beside the main series.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.types import EventColumns, JaggedBatch, SideRows

__all__ = ["TrainingBatch", "gather_histories", "gather_training", "user_histories"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Histories with, after each token, the item that came next.

    Attributes:
        inputs: the histories; the query time and action of each token are those of its target.
        targets: vocabulary rows, int64 `[T]`; without meaning where the weight is 0.
        weights: of each target in the loss, float32 `[T]`; 0 where what comes next is not a positive engagement: it is
            read as the next token's input, but not predicted.
    """

    inputs: JaggedBatch
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Rows of tokens before anything is asked of them; fields as in `JaggedBatch`."""

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    actions: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    kinds: NDArray[np.int64] | None = None


def gather_histories(
    events: EventColumns,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    request_times: NDArray[np.int64],
    max_length: int,
    side: SideRows | None = None,
    request_actions: NDArray[np.int64] | int = 0,
) -> JaggedBatch:
    """Cut B histories out of events laid end to end.

    Args:
        events: of any number of users.
        starts: first event of each history, int64 `[B]`.
        ends: one past the last event of each history, int64 `[B]`.
        request_times: time of each request in seconds, int64 `[B]`. One before the history's last token counts as
            that token's time: training never sees a request from the past.
        max_length: only the last so many tokens are read; more than there are kinds.
        side: context and auxiliary events of the same rows; None reads the main series alone.
        request_actions: code of the action for which each request asks, int64 `[B]` or one for all; 0 for any.
    """
    tokens = _rows_of_tokens(events, starts, ends, request_times, max_length, side)
    times = _next_in_row(tokens.offsets, tokens.timestamps, request_times)
    return JaggedBatch(
        offsets=tokens.offsets,
        items=tokens.items,
        actions=tokens.actions,
        timestamps=tokens.timestamps,
        query_times=np.maximum(times, tokens.timestamps),
        query_actions=_next_in_row(tokens.offsets, tokens.actions, request_actions),
        kinds=tokens.kinds,
    )


def user_histories(
    dataset: Dataset,
    users: NDArray[np.int64],
    ends: NDArray[np.int64],
    request_times: NDArray[np.int64],
    max_length: int,
) -> JaggedBatch:
    """Histories of a dataset's users up to, without it, some event of each; arguments as `gather_histories`'."""
    side = dataset.side(users, ends)
    return gather_histories(dataset.events, dataset.offsets[users], ends, request_times, max_length, side)


def gather_training(
    events: EventColumns,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    action_weights: NDArray[np.float32],
    max_length: int,
    side: SideRows | None = None,
) -> TrainingBatch:
    """Cut B training sequences: each event but the last is input; each but the first, or with context each, a target.

    A token's target is the token right after it, if that is a positive event of the main series: every such event is
    asked for once. Where a window cuts events off, its first one is not asked for: before it stands what a server never
    asks, context without the history that there was.

    Args:
        events: of any number of users.
        starts: first event of each sequence, int64 `[B]`.
        ends: one past the last event of each sequence, int64 `[B]`, at least one event after `starts`.
        action_weights: weight of a target by its action code, 0 where that is not positive, float32 `[A]`.
        max_length: only the last so many inputs are read.
        side: context and auxiliary events, of these only what precedes each sequence's last event.
    """
    last = ends - 1
    times, actions = events.timestamps[last].astype(np.int64), events.actions[last].astype(np.int64)
    inputs = gather_histories(events, starts, last, times, max_length, side, actions)
    assert inputs.query_actions is not None
    weights = action_weights[inputs.query_actions]
    if inputs.kinds is not None:
        weights = np.where(_next_in_row(inputs.offsets, inputs.kinds, 0) == 0, weights, np.float32(0))
        lengths = inputs.main_lengths
        begins = inputs.offsets[:-1][(lengths < last - starts) & (lengths > 0)]
        places = np.flatnonzero(inputs.main)
        first = places[np.searchsorted(places, begins)]
        weights[first[first > begins] - 1] = 0
    targets = _next_in_row(inputs.offsets, inputs.items, events.items[last].astype(np.int64))
    return TrainingBatch(inputs=inputs, targets=targets, weights=weights)


def _next_in_row(
    offsets: NDArray[np.int64], field: NDArray[np.int64], at_end: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """The field of the next token in each row, `[T]`; of a row's last token, `at_end`, a number or int64 `[B]`."""
    following = np.empty_like(field)
    following[:-1] = field[1:]
    filled = np.diff(offsets) > 0
    following[offsets[1:][filled] - 1] = np.broadcast_to(at_end, len(filled))[filled]
    return following


def _window_index(
    starts: NDArray[np.int64], ends: NDArray[np.int64], max_length: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets `[B + 1]` and event indices `[T]` of all or the last `max_length` events before each end."""
    if max_length is not None:
        starts = np.maximum(starts, ends - max_length)
    lengths = ends - starts
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return offsets, index


def _rows_of_tokens(
    events: EventColumns,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    request_times: NDArray[np.int64],
    max_length: int,
    side: SideRows | None,
) -> _Tokens:
    offsets, index = _window_index(starts, ends, max_length if side is None else max_length - side.num_kinds)
    items, actions, timestamps = (
        field[index].astype(np.int64) for field in (events.items, events.actions, events.timestamps)
    )
    if side is None:
        return _Tokens(offsets=offsets, items=items, actions=actions, timestamps=timestamps)
    auxiliary, of_auxiliary = _runs(side)
    batch, width = side.context.shape
    context, none = np.zeros(batch * width, np.int64), np.zeros(len(auxiliary), np.int64)
    rows = np.concatenate([np.repeat(np.arange(batch), width), _row_of(offsets), of_auxiliary])
    kinds = np.concatenate(
        [np.tile(np.arange(1, width + 1), batch), np.zeros(len(index), np.int64), _of(side.kinds, auxiliary)]
    )
    items = np.concatenate([side.context.ravel(), items, _of(side.values, auxiliary)])
    actions = np.concatenate([context, actions, none])
    timestamps = np.concatenate([context, timestamps, _of(side.timestamps, auxiliary)])
    in_front = (kinds > 0) & (kinds <= width)
    # Stable: what these keys leave equal stays as it was.
    order = np.lexsort((kinds, timestamps, ~in_front, rows))
    order = order[_stays(rows[order], kinds[order], width, max_length - side.num_kinds)]
    rows, kinds, items, actions, timestamps = (one[order] for one in (rows, kinds, items, actions, timestamps))
    offsets = np.searchsorted(rows, np.arange(batch + 1))
    if width:
        # Context has no time of its own: it takes that of the first event, or of the request where there is none.
        times = np.append(timestamps, 0)[np.minimum(offsets[:-1] + width, len(timestamps))]
        times = np.where(np.diff(offsets) > width, times, request_times)
        timestamps[in_front[order]] = np.repeat(times, width)
    return _Tokens(offsets=offsets, items=items, actions=actions, timestamps=timestamps, kinds=kinds)


def _runs(side: SideRows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first auxiliary event of each run of equal values of one row and kind, and its row: int64 `[M']` each."""
    offsets, index = _window_index(side.starts, side.ends)
    rows, kinds, values = _row_of(offsets), side.kinds[index], side.values[index]
    order = np.lexsort((kinds, rows))
    begins = np.ones(len(order), bool)
    keys = [key[order] for key in (rows, kinds, values)]
    begins[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return index[order[begins]], rows[order[begins]]


def _stays(rows: NDArray[np.int64], kinds: NDArray[np.int64], width: int, window: int) -> NDArray[np.bool_]:
    """Which tokens of whole sequences are read: bool `[T]`. See the module."""
    ends = np.searchsorted(rows, rows, side="right")
    stays = (ends - np.arange(len(rows)) <= window) | ((kinds > 0) & (kinds <= width))
    (cut,) = np.nonzero(~stays & (kinds > width))
    # The last one of each row and kind: with the order reversed, the first.
    _, latest = np.unique((rows[cut] * (kinds.max(initial=0) + 1) + kinds[cut])[::-1], return_index=True)
    stays[cut[::-1][latest]] = True
    return stays


def _row_of(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _of(field: NDArray[np.integer], index: NDArray[np.int64]) -> NDArray[np.int64]:
    return field[index].astype(np.int64)
