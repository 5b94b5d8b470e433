"""Stochastic length: long histories are thinned at random in training (arXiv 2402.17152, section 3.2, equation 4).

Attention costs n² for a history of n tokens. With N the most tokens read and 1 < α ≤ 2, a history is kept whole if
n ≤ N^(α/2), else with probability N^α / n²; otherwise N^(α/2) of its tokens are drawn without replacement by weights

    w_i = 1 − f_i / Σ_j f_j,    f_i = t_n − t_i,

so that recent tokens are likelier to stay. The expected cost of a row is then at most 2·N^α in place of N². A token
that stays keeps its own target and query time, which are the true ones; what it sees of its past is thinner.
"""

import numpy as np
from numpy.typing import NDArray

from retrieval.data.sequences import TrainingBatch

__all__ = ["keep_tokens", "stochastic_length"]


def stochastic_length(
    offsets: NDArray[np.int64],
    timestamps: NDArray[np.int64],
    max_length: int,
    alpha: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Choose the tokens that stay.

    Args:
        offsets: of the rows, int64 `[B + 1]`.
        timestamps: seconds, never falling within a row, int64 `[T]`.
        max_length: N.
        alpha: α.
        rng: every random choice; its state and the arguments decide the result.

    Returns:
        Index of each token that stays, ascending, int64 `[T']`.
    """
    # The margin is for powers that are whole numbers but for rounding: 1024^0.8 is 256.
    limit = int(max_length ** (alpha / 2) + 1e-9)
    lengths = np.diff(offsets)
    whole = rng.random(len(lengths)) * lengths.astype(np.float64) ** 2 < max_length**alpha
    stays = np.ones(offsets[-1], bool)
    for row in np.flatnonzero((lengths > limit) & ~whole):
        start, end = offsets[row], offsets[row + 1]
        stays[start:end] = False
        stays[start + _draw(timestamps[start:end], limit, rng)] = True
    return np.flatnonzero(stays)


def _draw(timestamps: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw places one after another by weight, without replacement.

    The order of E_i / w_i with E_i exponential is that of such draws (Efraimidis, Spirakis: "Weighted random sampling
    with a reservoir", 2006).
    """
    ages = (timestamps[-1] - timestamps).astype(np.float64)
    total = ages.sum()
    weights = 1 - ages / total if total else np.ones(len(ages))
    keys = np.full(len(ages), np.inf)
    np.divide(rng.standard_exponential(len(ages)), weights, out=keys, where=weights > 0)
    return np.argpartition(keys, count - 1)[:count]


def keep_tokens(batch: TrainingBatch, kept: NDArray[np.int64]) -> TrainingBatch:
    """The batch reduced to some of its tokens, ascending int64 `[T']`, each with its own target and query time."""
    inputs = batch.inputs
    return TrainingBatch(
        inputs=inputs.mapped(np.searchsorted(kept, inputs.offsets).astype(np.int64), lambda tokens: tokens[kept]),
        targets=batch.targets[kept],
        weights=batch.weights[kept],
    )
