from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.columns import write_columns
from retrieval.errors import DataError
from retrieval.histories.dataset import DatasetHistories
from retrieval.histories.store import HistoryStore
from tests.support import Event, write_dataset

HISTORIES: list[list[Event]] = [[(2, 1, 10), (0, 0, 20)], [(1, 2, 5)], [(0, 1, 1), (0, 1, 1), (2, 2, 9)]]


@pytest.mark.parametrize("ids", [[30, -10, 20], ["30", "é", "20"]])
def test_a_users_events_come_as_ids_and_names_oldest_first(tmp_path: Path, ids: list[int] | list[str]) -> None:
    write_dataset(tmp_path / "d", HISTORIES, ids)
    store: HistoryStore = DatasetHistories(tmp_path / "d")
    expected = [
        ([ids[2], ids[0]], ["like", ""], [10, 20]),
        ([ids[1]], ["skip"], [5]),
        ([ids[0], ids[0], ids[2]], ["like", "like", "skip"], [1, 1, 9]),
    ]
    for user, (items, actions, timestamps) in enumerate(expected):
        stored = store.get(user)
        assert stored is not None
        assert list(stored.items) == items
        assert stored.actions == actions
        assert stored.timestamps.tolist() == timestamps


@pytest.mark.parametrize("user", [3, -1, 2**63 - 1, "0", ""])
def test_a_user_that_is_not_there_has_no_history(tmp_path: Path, user: int | str) -> None:
    write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3])
    assert DatasetHistories(tmp_path / "d").get(user) is None


def test_users_may_have_strings_for_ids(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3])
    ends = pa.array(dataset.offsets[1:])
    write_columns(tmp_path / "d" / "users.arrow", {"id": pa.array(["Zoë", "amy", "ömer"]), "end": ends})
    store = DatasetHistories(tmp_path / "d")
    found = [store.get(user) for user in ("Zoë", "amy", "ömer", "zoë", 0)]
    assert [stored and stored.timestamps.tolist() for stored in found] == [[10, 20], [5], [1, 1, 9], None, None]


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a dataset folder"):
        DatasetHistories(tmp_path)


def test_many_threads_may_ask_at_once(tmp_path: Path) -> None:
    histories = [[(user % 7, 1, user * 100 + step) for step in range(1 + user % 5)] for user in range(200)]
    write_dataset(tmp_path / "d", histories, list(range(7)))
    store = DatasetHistories(tmp_path / "d")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(store.get, [*range(200)] * 5))
    for user, stored in zip([*range(200)] * 5, found, strict=True):
        assert stored is not None
        np.testing.assert_array_equal(stored.timestamps, [event[2] for event in histories[user]])
