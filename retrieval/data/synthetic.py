"""A synthetic world: event logs that behave like a real service's, and the best recall that is possible on them.

The process (`retrieval.data.synthetic_users`) has items in categories that are born, peak and die; categories
that come into and go out of fashion; users with several drifting interests; sessions; chains of items that follow
each other; skips, mostly outside a user's interests; and a few items born on the last days, of which the log shows
almost nothing. `generate_world` writes a folder:

    events/part-*.parquet  user_id, item_id, timestamp (int64 seconds since 1970), action; a part holds the whole
                           logs of some users, ordered by time
    items.parquet          item_id, title, category, published (int64 seconds since 1970)
    oracle.parquet         user_id, item_id and timestamp of the user's last positive event; possible_10, _50 and
                           _200: true probability that its item is among the K likeliest unseen ones; oracle_rank:
                           place of its item in the true order, from 1
    world.json             format, version, configuration, counts
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retrieval.data.synthetic_catalogue import DAY, START, Catalogue, WorldConfig
from retrieval.data.synthetic_oracle import CUTOFFS, ask_oracle
from retrieval.data.synthetic_users import ACTIONS, Block, simulate_block
from retrieval.errors import ConfigError, DataError
from retrieval.files import new_folder

__all__ = [
    "POSITIVE_ACTIONS",
    "World",
    "WorldConfig",
    "generate_world",
    "large",
    "nano",
    "possible_recall",
    "small",
]

POSITIVE_ACTIONS = ("view", "like", "purchase")  # the fourth, "skip", says that the item was shown and not wanted
_FORMAT = "retrieval-synthetic-world"
_VERSION = 1

# Sixteen each: themes and forms make the up to 256 categories, adjectives and nouns the titles.
_THEMES, _FORMS, _ADJECTIVES, _NOUNS = (
    line.split()
    for line in (
        "desert harbour mountain winter space jungle city river castle garden island night forest ocean rail village",
        "ballad comedy mystery recipe puzzle portrait lecture diary race romance song tale quiz sketch walk dance",
        "Amber Brave Crooked Distant Early Faded Gentle Hidden Iron Little Narrow Quiet Silver Tall Velvet Wild",
        "Anchor Bridge Candle Door Engine Feather Hour Island Kite Lantern Map Orchard Promise Road Signal Window",
    )
)


def nano(*, seed: int = 0) -> WorldConfig:
    """A world to be generated and learned in seconds: about 15 thousand events."""
    return WorldConfig(seed=seed, users=400, items=200, categories=8, days=40, events_per_user=60)


def small(*, seed: int = 0) -> WorldConfig:
    """The demo's world: about 200 thousand events."""
    return WorldConfig(seed=seed, users=3_000, items=2_000, categories=12, days=60, events_per_user=68)


def large(*, seed: int = 0) -> WorldConfig:
    """The benchmarks' world: about 10 million events; the oracle answers for a sample of 2000 users."""
    return WorldConfig(
        seed=seed,
        users=100_000,
        items=100_000,
        categories=200,
        days=90,
        events_per_user=101,
        oracle_users=2_000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A generated world on disk.

    Attributes:
        folder: where it lies.
        config: what it was generated from.
        events: number of events.
    """

    folder: Path
    config: WorldConfig
    events: int

    @property
    def events_folder(self) -> Path:
        """Folder of the event log's parts."""
        return self.folder / "events"

    @property
    def items_file(self) -> Path:
        """File of the items' metadata."""
        return self.folder / "items.parquet"


def generate_world(config: WorldConfig, folder: Path, progress: Callable[[int, int], None] | None = None) -> World:
    """Write a world to `folder`, whole or not at all; an earlier synthetic world there is replaced.

    Memory holds one block of about a million events at a time, whatever the size of the world.

    Args:
        config: the world; equal configurations give equal rows.
        folder: where to write.
        progress: called after each block with the users done and the users in all.

    Raises:
        ConfigError: the catalogue is too small for its users.
        DataError: `folder` exists and is not a synthetic world.
    """
    if folder.exists() and not _is_world(folder):
        raise DataError(f"{folder}: exists and is not a synthetic world; it stays as it is")
    catalogue = Catalogue.build(config)
    item_ids = _labels("i", range(config.items))
    asked = config.rng(2).permutation(config.users)[: config.oracle_users]
    events = 0
    answers: list[pa.Table] = []
    with new_folder(folder, replace=True) as temporary:
        (temporary / "events").mkdir()
        for number, first in enumerate(range(0, config.users, config.block_users)):
            block = simulate_block(config, catalogue, number)
            last = first + len(block.offsets) - 1
            user_ids = _labels("u", range(first, last))
            _write(_event_table(block, user_ids, item_ids), temporary / "events" / f"part-{number:05d}.parquet")
            users = np.sort(asked[(asked >= first) & (asked < last)]) - first
            answers.append(_oracle_table(catalogue, block, users, user_ids, item_ids))
            events += len(block.items)
            if progress is not None:
                progress(last, config.users)
        _write(_item_table(config, catalogue, item_ids), temporary / "items.parquet")
        _write(pa.concat_tables(answers), temporary / "oracle.parquet")
        about = {"format": _FORMAT, "version": _VERSION, "config": config.model_dump(), "events": events}
        (temporary / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return World(folder=folder, config=config, events=events)


def possible_recall(folder: Path, ks: Iterable[int]) -> dict[int, float]:
    """Best recall@K that any recommender can expect on users' last positive events, by K.

    Args:
        folder: a generated world.
        ks: out of 10, 50 and 200.

    Raises:
        ConfigError: the oracle was not asked for one of `ks`.
        DataError: the folder holds no synthetic world.
    """
    wanted = list(ks)
    for k in wanted:
        if k not in CUTOFFS:
            raise ConfigError(f"k: the possible recall is known at {', '.join(map(str, CUTOFFS))}, not at {k}")
    if not _is_world(folder):
        raise DataError(f"{folder}: holds no synthetic world")
    table = pq.read_table(folder / "oracle.parquet")
    return {k: float(table[f"possible_{k}"].to_numpy().mean()) for k in wanted}


def _is_world(folder: Path) -> bool:
    try:
        about = json.loads((folder / "world.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and about.get("format") == _FORMAT


def _labels(letter: str, numbers: Iterable[int]) -> pa.Array:
    return pa.array([f"{letter}{number:06d}" for number in numbers])


def _write(table: pa.Table, path: Path) -> None:
    # Without the Arrow schema in the file, readers see plain strings instead of Arrow dictionaries.
    # Times have no dictionary: building one takes half of the writing and saves nothing.
    coded = [name for name in table.column_names if name not in ("timestamp", "published")]
    pq.write_table(table, path, compression="snappy", use_dictionary=coded, store_schema=False)


def _event_table(block: Block, user_ids: pa.Array, item_ids: pa.Array) -> pa.Table:
    # Number and time share an int64 to sort by time: sorting values is several times faster than `argsort`.
    bits = len(block.items).bit_length()
    order = np.sort((block.timestamps - START) << bits | np.arange(len(block.items))) & ((1 << bits) - 1)
    users = np.arange(len(user_ids), dtype=np.int32).repeat(np.diff(block.offsets))
    return pa.table(
        {
            "user_id": _coded(users[order], user_ids),
            "item_id": _coded(block.items[order], item_ids),
            "timestamp": block.timestamps[order],
            "action": _coded(block.actions[order].astype(np.int32), pa.array(ACTIONS)),
        }
    )


def _coded(codes: NDArray[np.int32], values: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes), values)


def _oracle_table(
    catalogue: Catalogue, block: Block, users: NDArray[np.int64], user_ids: pa.Array, item_ids: pa.Array
) -> pa.Table:
    rows = ask_oracle(catalogue, block, users)
    possible = {f"possible_{k}": rows.possible[:, column] for column, k in enumerate(CUTOFFS)}
    return pa.table(
        {
            "user_id": user_ids.take(pa.array(users)),
            "item_id": item_ids.take(pa.array(block.items[rows.events])),
            "timestamp": block.timestamps[rows.events],
            **possible,
            "oracle_rank": rows.rank,
        }
    )


def _item_table(config: WorldConfig, catalogue: Catalogue, item_ids: pa.Array) -> pa.Table:
    """Metadata; the category is also in the title, so that a model of texts can learn it."""
    rng = config.rng(3)
    adjectives = rng.integers(0, len(_ADJECTIVES), config.items).tolist()
    nouns = rng.integers(0, len(_NOUNS), config.items).tolist()
    names = [f"{_THEMES[c % 16]} {_FORMS[(c + c // 16) % 16]}" for c in range(config.categories)]
    titles = [
        f"{_ADJECTIVES[adjective]} {_NOUNS[noun]}, a {names[category]}"
        for adjective, noun, category in zip(adjectives, nouns, catalogue.category.tolist(), strict=True)
    ]
    return pa.table(
        {
            "item_id": item_ids,
            "title": titles,
            "category": _coded(catalogue.category.astype(np.int32), pa.array(names)),
            "published": START + DAY * catalogue.birth,
        }
    )
