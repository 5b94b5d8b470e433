"""Recent popularity: the half-life is measured, and counts decay by it."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.data import popularity
from retrieval.data.dataset import Dataset
from retrieval.data.popularity import HALF_LIVES, log_popularity, recent_popularity
from retrieval.data.splits import SplitInfo, split_dataset
from tests.support import write_dataset

HOUR = 3600
ITEMS = 40


def dataset(path: Path, items: list[int], hours: list[float]) -> Dataset:
    """One user per event, so that order within users does not matter."""
    histories = [[(item, 1, int(hour * HOUR))] for item, hour in zip(items, hours, strict=True)]
    return write_dataset(path, histories, range(ITEMS))


def test_fashions_that_last_a_few_hours_get_a_short_half_life(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hours = np.sort(rng.uniform(0, 400, 6000))
    # Every ten hours four other items are in fashion.
    items = (hours // 10 * 4 + rng.integers(0, 4, 6000)).astype(int) % ITEMS
    found = recent_popularity(dataset(tmp_path / "data", items.tolist(), hours.tolist()))
    assert found.half_life in (1.0, 6.0)
    assert set(np.argsort(-found.counts)[:4]) == {36, 37, 38, 39}


def test_where_nothing_changes_all_events_count_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = np.minimum(rng.geometric(0.1, 3000) - 1, ITEMS - 1)
    found = recent_popularity(dataset(tmp_path / "data", items.tolist(), np.arange(3000.0).tolist()))
    assert found.half_life == np.inf
    assert found.counts.tolist() == np.bincount(items, minlength=ITEMS).tolist()


def test_counts_are_halved_by_age_whatever_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(tmp_path / "data", [0, 0, 1, 2], [0, 6, 12, 12])
    monkeypatch.setattr(popularity, "HALF_LIVES", (6.0,))
    whole = recent_popularity(data).counts
    assert whole[:4].tolist() == [0.75, 1.0, 1.0, 0.0]
    monkeypatch.setattr(popularity, "_EVENTS_AT_ONCE", 3)
    assert recent_popularity(data).counts.tolist() == whole.tolist()


def test_half_lives_are_tried_from_news_to_films() -> None:
    assert list(HALF_LIVES) == sorted(HALF_LIVES)
    assert HALF_LIVES[-1] == np.inf


def test_log_popularity_is_of_the_training_events_alone(tmp_path: Path) -> None:
    hours = np.arange(100.0)
    seen = [int(hour) % 4 for hour in hours]
    later = [7 if hour >= 80 else item for item, hour in zip(seen, hours, strict=True)]
    # Users of two events, so that there is something to train on.
    data = [
        write_dataset(
            tmp_path / name,
            [[(items[at], 1, at * HOUR), (items[at + 1], 1, (at + 1) * HOUR)] for at in range(0, 100, 2)],
            range(ITEMS),
        )
        for name, items in (("seen", seen), ("later", later))
    ]
    moment = SplitInfo(protocol="global-time", time=79 * HOUR)
    known, other = (log_popularity(one, split_dataset(one, moment)) for one in data)
    assert known.tolist() == other.tolist()
    assert np.exp(known).sum() == pytest.approx(1, rel=1e-5)
    unseen = known[4:]
    assert np.isfinite(unseen).all()
    assert (unseen == unseen[0]).all()
    assert unseen[0] < known[:4].min()
    everything = log_popularity(data[1], split_dataset(data[1], SplitInfo(protocol="all")))
    assert everything.argmax() == 7
