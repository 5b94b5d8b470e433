"""Stochastic length against its formula, and against the sparsity that the paper reports."""

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.data.sequences import gather_training
from retrieval.data.stochastic_length import keep_tokens, stochastic_length
from retrieval.types import EventColumns


def rows(lengths: list[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths])


def kept_lengths(offsets: NDArray[np.int64], max_length: int, alpha: float, seed: int = 0) -> NDArray[np.int64]:
    times = np.zeros(offsets[-1], np.int64)
    kept = stochastic_length(offsets, times, max_length, alpha, np.random.default_rng(seed))
    assert (np.diff(kept) > 0).all()
    return np.diff(np.searchsorted(kept, offsets))


def test_rows_up_to_the_limit_are_whole_and_longer_ones_have_its_length_or_their_own() -> None:
    lengths = [0, 1, 255, 256, *[257] * 50, *[1024] * 400]
    kept = kept_lengths(rows(lengths), max_length=1024, alpha=1.6)  # the limit is 1024^0.8 = 256
    assert kept[:4].tolist() == [0, 1, 255, 256]
    assert set(kept[4:54].tolist()) <= {256, 257}
    assert set(kept[54:].tolist()) == {256, 1024}


@pytest.mark.parametrize("length", [300, 512, 1024])
def test_a_long_row_is_whole_with_the_probability_of_the_formula(length: int) -> None:
    kept = kept_lengths(rows([length] * 3000), max_length=1024, alpha=1.6)
    expected = 1024**1.6 / length**2
    assert np.mean(kept == length) == pytest.approx(expected, abs=4 * np.sqrt(expected / 3000))


def test_tokens_are_drawn_by_recency() -> None:
    """Two of three tokens at ages 8, 4 and 0: weights 1/3, 2/3 and 1, which sum to 2."""
    seen = np.zeros(3)
    times = np.tile(np.array([0, 4, 8]), 20_000)
    kept = stochastic_length(rows([3] * 20_000), times, 4, 1.0, np.random.default_rng(0))  # the limit is 2
    offsets = rows([3] * 20_000)
    thinned = np.diff(np.searchsorted(kept, offsets)) == 2
    for place in range(3):
        seen[place] = np.isin(offsets[:-1] + place, kept)[thinned].mean()
    w = np.array([1 / 3, 2 / 3, 1])
    # Drawn first, or second after either of the others.
    exact = [w[i] / 2 + sum(w[j] / 2 * w[i] / (2 - w[j]) for j in range(3) if j != i) for i in range(3)]
    assert seen == pytest.approx(exact, abs=0.02)


def test_the_first_of_two_tokens_has_weight_zero_and_goes() -> None:
    times = np.tile(np.array([0, 9]), 200)
    offsets = rows([2] * 200)
    kept = stochastic_length(offsets, times, 1, 1.5, np.random.default_rng(0))
    first = np.isin(offsets[:-1], kept)
    assert first.any()  # whole rows
    assert (np.diff(np.searchsorted(kept, offsets))[first] == 2).all()


# Of sequences padded to N: what the paper's table on stochastic length says.
PUBLISHED = {(1.6, 1024): 71.5, (1.6, 2048): 76.1, (1.6, 4096): 80.5, (1.8, 1024): 40.2, (1.8, 2048): 45.3}


@pytest.mark.parametrize(("alpha", "max_length"), PUBLISHED)
def test_sparsity_is_near_the_published_table(alpha: float, max_length: int) -> None:
    """The paper's lengths are not known; these have, at α = 2 where nothing is thinned, the sparsity of its table."""
    rng = np.random.default_rng(0)
    lengths = np.interp(rng.random(600), [0, 0.108, 0.860, 0.938, 1], [4779, 4096, 2048, 1024, 1])
    offsets = rows(np.minimum(lengths.round().astype(int), max_length).tolist())
    kept = kept_lengths(offsets, max_length, alpha, seed=1)
    assert 100 * (1 - kept.mean() / max_length) == pytest.approx(PUBLISHED[alpha, max_length], abs=4)


def test_a_token_that_stays_keeps_its_target_and_query_time() -> None:
    events = EventColumns(
        items=np.arange(9), actions=np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], np.uint8), timestamps=np.arange(9) * 10
    )
    starts, ends = np.array([0, 4]), np.array([4, 9])
    whole = gather_training(events, starts, ends, np.array([0, 1], np.float32), 10)
    thin = keep_tokens(whole, np.array([0, 1, 4]))
    assert thin.inputs.offsets.tolist() == [0, 2, 3]
    assert thin.inputs.items.tolist() == [0, 1, 5]
    assert thin.targets.tolist() == [1, 2, 6]
    assert thin.weights.tolist() == [1, 0, 0]
    assert thin.inputs.query_times.tolist() == [10, 20, 60]
