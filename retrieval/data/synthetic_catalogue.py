"""What all users of the synthetic world share: its configuration, its items and their slot tables.

Everything random about a choice of item is a draw from a *slot table* whose length is a power of two: a row lists
outcomes, an outcome's probability is its share of the row's slots. Drawing is then one look-up with bits of a
random integer, and the oracle reads exact probabilities off the same tables.

Legend: N items, C categories, G days.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from retrieval.config import Config
from retrieval.errors import ConfigError

__all__ = ["DAY", "START", "Catalogue", "WorldConfig", "mixtures"]

START = 1_767_225_600  # 2026-01-01 00:00 UTC, in seconds: a midnight, so that days of the world are days of the clock
DAY = 86_400

FIRST, RETURN, CONTINUE, SKIP = range(4)  # kinds of event
SEQUEL, STAY, INTEREST, EXPLORE = range(4)  # sources of an item

# Lengths of slot tables, as bits of the random integer that picks a slot.
MIXTURE_BITS, TREND_BITS, INTEREST_BITS, SEQUEL_BITS = 8, 8, 4, 3
MIXTURE_SLOTS, TREND_SLOTS = 1 << MIXTURE_BITS, 1 << TREND_BITS
INTEREST_SLOTS, SEQUEL_SLOTS = 1 << INTEREST_BITS, 1 << SEQUEL_BITS
SEQUEL_SHARES = (4, 2, 1, 1)  # slots of an item's four sequels
_SERIES = 8  # items; short, so that an encoder learns from little data which items belong together

_BLOCK_EVENTS = 1 << 20
_BLOCK_SEEN_BITS = 1 << 30  # 128 MiB for the table of who saw what


class WorldConfig(Config):
    """Shape of a synthetic world; probabilities of an item's sources are rounded to 1/256.

    Attributes:
        seed: everything follows from it and from the other fields.
        users: number of users, each with at least `fewest_events` events.
        items: size of the catalogue.
        categories: number of categories, each with at least one item on every day.
        days: length of the log in days.
        events_per_user: mean before the cap at `most_events`.
        session_events: mean number of events of a session.
        epoch_days: a user's interests are constant for so many days, then drift.
        replace_interest: probability that an interest gives way to another category at an epoch's start.
        sequel: probability that an event inside a session proposes a sequel of the last positive item.
        resume: the same for the first event of a session.
        stay: probability that an event inside a session proposes an item of the last positive item's category.
        explore: probability that a positive event comes from the categories in trend, whoever the user is.
        skip: probability that an event is a skip.
        skip_interest: probability that a skip falls on the user's interests rather than on categories in trend.
        zipf: exponent of the items' appeal, rank^(−zipf).
        evergreen: share of items that never die.
        cold: share of items born within the last `cold_days`, which only metadata can explain.
        cold_days: see `cold`.
        oracle_users: for so many users at most, a random sample, the best possible recall is worked out.
    """

    seed: int = Field(default=0, ge=0)
    users: int = Field(ge=1, le=10_000_000)
    items: int = Field(ge=20, le=1_000_000)
    categories: int = Field(ge=2, le=TREND_SLOTS)
    days: int = Field(ge=7, le=365)
    events_per_user: float = Field(ge=10, le=10_000)
    session_events: float = Field(default=8, ge=2, le=100)
    epoch_days: int = Field(default=10, ge=1)
    replace_interest: float = Field(default=0.15, ge=0, le=1)
    sequel: float = Field(default=0.35, ge=0, le=1)
    resume: float = Field(default=0.25, ge=0, le=1)
    stay: float = Field(default=0.15, ge=0, le=1)
    explore: float = Field(default=0.06, ge=0.01, le=1)
    skip: float = Field(default=0.15, ge=0, le=0.9)
    skip_interest: float = Field(default=0.1, ge=0, le=0.9)
    zipf: float = Field(default=1.0, ge=0, le=2)
    evergreen: float = Field(default=0.25, ge=0, le=1)
    cold: float = Field(default=0.015, ge=0, le=0.2)
    cold_days: int = Field(default=1, ge=1)
    oracle_users: int = Field(default=4_000, ge=1)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.sequel + self.stay + self.explore > 1:
            raise ValueError("sequel + stay + explore is above 1")
        if self.resume + self.explore > 1:
            raise ValueError("resume + explore is above 1")
        if self.items < 5 * self.categories:
            raise ValueError(f"{self.items} items are too few for {self.categories} categories (5 each)")
        if self.most_events < 2 * self.fewest_events:
            raise ValueError(f"{self.items} items are too few for users who never see one twice")
        if self.cold_days * 4 > self.days:
            raise ValueError(f"cold_days is more than a quarter of the {self.days} days")
        return self

    @property
    def fewest_events(self) -> int:
        """Events of the least active user."""
        return 5

    @property
    def most_events(self) -> int:
        """Cap on a user's events: nobody sees more than a quarter of the catalogue."""
        return min(int(6 * self.events_per_user), self.items // 4)

    @property
    def slate_slots(self) -> int:
        """Slots of a category's slate: a power of two, two to four per item of a category of mean size."""
        return 1 << max(6, int(np.ceil(np.log2(2 * self.items / self.categories))))

    @property
    def block_users(self) -> int:
        """Users simulated together: bounds memory, whatever the number of users."""
        fit = min(_BLOCK_EVENTS / self.events_per_user, _BLOCK_SEEN_BITS / self.items)
        return max(1, min(self.users, int(fit)))

    @property
    def epochs(self) -> int:
        """Periods of constant interests that cover the log."""
        return -(-self.days // self.epoch_days)

    def rng(self, *key: int) -> np.random.Generator:
        """Give the random stream of one purpose, independent of every other key's."""
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(self.seed, spawn_key=key)))


def mixtures(config: WorldConfig) -> NDArray[np.uint8]:
    """Sources of an item by kind of event: slot table uint8 `[4 kinds, 256]` of SEQUEL, STAY, INTEREST, EXPLORE."""
    sequel, stay, explore = config.sequel, config.stay, config.explore
    shares = np.zeros((4, 4))
    shares[FIRST] = 0, 0, 1 - explore, explore
    shares[RETURN] = config.resume, 0, 1 - config.resume - explore, explore
    shares[CONTINUE] = sequel, stay, 1 - sequel - stay - explore, explore
    shares[SKIP] = 0, 0, config.skip_interest, 1 - config.skip_interest
    ends = np.rint(shares.cumsum(1) * MIXTURE_SLOTS)
    return (np.arange(MIXTURE_SLOTS)[None, :, None] >= ends[:, None, :-1]).sum(2).astype(np.uint8)


def _slots(
    weights: NDArray[np.float64], starts: NDArray[np.int64], slots: int, shift: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Turn weights into slot tables by systematic sampling.

    Outcome k of a group gets ⌊slots·F_k + shift⌋ − ⌊slots·F_{k−1} + shift⌋ slots, F being the group's cumulative
    share: its expectation over a uniform `shift` is exactly slots·p_k, so outcomes too rare for a slot of their own
    take turns instead of vanishing.

    Args:
        weights: of all groups end to end, `[n]`, at least one of each group above 0.
        starts: first outcome of each group, `[g]`.
        slots: slots of each group.
        shift: in [0, 1), `[g]`.

    Returns:
        Outcomes (positions in `weights`), `[g, slots]`.
    """
    lengths = np.diff(starts, append=len(weights))
    total = weights.cumsum()
    base = np.concatenate(([0.0], total))[starts]
    mass = total[starts + lengths - 1] - base
    # Divided before it is multiplied: a last share of exactly 1 gives outcomes of weight 0 after it no slot.
    share = (total - base.repeat(lengths)) / mass.repeat(lengths)
    ends = np.floor(share * slots + shift.repeat(lengths))
    ends[starts + lengths - 1] = slots
    counts = np.diff(ends, prepend=0.0)
    counts[starts] = ends[starts]
    return np.arange(len(weights), dtype=np.int32).repeat(counts.astype(np.int64)).reshape(-1, slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Items and slot tables of a world, shared by all users.

    Attributes:
        category: of each item, never falling: a category's items are neighbours, int64 `[N]`.
        birth: first day of each item, may lie before the log, int64 `[N]`.
        alive: whether an item exists on a day, bool `[G, N]`.
        slate: items offered by a category on a day, int32 `[G, C, slots]`.
        trend: categories in trend on a day, int64 `[G, 256]`.
        sequels: items that tend to follow an item, of its own category, int32 `[N, 8]`.
        mixtures: see `mixtures`, uint8 `[4, 256]`.
    """

    category: NDArray[np.int64]
    birth: NDArray[np.int64]
    alive: NDArray[np.bool_]
    slate: NDArray[np.int32]
    trend: NDArray[np.int64]
    sequels: NDArray[np.int32]
    mixtures: NDArray[np.uint8]

    @classmethod
    def build(cls, config: WorldConfig) -> "Catalogue":
        """Draw the catalogue of a world.

        Raises:
            ConfigError: on some day fewer items are on offer than a user may have seen.
        """
        rng = config.rng(0)
        size = rng.permutation(np.arange(1, config.categories + 1) ** -0.5)
        category = np.sort(
            np.concatenate(
                (
                    np.arange(config.categories),
                    rng.choice(config.categories, config.items - config.categories, p=size / size.sum()),
                )
            )
        )
        starts = np.searchsorted(category, np.arange(config.categories))
        birth, appeal, alive, slate = _lifecycles(config, rng, category, starts)
        trend = _trend(config, rng, size)
        # Every event may explore, so this is what makes the rejection sampling of `_choose_items` end.
        offer = min(1 + np.count_nonzero(np.diff(slate[d, np.unique(trend[d])].ravel())) for d in range(config.days))
        if offer < config.most_events:
            raise ConfigError(f"items: on some day only {offer} are on offer, but a user may see {config.most_events}")
        return cls(
            category=category,
            birth=birth,
            alive=alive,
            slate=slate,
            trend=trend,
            sequels=_sequels(rng, category, starts, appeal),
            mixtures=mixtures(config),
        )


def _lifecycles(
    config: WorldConfig, rng: np.random.Generator, category: NDArray[np.int64], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.int32]]:
    """Births `[N]`, appeals `[N]`, lives `[G, N]` and slates `[G, C, slots]`.

    An item's weight in its category is appeal · (1 − e^(−(age + 1)/2)) · e^(−age/decay) from its birth, ages in
    days, until it dies at the age of 4·decay.
    """
    n_items, days = config.items, config.days
    oldest = -(days // 2)
    appeal = rng.permutation(np.arange(1, n_items + 1) ** -config.zipf)
    birth = rng.integers(oldest, days - config.cold_days, n_items)
    decay = rng.lognormal(np.log(days / 5), 0.5, n_items)
    decay[rng.random(n_items) < config.evergreen] = np.inf
    # A category's oldest item stays for ever, so that no slate is ever empty.
    first = np.minimum.reduceat(birth * n_items + np.arange(n_items), starts) % n_items
    birth[first], decay[first] = oldest, np.inf
    others = np.setdiff1d(np.arange(n_items), first)
    cold = rng.choice(others, min(round(config.cold * n_items), len(others)), replace=False)
    birth[cold] = rng.integers(days - config.cold_days, days, len(cold))
    appeal[cold] = np.quantile(appeal, 0.9)  # promoted as new, or too few targets would fall on them

    # Within a category, items go by age: neighbours live at the same time and can be each other's sequels.
    order = np.lexsort((birth, category))
    birth, decay, appeal = birth[order], decay[order], appeal[order]
    alive = np.empty((days, n_items), np.bool_)
    slate = np.empty((days, config.categories, config.slate_slots), np.int32)
    for day in range(days):
        age = day - birth
        alive[day] = (age >= 0) & (age < 4 * decay)
        age = np.maximum(age, 0)
        life = -np.expm1(-(age + 1) / 2) * np.exp(-age / decay)
        weights = np.where(alive[day], appeal * life, 0.0)
        slate[day] = _slots(weights, starts, config.slate_slots, rng.random(config.categories))
    return birth, appeal, alive, slate


def _trend(config: WorldConfig, rng: np.random.Generator, size: NDArray[np.float64]) -> NDArray[np.int64]:
    """Categories in trend by day: each rises and falls once around its own peak, above a floor of a tenth."""
    peak = rng.uniform(-0.2, 1.2, config.categories) * config.days
    width = rng.uniform(0.1, 0.4, config.categories) * config.days
    bump = np.exp(-0.5 * ((np.arange(config.days)[:, None] - peak) / width) ** 2)
    weights = size * (0.1 + bump)
    starts = np.arange(config.days) * config.categories
    outcomes = _slots(weights.ravel(), starts, TREND_SLOTS, rng.random(config.days))
    return (outcomes % config.categories).astype(np.int64)


def _sequels(
    rng: np.random.Generator,
    category: NDArray[np.int64],
    starts: NDArray[np.int64],
    appeal: NDArray[np.float64],
) -> NDArray[np.int32]:
    """Four other items of each item's series, with 4, 2, 1 and 1 of 8 slots.

    A series is `_SERIES` items of a category that are neighbours in age. Drawn without replacement by √appeal: the
    four shortest of exponential waiting times with these rates. An item of a series too short for four other items
    meets some twice, or itself, which is then always refused as seen.
    """
    start = starts[category]
    length = np.diff(starts, append=len(category))[category]
    place = (np.arange(len(category)) - start) % _SERIES
    opening = np.arange(len(category)) - place
    size = np.minimum(_SERIES, start + length - opening)
    neighbours = opening[:, None] + (place[:, None] + np.arange(1, _SERIES)) % size[:, None]
    waiting = rng.exponential(size=neighbours.shape) / np.sqrt(appeal[neighbours])
    chosen = waiting.argsort(1)[:, : len(SEQUEL_SHARES)]
    return np.take_along_axis(neighbours, chosen, 1).repeat(SEQUEL_SHARES, axis=1).astype(np.int32)
