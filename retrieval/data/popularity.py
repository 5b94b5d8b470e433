"""How popular each item is now: recent events count more, by how much is measured."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.splits import Split, training_events

__all__ = ["RecentPopularity", "log_popularity", "recent_popularity"]

HALF_LIVES = (0.25, 1.0, 6.0, 24.0, 168.0, 720.0, np.inf)
"""Hours, from news to films."""

_HELD_OUT = 0.05
# Events that an item is taken to have had beside those seen; of what decays fast the counts are small.
_FLOOR = 0.1
_DEPTH = 100
_EVENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class RecentPopularity:
    """Positive events of each item, each halved as often as the half-life went by since.

    Attributes:
        half_life: hours; infinite where plain counts predict best.
        counts: float32 `[N]`, at the time of the last event.
    """

    half_life: float
    counts: NDArray[np.float32]


def recent_popularity(dataset: Dataset, split: Split | None = None) -> RecentPopularity:
    """Popularity with the half-life that predicts best on this dataset, or on a split's training events.

    The last twentieth of the events is held out, and every half-life of `HALF_LIVES` judged by how many of these are of
    the 100 (of a small catalogue, the tenth) most popular items by the events before. Of equally good ones the longest
    is taken.
    """
    counted = dataset.positive[dataset.events.actions]
    if split is not None:
        counted &= training_events(dataset, split)
    times = dataset.events.timestamps if split is None else dataset.events.timestamps[counted]
    # A sample of times says well enough where the last twentieth begins.
    sample = times[:: max(1, len(times) // 1_000_000)]
    moment, end = int(np.quantile(sample, 1 - _HELD_OUT, method="lower")), int(times.max())
    held_out = _counts(dataset, counted, moment, end, np.inf)
    depth = max(1, min(_DEPTH, len(held_out) // 10))

    def found(half_life: float) -> float:
        counts = _counts(dataset, counted, int(times.min()) - 1, moment, half_life)
        return float(held_out[np.argsort(-counts, kind="stable")[:depth]].sum())

    best = max(reversed(HALF_LIVES), key=found)
    counts = _counts(dataset, counted, int(times.min()) - 1, end, best)
    return RecentPopularity(best, counts.astype(np.float32))


def log_popularity(dataset: Dataset, split: Split) -> NDArray[np.float32]:
    """Log of each item's share of a split's training events, as `recent_popularity` counts them, float32 `[N]`.

    An item without events has the log of a tenth of one, not −∞.
    """
    counts = recent_popularity(dataset, split).counts.astype(np.float64) + _FLOOR
    return np.log(counts / counts.sum()).astype(np.float32)


def _counts(
    dataset: Dataset, counted: NDArray[np.bool_], after: int, until: int, half_life: float
) -> NDArray[np.float64]:
    """Decayed events of each item, of those that are counted, with `after` < time ≤ `until`, float64 `[N]`."""
    events, counts = dataset.events, np.zeros(len(dataset.vocabulary))
    for start in range(0, len(events.items), _EVENTS_AT_ONCE):
        part = slice(start, start + _EVENTS_AT_ONCE)
        times = events.timestamps[part].astype(np.int64)
        weights = np.exp2((np.minimum(times, until) - until) / (3600 * half_life))
        weights *= (times > after) & (times <= until) & counted[part]
        counts += np.bincount(events.items[part], weights, minlength=len(counts))
    return counts
