"""Cutting and masking of training batches."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.errors import ConfigError
from retrieval.training.batches import Batches, Fresh, Objective, cloze_batch
from retrieval.training.config import TrainConfig
from retrieval.types import JaggedBatch
from tests.support import cyclic_histories, write_dataset

WEIGHTS = np.array([0, 2, 0], np.float32)


def histories(lengths: list[int], actions: list[int]) -> JaggedBatch:
    total = sum(lengths)
    return JaggedBatch(
        offsets=np.cumsum([0, *lengths]),
        items=np.arange(total) + 10,
        actions=np.array(actions),
        timestamps=np.arange(total),
        query_times=np.arange(total) + 1,
    )


def test_masked_tokens_are_their_own_targets_and_tell_neither_item_nor_action() -> None:
    batch = cloze_batch(histories([400, 100], [1, 2] * 250), WEIGHTS, 0.3, 999, np.random.default_rng(0))
    masked = batch.inputs.items == 999
    assert np.array_equal(np.where(masked, 2, 0), batch.weights)
    assert np.array_equal(batch.targets, np.arange(500) + 10)
    assert not batch.inputs.actions[masked].any()
    assert np.array_equal(batch.inputs.items[~masked], batch.targets[~masked])
    assert not masked[1::2].any()  # not positive
    assert 0.2 < masked[::2].mean() < 0.4


def test_a_row_without_a_mask_has_its_last_positive_event_masked() -> None:
    batch = cloze_batch(histories([3, 1, 2], [1, 1, 2, 1, 2, 2]), WEIGHTS, 1e-9, 99, np.random.default_rng(0))
    assert batch.weights.tolist() == [0, 2, 0, 2, 0, 0]


def test_every_epoch_visits_every_user_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", cyclic_histories(users=10, items=10, length=4), range(10))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    config = TrainConfig(epochs=2, batch_size=4)
    batches = Batches(dataset, split, config, objective="next", max_length=8)
    steps = list(batches.from_step(0))
    assert [step for step, _ in steps] == list(range(6))
    epochs = [np.concatenate([batch.inputs.items for _, batch in steps[at : at + 3]]) for at in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0].tolist() != epochs[1].tolist()
    for first in (2, 3, 5):
        for (step, batch), (same, again) in zip(steps[first:], batches.from_step(first), strict=True):
            assert step == same
            assert np.array_equal(batch.inputs.items, again.inputs.items)


@pytest.mark.parametrize("objective", ["next", "cloze"])
def test_windows_reach_all_of_a_long_history_and_their_cuts_move(tmp_path: Path, objective: Objective) -> None:
    """A history of events 0 to 20 as 8-token windows beside one that needs no cut."""
    histories = [[(item, 1, item) for item in range(first, last)] for first, last in ((0, 21), (21, 25))]
    dataset = write_dataset(tmp_path / "d", histories, range(25))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    batches = Batches(dataset, split, TrainConfig(epochs=8, windows="all"), objective=objective, max_length=8)
    assert batches.per_epoch == 1
    ends = set()
    for _, batch in batches.from_step(0):
        bounds = zip(batch.inputs.offsets[:-1], batch.inputs.offsets[1:], strict=True)
        rows = sorted(batch.targets[start:end].tolist() for start, end in bounds)
        begin = 1 if objective == "next" else 0
        assert rows.pop() == [21, 22, 23, 24][begin:]
        assert sorted({item for row in rows for item in row}) == list(range(begin, 21))
        assert [len(row) for row in rows] == [min(8, rows[0][-1] + 1 - begin), 8, 8]
        assert all(row == list(range(row[0], row[-1] + 1)) for row in rows)
        ends.add(rows[0][-1])
    assert len(ends) > 2


def test_a_weight_for_what_is_not_a_positive_action_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", cyclic_histories(users=10, items=10, length=4), range(10))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    with pytest.raises(ConfigError, match="action_weights: 'buy' is not a positive action"):
        Batches(dataset, split, TrainConfig(action_weights={"buy": 2}), objective="next", max_length=8)


@pytest.mark.parametrize(("share", "others"), [(0.0, 1), (1.0, 3), (99.0, 17)])
def test_an_epoch_visits_users_with_new_events_and_a_sample_of_the_others(
    tmp_path: Path, share: float, others: int
) -> None:
    # User u does something at 1,000 u, so that the last three of twenty have events from 17,000 on.
    histories = [[(user, 1, 1000 * user + step) for step in range(3)] for user in range(20)]
    dataset = write_dataset(tmp_path / "d", histories, range(20))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    fresh = Fresh(since=17_000, history_share=share)
    config = TrainConfig(epochs=3, batch_size=4)
    batches = Batches(dataset, split, config, fresh, objective="next", max_length=8)
    assert batches.per_epoch == -(-(3 + others) // 4)
    visited = [np.unique(batch.inputs.items).tolist() for _, batch in batches.from_step(0)]
    starts = range(0, len(visited), batches.per_epoch)
    epochs = [[user for step in visited[at : at + batches.per_epoch] for user in step] for at in starts]
    for users in epochs:
        assert len(users) == len(set(users)) == 3 + others
        assert {17, 18, 19} <= set(users)
    if others < 17:
        assert len({tuple(sorted(users)) for users in epochs}) > 1, "the sample is drawn anew"


def test_in_time_order_steps_follow_users_last_training_events(tmp_path: Path) -> None:
    histories = [[(user, 1, 1000 - 10 * user), (user, 1, 1001 - 10 * user), (9, 1, 5000)] for user in range(9)]
    dataset = write_dataset(tmp_path / "d", histories, range(10))
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=2000))
    batches = Batches(
        dataset, split, TrainConfig(epochs=2, batch_size=3, visit_order="time"), objective="next", max_length=8
    )
    steps = [batch.inputs.items.tolist() for _, batch in batches.from_step(0)]
    assert steps == [[8, 7, 6], [5, 4, 3], [2, 1, 0]] * 2
