"""What the gates judge by."""

from pathlib import Path

import numpy as np

from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.evaluation.gates import GateConfig
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.jobs.judge import _popularity_ranks, asked_of
from tests.support import write_dataset


def test_ranks_by_popularity_are_those_of_scoring_every_item_for_everybody(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    histories = [[(int(item), 1, step) for step, item in enumerate(rng.integers(0, 30, 12))] for _ in range(40)]
    dataset = write_dataset(tmp_path / "d", histories, range(30))
    queries = split_dataset(dataset, SplitInfo(protocol="global-time", time=6)).test
    counts = rng.integers(0, 8, 30).astype(np.float32)  # many are equal
    counts[rng.integers(0, 30, 5)] = -np.inf
    expected = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, 8):
        expected[batch.place] = rank_by_scores(batch, 30, lambda part: np.tile(counts, (part.stop - part.start, 1)))
    assert np.array_equal(_popularity_ranks(dataset, queries, 8, counts), expected)


def test_so_many_users_are_asked_that_scoring_the_catalogue_stays_bounded(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [[(0, 1, 1), (0, 1, 2), (1, 1, 9)]] * 3000, range(2))
    queries = split_dataset(dataset, SplitInfo(protocol="global-time", time=5)).test
    for most, items, expected in ((20_000, 2, 3000), (50, 2, 50), (20_000, 4_000_000, 2500), (20_000, 10**9, 1000)):
        asked = asked_of(queries, GateConfig(max_queries=most), items)
        assert len(asked) == expected
        assert (np.diff(asked.users) > 0).all()
        assert np.array_equal(asked.targets, queries.targets[asked.users])
