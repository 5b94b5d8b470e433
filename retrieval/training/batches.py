"""Training batches in an order that only the seed and the epoch decide, and how each is cut and thinned."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.sequences import TrainingBatch, gather_training, user_histories
from retrieval.data.splits import Split
from retrieval.data.stochastic_length import keep_tokens, stochastic_length
from retrieval.errors import ConfigError
from retrieval.training.config import TrainConfig
from retrieval.types import JaggedBatch

__all__ = ["Batches", "Fresh", "Objective", "cloze_batch"]

Objective = Literal["next", "cloze"]


class Fresh(Config):
    """What a run goes on from: events before a moment were learned already, and of these only a sample is met again.

    Users with a training event from the moment on are visited in every epoch. As many of the others as `history_share`
    says are drawn anew for each: what an epoch costs follows from what is new, not from how long the log is. Whoever is
    visited is read as far back as the encoder reads, so that old events are targets as well.

    Attributes:
        since: the moment, seconds.
        history_share: users without new events in an epoch, as a share of those with; at least as many as fill up its
            first batch.
    """

    since: int
    history_share: float = Field(default=0.25, ge=0)


class Batches:
    """All batches of a run.

    Args:
        dataset: the events.
        split: which of them train. Users with fewer than two training events are left out.
        config: hyperparameters.
        fresh: which users an epoch visits; None: all.
        objective: "next": each token is followed by its target. "cloze": tokens are masked and to be filled in.
        max_length: most tokens of a history.
        query_actions: whether positions are asked for their target's action.

    Raises:
        ConfigError: `config.action_weights` names what is not a positive action of the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        config: TrainConfig,
        fresh: Fresh | None = None,
        *,
        objective: Objective,
        max_length: int,
        query_actions: bool = False,
    ) -> None:
        self._dataset, self._config, self._objective, self._max_length = dataset, config, objective, max_length
        self._query_actions = query_actions
        self._action_weights = _weights_of(dataset, config.action_weights)
        users = np.flatnonzero(split.train_ends - dataset.offsets[:-1] >= 2)
        # A user's first event is an input and no target, but for a cloze, which reads all of a row and guesses there.
        self._begins = dataset.offsets[:-1] + (objective == "next")
        self._lengths = split.train_ends - self._begins
        self._windows = np.ones(len(self._lengths), np.int64)
        if config.windows == "all":
            self._windows = -(-self._lengths // max_length)
        # User of each row, and which of the user's windows it is, from 0 for the first.
        self._users = np.repeat(users, self._windows[users])
        self._places = np.arange(len(self._users)) - np.searchsorted(self._users, self._users)
        self._rows = np.arange(len(self._users))
        # A window is visited with its user.
        self._last = dataset.events.timestamps[split.train_ends[self._users] - 1]
        self._others, self._drawn = self._rows[:0], 0
        if fresh is not None:
            new = self._last >= fresh.since
            self._rows, self._others = self._rows[new], self._rows[~new]
            wanted = max(math.ceil(fresh.history_share * len(self._rows)), config.batch_size - len(self._rows))
            self._drawn = min(wanted, len(self._others))
        self.per_epoch = math.ceil((len(self._rows) + self._drawn) / config.batch_size)

    def from_step(self, first: int) -> Iterator[tuple[int, TrainingBatch]]:
        """Number and contents of each step from `first` (counted from 0) to the last."""
        size = self._config.batch_size
        for step in range(first, self.per_epoch * self._config.epochs):
            epoch, place = divmod(step, self.per_epoch)
            if step == first or place == 0:
                rng = np.random.default_rng([self._config.seed, epoch])
                order, ends = self._order(rng), self._row_ends(rng)
            # The third number keeps these draws apart from those of the order.
            rng = np.random.default_rng([self._config.seed, step, 1])
            chosen = order[place * size : (place + 1) * size]
            yield step, self._cut(self._users[chosen], ends[chosen], rng)

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Rows of an epoch, in the order in which they are read."""
        drawn = rng.choice(self._others, self._drawn, replace=False)
        order = rng.permutation(np.concatenate([self._rows, drawn]))
        if self._config.visit_order == "random":
            return order
        return order[np.argsort(self._last[order], kind="stable")]

    def _row_ends(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """One past the last event of each row in an epoch, its last target included.

        A history of m inputs has ⌈m / L⌉ windows and with them ⌈m / L⌉·L − m places to spare: by a random share of
        these all cuts between its windows move. A row is read as a request at its end would read the history, L inputs
        back from there.
        """
        lengths = self._lengths[self._users]
        if self._config.windows == "last":
            return self._begins[self._users] + lengths
        spare = self._windows * self._max_length - self._lengths
        shifts = rng.integers(0, np.maximum(spare, 0), endpoint=True)[self._users]
        return self._begins[self._users] + np.minimum((self._places + 1) * self._max_length - shifts, lengths)

    def _cut(self, users: NDArray[np.int64], ends: NDArray[np.int64], rng: np.random.Generator) -> TrainingBatch:
        """Rows of those users up to those ends."""
        events, weights = self._dataset.events, self._action_weights
        starts = self._dataset.offsets[users]
        if self._objective == "cloze":
            times = events.timestamps[ends - 1].astype(np.int64)
            histories = user_histories(self._dataset, users, ends, times, self._max_length)
            mask_item = len(self._dataset.vocabulary)
            batch = cloze_batch(histories, weights, self._config.mask_share, mask_item, rng)
        else:
            side = self._dataset.side(users, ends - 1)
            batch = gather_training(events, starts, ends, weights, self._max_length, side)
        if self._query_actions:
            assert batch.inputs.query_actions is not None
            asked = rng.random(len(batch.targets)) < self._config.query_action_share
            batch.inputs.query_actions[~asked] = 0
        alpha = self._config.stochastic_length
        if alpha is not None:
            inputs = batch.inputs
            kept = stochastic_length(inputs.offsets, inputs.timestamps, self._max_length, alpha, rng)
            batch = keep_tokens(batch, np.union1d(kept, np.flatnonzero(~inputs.main)))
        return batch


def cloze_batch(
    histories: JaggedBatch,
    action_weights: NDArray[np.float32],
    share: float,
    mask_item: int,
    rng: np.random.Generator,
) -> TrainingBatch:
    """Mask tokens that are to be filled in (BERT4Rec, arXiv 1904.06690, section 3.6).

    Each positive event is masked with probability `share`; in a row where that masks none, the last positive one is,
    which is nearest to what serving asks. A masked token has the item `mask_item` and no action (code 0); it is its
    own target.

    Args:
        histories: with the event to predict as their last.
        action_weights: weight of a target by its action code, 0 where that is not positive, float32 `[A]`.
        share: of positive events that are masked.
        mask_item: stands for an item that is to be filled in.
        rng: every random choice.
    """
    weights = action_weights[histories.actions]
    may = weights > 0
    masked = may & (rng.random(len(may)) < share)
    place = np.where(may, np.arange(len(may)), -1)
    for start, end in zip(histories.offsets[:-1], histories.offsets[1:], strict=True):
        if not masked[start:end].any() and may[start:end].any():
            masked[place[start:end].max()] = True
    inputs = replace(
        histories,
        items=np.where(masked, mask_item, histories.items),
        actions=np.where(masked, 0, histories.actions),
    )
    return TrainingBatch(inputs=inputs, targets=histories.items, weights=np.where(masked, weights, np.float32(0)))


def _weights_of(dataset: Dataset, given: Mapping[str, float]) -> NDArray[np.float32]:
    """Weight of each action code as a target, float32 `[A]`: 1, or as given; 0 where it is not positive."""
    positive = [action.value for action in dataset.info.actions if action.positive]
    for name in given:
        if name not in positive:
            raise ConfigError(f"action_weights: {name!r} is not a positive action of {dataset.path}; it has {positive}")
    weights = [given.get(action.value, 1.0) if action.positive else 0.0 for action in dataset.info.actions]
    return np.array(weights, np.float32)
