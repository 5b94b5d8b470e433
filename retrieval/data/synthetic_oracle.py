"""The best possible answer in a synthetic world: the true distribution of each user's last positive event.

A recommender is asked for the item of a user's last positive event and may use everything before it. Nothing can
rank better, in expectation, than by the distribution q of `retrieval.data.synthetic_users` given the whole
latent state: the last positive item, the kind and day of the event, the user's interests on that day, and the
items seen so far. Its expected recall@K is the mass of the K likeliest items, meaned over users.

This is exact, not estimated. Which event is a user's last positive one is settled by the kinds of events, which
are drawn before any item is chosen; picking that event therefore says nothing about its item. Later events (all
skips) depend on the item, but nobody sees them when the question is asked.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.data.synthetic_catalogue import (
    EXPLORE,
    INTEREST,
    INTEREST_SLOTS,
    MIXTURE_SLOTS,
    SEQUEL,
    SEQUEL_SLOTS,
    SKIP,
    STAY,
    TREND_SLOTS,
    Catalogue,
)
from retrieval.data.synthetic_users import Block

__all__ = ["CUTOFFS", "OracleRows", "ask_oracle", "distribution", "slate_shares"]

CUTOFFS = (10, 50, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRows:
    """What the oracle knows about some users' last positive events.

    Attributes:
        events: position of the event in the block, int64 `[U]`.
        possible: true probability that the item is among the K likeliest, float64 `[U, len(CUTOFFS)]`.
        rank: place of the actual item in the true order, from 1, ties by item number, int64 `[U]`.
    """

    events: NDArray[np.int64]
    possible: NDArray[np.float64]
    rank: NDArray[np.int64]


def ask_oracle(catalogue: Catalogue, block: Block, users: NDArray[np.int64]) -> OracleRows:
    """Work out the oracle's answers for `users`, given as positions within the block, one after the other."""
    number = np.where(block.kinds == SKIP, -1, np.arange(len(block.kinds)))
    events = np.maximum.reduceat(number, block.offsets[:-1])
    number[events] = -1
    before = np.maximum.reduceat(number, block.offsets[:-1])[users]
    events = events[users]
    possible = np.empty((len(users), len(CUTOFFS)))
    rank = np.empty(len(users), np.int64)
    days = block.days[events]
    for day in np.unique(days).tolist():
        share = slate_shares(catalogue, day)
        for row in np.flatnonzero(days == day).tolist():
            event = int(events[row])
            q_N = distribution(catalogue, block, share, int(users[row]), event, int(before[row]))
            possible[row], rank[row] = _read_off(q_N, int(block.items[event]))
    return OracleRows(events=events, possible=possible, rank=rank)


def slate_shares(catalogue: Catalogue, day: int) -> NDArray[np.float64]:
    """Probability of each item among its category's, `[N]`: slate(x | c_x, day)."""
    slate = catalogue.slate[day]
    return np.bincount(slate.ravel(), minlength=len(catalogue.category)) / slate.shape[1]


def distribution(
    catalogue: Catalogue, block: Block, share_N: NDArray[np.float64], user: int, event: int, before: int
) -> NDArray[np.float64]:
    """Weights q of all items for one event given everything before it; to be divided by their sum. `[N]`.

    Args:
        catalogue: of the world.
        block: the user's log is in it.
        share_N: `slate_shares` of the event's day.
        user: position within the block.
        event: position of the event.
        before: position of the user's last positive event before it, −1 if there is none.
    """
    day, kind = int(block.days[event]), block.kinds[event]
    n_categories = catalogue.slate.shape[1]
    mix = np.bincount(catalogue.mixtures[kind], minlength=4) / MIXTURE_SLOTS
    wishes = block.interests[user, day // block.epoch_days]
    weight_C = mix[EXPLORE] / TREND_SLOTS * np.bincount(catalogue.trend[day], minlength=n_categories)
    weight_C += mix[INTEREST] / INTEREST_SLOTS * np.bincount(wishes, minlength=n_categories)
    if before >= 0:  # otherwise it is the log's first event, which neither stays nor follows
        weight_C[catalogue.category[block.items[before]]] += mix[STAY]
    q_N = weight_C[catalogue.category] * share_N
    if before >= 0:
        sequels = catalogue.sequels[block.items[before]]
        np.add.at(q_N, sequels[catalogue.alive[day, sequels]], mix[SEQUEL] / SEQUEL_SLOTS)
    q_N[block.items[block.offsets[user] : event]] = 0
    return q_N


def _read_off(q_N: NDArray[np.float64], item: int) -> tuple[NDArray[np.float64], int]:
    """Mass of the likeliest items `[len(CUTOFFS)]` and the rank of the actual item in one distribution."""
    own = q_N[item]
    assert own > 0, "an item was drawn that the process cannot draw"
    possible_items = np.flatnonzero(q_N > 0)  # a fraction of the catalogue
    q = q_N[possible_items]
    # Ties go by item number, which does not depend on the outcome, so that the rank stays a fair draw.
    ahead = (q > own) | ((q == own) & (possible_items < item))
    most = min(max(CUTOFFS), len(q))
    mass = np.sort(np.partition(q, len(q) - most)[len(q) - most :])[::-1].cumsum() / q.sum()
    return mass[np.minimum(CUTOFFS, most) - 1], 1 + int(ahead.sum())
