"""Histories → jagged batches: the one way by which training, evaluation and the server make encoder input."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.types import EventColumns, JaggedBatch

__all__ = ["TrainingBatch", "gather_histories", "gather_training"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBatch:
    """Histories with, after each token, the item that came next.

    Attributes:
        inputs: the histories; the query time of each token is the time of its target.
        targets: vocabulary rows, int64 `[T]`.
        weights: of each target in the loss, float32 `[T]`; 0 where it is not a positive engagement: it is read as the
            next token's input, but not predicted.
    """

    inputs: JaggedBatch
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


def _window_index(
    starts: NDArray[np.int64], ends: NDArray[np.int64], max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets `[B + 1]` and event indices `[T]` of the last `max_length` events before each end."""
    starts = np.maximum(starts, ends - max_length)
    lengths = ends - starts
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return offsets, index


def gather_histories(
    events: EventColumns,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    request_times: NDArray[np.int64],
    max_length: int,
) -> JaggedBatch:
    """Cut B histories out of events laid end to end.

    Args:
        events: of any number of users.
        starts: first event of each history, int64 `[B]`.
        ends: one past the last event of each history, int64 `[B]`.
        request_times: time of each request in seconds, int64 `[B]`. One before the history's last event counts as
            that event's time: training never sees a request from the past.
        max_length: only the last so many events are read.
    """
    offsets, index = _window_index(starts, ends, max_length)
    timestamps = events.timestamps[index].astype(np.int64)
    query_times = np.empty_like(timestamps)
    query_times[:-1] = timestamps[1:]
    filled = np.diff(offsets) > 0
    last = offsets[1:][filled] - 1
    query_times[last] = np.maximum(request_times[filled], timestamps[last])
    return JaggedBatch(
        offsets=offsets,
        items=events.items[index].astype(np.int64),
        actions=events.actions[index].astype(np.int64),
        timestamps=timestamps,
        query_times=query_times,
    )


def gather_training(
    events: EventColumns,
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    action_weights: NDArray[np.float32],
    max_length: int,
) -> TrainingBatch:
    """Cut B training sequences of at least two events: each but the last is input, each but the first a target.

    Args:
        events: of any number of users.
        starts: first event of each sequence, int64 `[B]`.
        ends: one past the last event of each sequence, int64 `[B]`.
        action_weights: weight of a target by its action code, 0 where that is not positive, float32 `[A]`.
        max_length: only the last so many inputs are read.
    """
    inputs = gather_histories(events, starts, ends - 1, events.timestamps[ends - 1].astype(np.int64), max_length)
    _, index = _window_index(starts, ends - 1, max_length)
    return TrainingBatch(
        inputs=inputs,
        targets=events.items[index + 1].astype(np.int64),
        weights=action_weights[events.actions[index + 1]],
    )
