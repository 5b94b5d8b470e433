import math

import numpy as np
import pytest

from retrieval.evaluation.metrics import evaluate_ranks


def test_metrics_of_a_hand_computed_table() -> None:
    metrics = evaluate_ranks(np.array([1, 3, 10, 11]), ks=(1, 10))
    assert metrics["recall@1"].mean == 1 / 4
    assert metrics["recall@10"].mean == 3 / 4
    assert metrics["ndcg@1"].mean == 1 / 4
    assert metrics["ndcg@10"].mean == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 4)
    assert metrics["mrr"].mean == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 4)


def test_intervals_agree_with_resampling_users_one_by_one() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.geometric(0.05, 500)
    estimate = evaluate_ranks(ranks, ks=(10,))["ndcg@10"]
    per_user = (ranks <= 10) / np.log2(ranks + 1)
    means = per_user[rng.integers(0, 500, (4000, 500))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    assert estimate.low == pytest.approx(low, abs=0.15 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.15 * (high - low))
    assert estimate.low < estimate.mean < estimate.high


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Ranks uniform on 1…100: recall@10 is 0.1."""
    rng = np.random.default_rng(1)
    runs = [evaluate_ranks(rng.integers(1, 101, 400), ks=(10,))["recall@10"] for _ in range(200)]
    covered = np.mean([run.low <= 0.1 <= run.high for run in runs])
    assert 0.90 <= covered <= 0.99
