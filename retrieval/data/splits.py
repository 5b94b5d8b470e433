"""Which events train and which are asked for, by protocol.

leave-one-out: a user's last positive event is the target; what came before it trains. Everybody's training events
    reach as far as their own target, so the model knows other users' future: good for comparing encoders.
global-time: events before one moment train; a user's first positive event after it is the target. This is what a
    model trained tonight meets tomorrow; items first seen after the moment count as misses.
all: every event trains and nothing is asked for.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.errors import DataError

__all__ = ["Protocol", "Split", "SplitInfo", "split_dataset"]

Protocol = Literal["leave-one-out", "global-time", "all"]

# At global time, the share of events that train when no moment is given.
_TRAIN_SHARE = 0.9
_QUANTILE_SAMPLE = 4_000_000


class SplitInfo(Config):
    """What names a split: together with the dataset's fingerprint it determines every training event and target.

    Attributes:
        protocol: see the module.
        time: at global time, the moment in seconds; None otherwise.
    """

    protocol: Protocol
    time: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A dataset split by a protocol.

    Attributes:
        info: names the split.
        train_ends: user u trains on events `dataset.offsets[u]:train_ends[u]`, int64 `[U]`.
        users: users that are asked about, int64 `[Q]`.
        targets: index of the event to find for each of them, int64 `[Q]`; all of the user's events before it are
            the history of the query, and its time is the time of the request.
    """

    info: SplitInfo
    train_ends: NDArray[np.int64]
    users: NDArray[np.int64]
    targets: NDArray[np.int64]


def split_dataset(dataset: Dataset, info: SplitInfo) -> Split:
    """Apply a protocol; at global time without a moment, choose the one by which 90% of the events have happened.

    Raises:
        DataError: nothing is left to train on or to ask for.
    """
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    every = np.arange(len(dataset))
    if info.protocol == "all":
        nobody = np.empty(0, np.int64)
        return Split(info=info, train_ends=ends, users=nobody, targets=nobody)
    positive = dataset.positive[dataset.events.actions]
    if info.protocol == "leave-one-out":
        targets = _last_true(positive, starts)
        train_ends = np.where(targets >= 0, targets, ends)
    else:
        moment = info.time if info.time is not None else _moment(dataset)
        info = SplitInfo(protocol=info.protocol, time=moment)
        later = dataset.events.timestamps >= moment
        train_ends = ends - np.add.reduceat(later, starts, dtype=np.int64)
        targets = _first_true(positive & later, starts)
    asked = (targets >= 0) & (targets > starts)
    if not asked.any():
        raise DataError(f"{dataset.path}: the {info.protocol} split leaves no user with a history and a target")
    if not (train_ends - starts >= 2).any():
        raise DataError(f"{dataset.path}: the {info.protocol} split leaves no user with two events to train on")
    return Split(info=info, train_ends=train_ends, users=every[asked], targets=targets[asked])


def _moment(dataset: Dataset) -> int:
    stamps = dataset.events.timestamps
    sample = stamps[:: max(1, len(stamps) // _QUANTILE_SAMPLE)]
    return int(np.quantile(sample, _TRAIN_SHARE, method="lower"))


def _last_true(flags: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the last true flag of each segment, −1 where there is none. Segments are not empty."""
    return np.maximum.reduceat(np.where(flags, np.arange(len(flags)), -1), starts)


def _first_true(flags: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the first true flag of each segment, −1 where there is none. Segments are not empty."""
    index = np.minimum.reduceat(np.where(flags, np.arange(len(flags)), len(flags)), starts)
    return np.where(index < len(flags), index, -1)
