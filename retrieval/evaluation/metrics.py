"""Metrics of a ranking with one item to find per query, and their confidence intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.config import Config

__all__ = ["Estimate", "evaluate_ranks"]

_RESAMPLES = 1000
_LEVEL = (0.025, 0.975)


class Estimate(Config):
    """A mean over users with its 95% interval (percentile bootstrap over users)."""

    mean: float
    low: float
    high: float


def evaluate_ranks(ranks: NDArray[np.int64], ks: Sequence[int], *, seed: int = 0) -> dict[str, Estimate]:
    """Metrics of the ranks at which the held-out items were found.

        recall@K = 1[rank ≤ K]  (with one item to find, also called HR@K or hit rate)
        NDCG@K   = 1[rank ≤ K] / log2(rank + 1)
        MRR      = 1 / rank

    each averaged over users.

    Args:
        ranks: 1 is best, int64 `[Q]`, Q ≥ 1; an item that was not found at all has a rank beyond every K.
        ks: depths K.
        seed: of the bootstrap.
    """
    # A user counts only through its rank, so resampling users is resampling how often each rank occurs: the same
    # distribution, at a cost that does not grow with the number of users.
    values, counts = np.unique(ranks, return_counts=True)
    per_rank = {}
    for k in ks:
        per_rank[f"recall@{k}"] = (values <= k).astype(float)
    for k in ks:
        per_rank[f"ndcg@{k}"] = (values <= k) / np.log2(values + 1.0)
    per_rank["mrr"] = 1.0 / values
    table = np.stack(list(per_rank.values()), axis=1)
    total = len(ranks)
    resampled = np.random.default_rng(seed).multinomial(total, counts / total, size=_RESAMPLES) @ table / total
    means = counts @ table / total
    lows, highs = np.quantile(resampled, _LEVEL, axis=0)
    return {
        name: Estimate(mean=float(mean), low=float(low), high=float(high))
        for name, mean, low, high in zip(per_rank, means, lows, highs, strict=True)
    }
