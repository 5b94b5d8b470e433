"""The known process behind the synthetic world: which item each user takes at each event, and why.

What is fixed before any item is chosen, so that it tells nothing about the choices: users' interests, the times of
all events, where sessions start, and which events are positive. Given these, an event of user u on day d, whose
last positive event was item j of category c_j, takes item x with probability proportional to

    q(x) = a · sequel(x | j) + (b · [c_x = c_j] + i · interest_u(c_x | d) + e · trend(c_x | d)) · slate(x | c_x, d)

over the items that live on day d and that the user has not seen. The shares (a, b, i, e) depend on the kind of
event only (`retrieval.data.synthetic_catalogue.mixtures`). A skip does not move j: whoever predicts must learn to
look past it.

Legend: U users of a block, E events of a block, Q epochs of interest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.data.synthetic_catalogue import (
    CONTINUE,
    DAY,
    FIRST,
    INTEREST,
    INTEREST_BITS,
    INTEREST_SLOTS,
    MIXTURE_BITS,
    MIXTURE_SLOTS,
    RETURN,
    SEQUEL,
    SEQUEL_BITS,
    SEQUEL_SLOTS,
    SKIP,
    START,
    STAY,
    TREND_BITS,
    TREND_SLOTS,
    Catalogue,
    WorldConfig,
)

__all__ = ["ACTIONS", "Block", "simulate_block"]

ACTIONS = ("skip", "view", "like", "purchase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Logs of consecutive users, laid end to end, oldest event first.

    Attributes:
        first_user: number of the block's first user.
        epoch_days: days of an epoch of interests.
        offsets: user u's events are `offsets[u]:offsets[u + 1]`, int64 `[U + 1]`.
        interests: slot table of categories by user and epoch, int64 `[U, Q, 16]`.
        kinds: kind of each event, uint8 `[E]`.
        days: day of each event, int64 `[E]`.
        timestamps: seconds since 1970, int64 `[E]`, rising within a user.
        items: int32 `[E]`.
        actions: positions in `ACTIONS`, uint8 `[E]`.
    """

    first_user: int
    epoch_days: int
    offsets: NDArray[np.int64]
    interests: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    days: NDArray[np.int64]
    timestamps: NDArray[np.int64]
    items: NDArray[np.int32]
    actions: NDArray[np.uint8]


def simulate_block(config: WorldConfig, catalogue: Catalogue, block: int) -> Block:
    """Simulate block number `block`; it depends on the configuration only, not on other blocks."""
    rng = config.rng(1, block)
    first_user = block * config.block_users
    n_users = min(config.block_users, config.users - first_user)
    extra = rng.exponential(config.events_per_user - config.fewest_events, n_users)
    lengths = np.minimum(config.fewest_events + extra.astype(np.int64), config.most_events)
    offsets = np.concatenate(([0], lengths.cumsum()))
    interests = _interests(config, catalogue, rng, n_users)
    kinds, timestamps = _timeline(config, rng, offsets)
    days = np.minimum((timestamps - START) // DAY, config.days - 1)
    items = _choose_items(config, catalogue, rng, offsets, interests, kinds, days)
    labels = np.repeat(np.array([1, 2, 3], np.uint8), (11, 4, 1))  # of 16 positive events
    actions = labels[rng.integers(0, len(labels), len(items), dtype=np.uint8)]
    actions[kinds == SKIP] = 0
    return Block(
        first_user=first_user,
        epoch_days=config.epoch_days,
        offsets=offsets,
        interests=interests,
        kinds=kinds,
        days=days,
        timestamps=timestamps,
        items=items,
        actions=actions,
    )


def _interests(config: WorldConfig, catalogue: Catalogue, rng: np.random.Generator, n_users: int) -> NDArray[np.int64]:
    """Two to four interests per user, drifting: weights e^z with z a random walk over epochs; some are replaced."""
    rows = np.arange(n_users)[:, None]
    wanted = np.arange(4) < rng.integers(2, 5, n_users)[:, None]
    chosen = np.zeros((n_users, 4), np.int64)
    z = np.zeros((n_users, 4))
    marks = (np.arange(INTEREST_SLOTS) + 0.5) / INTEREST_SLOTS
    table = np.empty((n_users, config.epochs, INTEREST_SLOTS), np.int64)
    for epoch in range(config.epochs):
        fresh = rng.random((n_users, 4)) < (config.replace_interest if epoch else 1.0)
        trend = catalogue.trend[epoch * config.epoch_days]
        chosen = np.where(fresh, trend[rng.integers(0, TREND_SLOTS, (n_users, 4))], chosen)
        z = np.where(fresh, 0.0, z) + rng.normal(0, 0.7, (n_users, 4))
        share = (np.exp(z) * wanted).cumsum(1)
        share /= share[:, -1:]
        table[:, epoch] = chosen[rows, (marks[None, :, None] >= share[:, None, :-1]).sum(2)]
    return table


def _timeline(
    config: WorldConfig, rng: np.random.Generator, offsets: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Kinds and times of all events: uint8 `[E]` and seconds int64 `[E]`, without looking at any item.

    A user joins in the first half of the log; session starts are uniform from then on, warped so that evenings
    are busy; events of a session follow each other after 3 seconds and more, 40 on average.
    """
    n_events = int(offsets[-1])
    opens = rng.random(n_events, dtype=np.float32) < 1 / config.session_events
    opens[offsets[:-1]] = True
    kinds = np.where(opens, np.uint8(RETURN), np.uint8(CONTINUE))
    kinds[rng.random(n_events, dtype=np.float32) < config.skip] = SKIP
    kinds[offsets[:-1]] = FIRST  # a log opens with a positive event, so that every user has one

    # Sorted uniforms without sorting: partial sums of exponentials over their total.
    session = opens.cumsum() - 1
    first = session[offsets[:-1]]
    sessions = np.diff(first, append=session[-1] + 1)
    spacing = rng.exponential(size=session[-1] + 1).cumsum()
    before = np.concatenate(([0.0], spacing))[first]
    total = spacing[first + sessions - 1] - before + rng.exponential(size=len(first))
    joined = rng.uniform(0, 0.5, len(first)) * config.days
    rate = (config.days - joined) / total
    start = joined.repeat(sessions) + (spacing - before.repeat(sessions)) * rate.repeat(sessions)
    clock = np.linspace(0, 1, 97)
    wave = np.sin(2 * np.pi * (clock + 0.15))
    busy = clock + 0.8 / (2 * np.pi) * (wave - wave[0])  # share of a day's sessions until then; peaks at 20:24
    whole = np.floor(start)
    start_seconds = ((whole + np.interp(start - whole, busy, clock)) * DAY).astype(np.int64)

    # Time already spent in earlier sessions is added to a session's start, so that a user's events never overlap.
    pauses = (3 + rng.standard_exponential(n_events, dtype=np.float32) * 37).astype(np.int64)
    pauses[offsets[:-1]] = 0
    spent = pauses.cumsum()
    spent -= spent[offsets[:-1]].repeat(np.diff(offsets))
    return kinds, START + start_seconds[session] + spent


def _choose_items(
    config: WorldConfig,
    catalogue: Catalogue,
    rng: np.random.Generator,
    offsets: NDArray[np.int64],
    interests: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    days: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Draw every event's item by rejection, int32 `[E]`.

    In a round each user who is not done proposes one item from q for the event at hand. An item that is dead,
    unborn or already seen is refused and the same event is tried again, source included, in the next round: what
    is accepted follows q renormalised over the living unseen items.
    """
    n_items, slots = config.items, config.slate_slots
    slate, trend, sequels = catalogue.slate.ravel(), catalogue.trend.ravel(), catalogue.sequels.ravel()
    alive, mixture, category = catalogue.alive.ravel(), catalogue.mixtures.ravel(), catalogue.category
    wishes = interests.ravel()
    seen_stride = (n_items + 7) // 8
    seen = np.zeros((len(offsets) - 1) * seen_stride, np.uint8)
    moment = days * 4 + kinds  # one look-up instead of two
    items = np.empty(offsets[-1], np.int32)
    at, end, user = offsets[:-1].copy(), offsets[1:], np.arange(len(offsets) - 1)
    previous = np.zeros(len(user), np.int64)  # read, but not used, before the first positive event
    while len(user):
        bits = rng.integers(0, 1 << 63, len(user))
        day, kind = np.divmod(moment[at], 4)
        source = mixture[kind * MIXTURE_SLOTS + (bits & (MIXTURE_SLOTS - 1))]
        bits >>= MIXTURE_BITS
        chosen = trend[day * TREND_SLOTS + (bits & (TREND_SLOTS - 1))]
        bits >>= TREND_BITS
        epoch = user * config.epochs + day // config.epoch_days
        wish = wishes[epoch * INTEREST_SLOTS + (bits & (INTEREST_SLOTS - 1))]
        bits >>= INTEREST_BITS
        chosen = np.where(source == INTEREST, wish, chosen)
        chosen = np.where(source == STAY, category[previous], chosen)
        sequel = sequels[previous * SEQUEL_SLOTS + (bits & (SEQUEL_SLOTS - 1))]
        bits >>= SEQUEL_BITS
        item = slate[(day * config.categories + chosen) * slots + (bits & (slots - 1))]
        item = np.where(source == SEQUEL, sequel, item).astype(np.int64)

        cell = user * seen_stride + (item >> 3)
        bit = np.left_shift(1, item & 7).astype(np.uint8)
        marks = seen[cell]
        taken = ((marks & bit) == 0) & alive[day * n_items + item]
        seen[cell] = marks | (bit * taken)
        items[at] = item  # a refused item is overwritten when the event is tried again
        previous = np.where(taken & (kind != SKIP), item, previous)
        at += taken
        running = at < end
        if not running.all():
            at, end, user, previous = at[running], end[running], user[running], previous[running]
    return items
