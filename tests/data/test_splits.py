from pathlib import Path

import pytest

from retrieval.data.splits import SplitInfo, split_dataset, training_counts
from retrieval.errors import DataError
from tests.support import Event, write_dataset

LIKE, SKIP = 1, 2
HISTORIES: list[list[Event]] = [
    [(0, LIKE, 10), (1, LIKE, 20), (2, LIKE, 30), (3, SKIP, 40)],  # events 0–3
    [(1, LIKE, 5), (2, SKIP, 50)],  # 4–5: its only like has no history before it
    [(3, SKIP, 7), (4, LIKE, 8)],  # 6–7
    [(0, SKIP, 1), (1, SKIP, 2), (2, SKIP, 3)],  # 8–10: likes nothing
]


def test_paper_asks_for_the_last_positive_event_and_trains_before_it(tmp_path: Path) -> None:
    split = split_dataset(write_dataset(tmp_path / "d", HISTORIES, range(5)), SplitInfo(protocol="paper"))
    assert split.test.users.tolist() == [0, 2]
    assert split.test.targets.tolist() == [2, 7]
    assert split.train_ends.tolist() == [2, 4, 7, 11]


def test_stable_keeps_one_positive_event_for_validation(tmp_path: Path) -> None:
    split = split_dataset(write_dataset(tmp_path / "d", HISTORIES, range(5)), SplitInfo(protocol="stable"))
    assert split.test.users.tolist() == [0, 2]
    assert split.test.targets.tolist() == [2, 7]
    assert split.validation.users.tolist() == [0]  # user 2 likes nothing before its test target
    assert split.validation.targets.tolist() == [1]
    assert split.train_ends.tolist() == [1, 4, 7, 11]


def test_only_stable_has_validation_and_only_paper_hides_what_is_read(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [*HISTORIES, [(0, LIKE, t) for t in range(100)]], range(5))
    splits = [split_dataset(dataset, SplitInfo(protocol=name)) for name in ("paper", "stable", "global-time", "all")]
    assert [len(split.validation) > 0 for split in splits] == [False, True, False, False]
    assert [split.test.hide_read_only for split in splits] == [True, False, False, False]


def test_global_time_trains_before_the_moment_and_asks_for_the_first_positive_after_it(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, range(5))
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=8))
    assert split.train_ends.tolist() == [0, 5, 7, 11]
    assert split.test.users.tolist() == [2]  # user 0's first like after the moment is its first event
    assert split.test.targets.tolist() == [7]


def test_global_time_without_a_moment_records_the_one_it_chose(tmp_path: Path) -> None:
    histories = [[(0, LIKE, t), (1, LIKE, t + 1)] for t in range(0, 100, 2)]
    histories.append([(0, LIKE, 0), (1, LIKE, 95), (2, LIKE, 99)])
    dataset = write_dataset(tmp_path / "d", histories, range(5))
    split = split_dataset(dataset, SplitInfo(protocol="global-time"))
    assert split.info.time is not None
    assert 85 <= split.info.time <= 92
    again = split_dataset(dataset, split.info)
    assert again.train_ends.tolist() == split.train_ends.tolist()


@pytest.mark.parametrize("protocol", ["paper", "stable", "global-time"])
def test_no_training_event_lies_at_or_after_a_target(tmp_path: Path, protocol: str) -> None:
    histories = [[(i % 5, 1 + (i + u) % 2, 10 * i + u) for i in range(3 + u)] for u in range(20)]
    dataset = write_dataset(tmp_path / "d", histories, range(5))
    split = split_dataset(dataset, SplitInfo.parse({"protocol": protocol}, "test"))
    for queries in (split.test, split.validation):
        assert (split.train_ends[queries.users] <= queries.targets).all()
    assert (split.train_ends >= dataset.offsets[:-1]).all()


def test_all_trains_on_everything_and_asks_nobody(tmp_path: Path) -> None:
    split = split_dataset(write_dataset(tmp_path / "d", HISTORIES, range(5)), SplitInfo(protocol="all"))
    assert split.train_ends.tolist() == [4, 6, 8, 11]
    assert len(split.test) == 0


def test_a_split_without_targets_is_an_error(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [[(0, SKIP, 1), (1, SKIP, 2)]], range(5))
    with pytest.raises(DataError, match="no user with a history and a target"):
        split_dataset(dataset, SplitInfo(protocol="paper"))


def test_training_counts_leave_targets_out(tmp_path: Path) -> None:
    histories: list[list[Event]] = [
        [(0, LIKE, 1), (1, LIKE, 2), (2, LIKE, 3)],
        [(2, LIKE, 1), (2, LIKE, 2), (3, LIKE, 3)],
        [(4, LIKE, 1), (5, LIKE, 2), (4, LIKE, 3)],
    ]
    dataset = write_dataset(tmp_path / "d", histories, range(6))
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    assert training_counts(dataset, split).tolist() == [1, 1, 2, 0, 1, 1]
