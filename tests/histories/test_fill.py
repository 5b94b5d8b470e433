from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.columns import write_columns
from retrieval.data.dataset import Dataset
from retrieval.errors import InputError
from retrieval.histories import fill
from retrieval.histories.event import Event
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories, open_histories
from tests.histories.test_recorded import plain
from tests.support import Event as Row
from tests.support import write_dataset

HISTORIES: list[list[Row]] = [[(2, 1, 10), (0, 0, 20)], [(1, 2, 5)], [(0, 1, 1), (1, 1, 1), (2, 2, 9)]]


def all_of(store: RecordedHistories, dataset: Dataset) -> dict:
    return {user: plain(store.read(user)) for user in dataset.user_ids.to_pylist()}


@pytest.mark.parametrize("ids", [[30, -10, 20], ["30", "é", "20"]])
def test_a_users_events_come_as_ids_and_names_oldest_first(
    tmp_path: Path, new_place: Callable[[], str], ids: list[int] | list[str]
) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, ids)
    with closing(open_histories(new_place())) as store:
        fill_histories(dataset, store)
        assert all_of(store, dataset) == {
            0: [(ids[2], "like", 10), (ids[0], "", 20)],
            1: [(ids[1], "skip", 5)],
            2: [(ids[0], "like", 1), (ids[1], "like", 1), (ids[2], "skip", 9)],
        }
        assert store.read(3) is None
        assert store.read("0") is None


def test_users_may_have_strings_for_ids(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3])
    users = pa.array(["Zoë", "amy", "ömer"])
    write_columns(tmp_path / "d" / "users.arrow", {"id": users, "end": pa.array(dataset.offsets[1:])})
    with closing(open_histories(str(tmp_path / "h"))) as store:
        fill_histories(Dataset(tmp_path / "d"), store)
        found = [store.read(user) for user in ("Zoë", "amy", "ömer", "zoë", 0)]
    assert [one and one.timestamps.tolist() for one in found] == [[10, 20], [5], [1, 1, 9], None, None]


def test_filling_again_adds_only_what_is_new_and_keeps_what_was_recorded(
    tmp_path: Path, new_place: Callable[[], str]
) -> None:
    dataset = write_dataset(tmp_path / "one", HISTORIES, [1, 2, 3])
    # The next night's log has the click that was recorded with an id, and one that was not recorded.
    later = write_dataset(tmp_path / "two", [*HISTORIES[:2], [*HISTORIES[2], (0, 2, 11), (1, 1, 12)]], [1, 2, 3])
    with closing(open_histories(new_place())) as store:
        fill_histories(dataset, store)
        clicks = [
            Event(user_id=2, item_id=2, timestamp=12, action="like", event_id="a"),
            Event(user_id=2, item_id=3, timestamp=13, action="like", event_id="b"),
            Event(user_id=9, item_id=3, timestamp=13),
        ]
        store.append(clicks).result(20)
        for _ in range(2):
            fill_histories(later, store)
            expected = [
                (1, "like", 1),
                (2, "like", 1),
                (3, "skip", 9),
                (1, "skip", 11),
                (2, "like", 12),
                (3, "like", 13),
            ]
            assert plain(store.read(2)) == expected
            assert plain(store.read(9)) == [(3, "", 13)]
        store.append(clicks).result(20)
        assert plain(store.read(2)) == expected


def test_a_few_users_at_a_time_and_no_more_events_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill, "_TOGETHER", 7)
    rng = np.random.default_rng(0)
    histories: list[list[Row]] = [
        [(int(rng.integers(0, 50)), int(rng.integers(0, 3)), 10 * step) for step in range(int(rng.integers(0, 40)))]
        for _ in range(50)
    ]
    dataset = write_dataset(tmp_path / "d", histories, list(range(50)))
    steps: list[tuple[int, int]] = []
    with closing(open_histories(str(tmp_path / "h"), 20)) as store:
        fill_histories(dataset, store, lambda done, users: steps.append((done, users)))
        names = ("", "like", "skip")
        for user, history in enumerate(histories):
            assert plain(store.read(user)) == [(item, names[action], time) for item, action, time in history[-20:]]
    assert steps == [(min(done, 50), 50) for done in range(7, 57, 7)]


def test_a_users_id_that_no_store_can_hold_is_told(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3])
    users = pa.array(["a", "b", "c" * 501])
    write_columns(tmp_path / "d" / "users.arrow", {"id": users, "end": pa.array(dataset.offsets[1:])})
    with closing(open_histories(str(tmp_path / "h"))) as store, pytest.raises(InputError, match="at most 500 bytes"):
        fill_histories(Dataset(tmp_path / "d"), store)
