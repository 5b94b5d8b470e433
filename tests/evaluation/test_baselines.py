from pathlib import Path

import numpy as np
import pytest

from retrieval.data.sequences import gather_histories, user_histories
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.evaluation import baselines
from retrieval.evaluation.baselines import ItemKNN
from retrieval.types import TokenKind
from tests.support import Event, add_side, write_dataset

ITEMS = 9


@pytest.mark.parametrize("at_once", [4, 1024])
@pytest.mark.parametrize("neighbours", [2, 100])
def test_item_knn_is_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neighbours: int, at_once: int
) -> None:
    monkeypatch.setattr(baselines, "_ITEMS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    histories: list[list[Event]] = [
        [(int(item), 1, time) for time, item in enumerate(rng.integers(0, ITEMS, rng.integers(3, 9)))]
        for _ in range(30)
    ]
    dataset = write_dataset(tmp_path / "d", histories, range(ITEMS))
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    knn = ItemKNN(dataset, split, neighbours=neighbours, shrinkage=3.0, last=2)

    trained = [{item for item, _, _ in history[:-1]} for history in histories]
    similar = np.zeros((ITEMS, ITEMS))
    for i in range(ITEMS):
        for j in range(ITEMS):
            if i != j:
                both = sum({i, j} <= items for items in trained)
                each = [sum(k in items for items in trained) for k in (i, j)]
                similar[i, j] = both / (np.sqrt(each[0] * each[1]) + 3.0)
    # Which of equally similar items are kept is open: rows where that matters are not compared.
    border = np.sort(similar, axis=1)[:, ::-1]
    clear = np.ones(ITEMS, bool) if neighbours >= ITEMS else border[:, neighbours - 1] > border[:, neighbours]
    for i in range(ITEMS):
        similar[i, similar[i] < border[i, min(neighbours, ITEMS) - 1]] = 0

    starts, ends = dataset.offsets[:-1], split.test.targets
    scores = knn(gather_histories(dataset.events, starts, ends, dataset.events.timestamps[ends], 50))
    compared = 0
    for user, history in enumerate(histories):
        read = [item for item, _, _ in history[:-1]][-2:]
        if clear[read].all():
            assert scores[user] == pytest.approx(similar[read].sum(axis=0), rel=1e-5)
            compared += 1
    assert compared >= 10


def test_item_knn_passes_over_tokens_of_other_kinds(tmp_path: Path) -> None:
    histories: list[list[Event]] = [[(item % ITEMS, 1, item) for item in range(user, user + 6)] for user in range(20)]
    dataset = write_dataset(tmp_path / "d", histories, range(ITEMS))
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    knn = ItemKNN(dataset, split, last=2)
    kinds = (
        TokenKind(name="age", context=True, values=("1",)),
        TokenKind(name="place", context=False, values=("a", "b")),
    )
    series = [[(2, 1, 0), (2, 2, 2 + user % 3 + user)] for user in range(20)]
    rich = add_side(dataset, kinds, [[1]] * 20, series)
    ends, times = split.test.targets, dataset.events.timestamps[split.test.targets]
    plain = user_histories(dataset, split.test.users, ends, times, 50)
    mixed = user_histories(rich, split.test.users, ends, times, 50)
    assert len(mixed.items) > len(plain.items) + 20
    np.testing.assert_array_equal(knn(mixed), knn(plain))
