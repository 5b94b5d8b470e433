"""Which events train and which are asked for, by protocol.

paper: a user's last positive event is the test target, and everything before it trains, as in the public tables of
    arXiv 2402.17152. Hidden from the candidates is what the encoder reads of the user's history, not all of it.
    Nothing is left to choose a checkpoint on.
stable: a user's last positive event is the test target and the positive one before it the validation target; what came
    before that trains. The user's whole history is hidden. Checkpoints may be chosen on the validation targets.
global-time: events before one moment train; a user's first positive event after it is the target. This is what a
    model trained tonight meets tomorrow; items first seen after the moment count as misses. Hides like `stable`.
all: every event trains and nothing is asked for.

`paper` and `stable` leave one out: everybody's training events reach as far as their own target, so the model knows
other users' future, which is good for comparing encoders only. Their targets differ wherever a user's last events share
a time, by the order that ingest gave to equal times: figures are comparable under one protocol and one tie order alone.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.errors import DataError

__all__ = ["Protocol", "Queries", "Split", "SplitInfo", "split_dataset", "training_counts", "training_events"]

Protocol = Literal["paper", "stable", "global-time", "all"]

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
class Queries:
    """What users are asked for.

    Attributes:
        users: who is asked, int64 `[Q]`.
        targets: index of the event to find for each of them, int64 `[Q]`; all of the user's events before it are
            the history of the query, and its time is the time of the request.
        hide_read_only: whether only what the encoder reads of a history is hidden from the candidates; else all of it.
    """

    users: NDArray[np.int64]
    targets: NDArray[np.int64]
    hide_read_only: bool = False

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A dataset split by a protocol.

    Attributes:
        info: names the split.
        train_ends: user u trains on events `dataset.offsets[u]:train_ends[u]`, int64 `[U]`.
        test: what results are reported on.
        validation: what a checkpoint may be chosen on; no queries under protocols without it.
    """

    info: SplitInfo
    train_ends: NDArray[np.int64]
    test: Queries
    validation: Queries


def split_dataset(dataset: Dataset, info: SplitInfo) -> Split:
    """Apply a protocol; at global time without a moment, choose the one by which 90% of the events have happened.

    Raises:
        DataError: nothing is left to train on or to ask for.
    """
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    positive = dataset.positive[dataset.events.actions]
    nothing = np.full(len(dataset), -1, np.int64)
    targets = validation = nothing
    if info.protocol == "all":
        train_ends = ends
    elif info.protocol == "global-time":
        moment = info.time if info.time is not None else _moment(dataset)
        info = SplitInfo(protocol=info.protocol, time=moment)
        later = dataset.events.timestamps >= moment
        train_ends = ends - np.add.reduceat(later, starts, dtype=np.int64)
        targets = _first_true(positive & later, starts)
    else:
        targets = _last_true(positive, starts)
        if info.protocol == "stable":
            positive[targets[targets >= 0]] = False
            validation = _last_true(positive, starts)
        held_out = np.where(validation >= 0, validation, targets)
        train_ends = np.where(held_out >= 0, held_out, ends)
    split = Split(
        info=info,
        train_ends=train_ends,
        test=_queries(targets, starts, info.protocol),
        validation=_queries(validation, starts, info.protocol),
    )
    if info.protocol != "all":
        if not len(split.test):
            raise DataError(f"{dataset.path}: the {info.protocol} split leaves no user with a history and a target")
        if not (train_ends - starts >= 2).any():
            raise DataError(f"{dataset.path}: the {info.protocol} split leaves no user with two events to train on")
    return split


def training_events(dataset: Dataset, split: Split) -> NDArray[np.bool_]:
    """Which events train, bool `[T]`."""
    # +1 where a user's training events begin and −1 where they end: the running sum tells which events train.
    steps = np.zeros(len(dataset.events.items) + 1, np.int8)
    np.add.at(steps, dataset.offsets[:-1], 1)
    np.add.at(steps, split.train_ends, -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def training_counts(dataset: Dataset, split: Split) -> NDArray[np.int64]:
    """Number of training events of each item, int64 `[N]`."""
    return np.bincount(dataset.events.items[training_events(dataset, split)], minlength=len(dataset.vocabulary))


def _queries(targets: NDArray[np.int64], starts: NDArray[np.int64], protocol: Protocol) -> Queries:
    """Ask everybody who has a target (not −1) and a history before it."""
    users = np.flatnonzero((targets >= 0) & (targets > starts))
    return Queries(users=users, targets=targets[users], hide_read_only=protocol == "paper")


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
