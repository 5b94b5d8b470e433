"""Gates: what a rebuilt snapshot must show before it may replace the live one. Figures in, verdicts out."""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.evaluation.metrics import Estimate

__all__ = ["GateConfig", "GateResult", "at_least", "at_most", "not_worse", "paired_difference"]

_RESAMPLES = 1000
_LEVEL = (0.025, 0.975)


class GateConfig(Config):
    """Limits. The defaults refuse what is broken, not what is a little different.

    Attributes:
        k: depth of recall and NDCG on the held-out interval.
        worse_by: how much worse than its rival, as a share of the rival's figure, the candidate may be for certain:
            refused is one whose difference's whole 95% interval lies below that.
        max_queries: users with a held-out event that are asked at most, a random sample of them.
        min_queries: users with a held-out event below which recall and NDCG are reported but do not refuse.
        min_ann_recall: of the index against exact search, recall@100.
        min_catalogue: items, as a share of the live snapshot's.
        min_coverage: items that come up in the first 100 answers of a sample of users, as a share of the live one's.
        min_overlap: of a sample of users' first 100 answers with the live snapshot's.
        max_search_ms: median time of a single search.
    """

    k: int = Field(default=50, ge=1)
    worse_by: float = Field(default=0.02, ge=0, lt=1)
    max_queries: int = Field(default=20_000, ge=1)
    min_queries: int = Field(default=200, ge=1)
    min_ann_recall: float = Field(default=0.95, ge=0, le=1)
    min_catalogue: float = Field(default=0.8, ge=0)
    min_coverage: float = Field(default=0.2, ge=0)
    min_overlap: float = Field(default=0.02, ge=0, le=1)
    max_search_ms: float = Field(default=100.0, gt=0)


class GateResult(Config):
    """One gate's verdict.

    Attributes:
        gate: its name.
        passed: whether the candidate may be published as far as this gate goes.
        figure: what was measured.
        limit: what it was held against.
        note: one sentence for people.
    """

    gate: str
    passed: bool
    figure: float
    limit: float
    note: str


def at_least(gate: str, figure: float, limit: float, note: str) -> GateResult:
    """Passes from `limit` up; a figure that is not a number never does."""
    # Not a number does not go into a report: JSON has none.
    shown = figure if np.isfinite(figure) else -1.0
    return GateResult(gate=gate, passed=bool(figure >= limit), figure=shown, limit=limit, note=note)


def at_most(gate: str, figure: float, limit: float, note: str) -> GateResult:
    """Passes up to `limit`."""
    return GateResult(gate=gate, passed=bool(figure <= limit), figure=figure, limit=limit, note=note)


def paired_difference(ours: NDArray[np.float64], theirs: NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """Mean of ours − theirs over the same users `[Q]`, with its 95% interval (percentile bootstrap over users)."""
    differences = ours - theirs
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, _LEVEL)
    return Estimate(mean=float(differences.mean()), low=float(low), high=float(high))


def not_worse(
    gate: str, ours: NDArray[np.float64], theirs: NDArray[np.float64], rival: str, config: GateConfig
) -> GateResult:
    """Refuses what is worse than its rival for certain: see `GateConfig.worse_by`.

    Args:
        gate: name of the figure, for instance "recall@50".
        ours: the candidate's figure of each user, `[Q]`.
        theirs: the rival's, of the same users.
        rival: what the rival is.
        config: limits.
    """
    difference = paired_difference(ours, theirs)
    limit = -config.worse_by * float(theirs.mean())
    note = (
        f"{ours.mean():.4f} against {theirs.mean():.4f} of {rival}, difference {difference.mean:+.4f} "
        f"[{difference.low:+.4f}, {difference.high:+.4f}] over {len(ours):,} users"
    )
    passed = difference.high >= limit
    if len(ours) < config.min_queries:
        passed, note = True, f"{note}: too few users to judge"
    return GateResult(gate=gate, passed=passed, figure=difference.mean, limit=limit, note=note)
