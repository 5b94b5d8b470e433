"""Verdicts of the gates on figures whose answer is known."""

import numpy as np
import pytest

from retrieval.evaluation.gates import GateConfig, at_least, at_most, not_worse, paired_difference

CONFIG = GateConfig(worse_by=0.02, min_queries=50)


def hits(share: float, users: int = 2000, seed: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return (np.random.default_rng(seed).random(users) < share).astype(float)


@pytest.mark.parametrize(
    ("ours", "passed"),
    [(0.6, True), (0.5, True), (0.47, True), (0.3, False)],
    ids=["better", "same", "within noise", "worse"],
)
def test_only_what_is_worse_for_certain_is_refused(ours: float, passed: bool) -> None:
    result = not_worse("recall@50", hits(ours, seed=1), hits(0.5), "the live snapshot", CONFIG)
    assert result.passed is passed
    assert "the live snapshot" in result.note


def test_few_users_do_not_refuse_and_the_note_says_so() -> None:
    result = not_worse("recall@50", np.zeros(49), np.ones(49), "the live snapshot", CONFIG)
    assert result.passed
    assert "too few users" in result.note
    assert not not_worse("recall@50", np.zeros(50), np.ones(50), "the live snapshot", CONFIG).passed


def test_pairs_make_the_interval_narrow() -> None:
    ours = hits(0.5)
    theirs = ours.copy()
    theirs[:20] = 1 - theirs[:20]
    difference = paired_difference(ours, theirs)
    assert difference.mean == pytest.approx((ours - theirs).mean())
    assert difference.high - difference.low < 0.01
    apart = paired_difference(ours, hits(0.5, seed=2))
    assert apart.high - apart.low > 0.03


def test_limits_include_themselves_and_refuse_what_is_not_a_number() -> None:
    assert at_least("x", 0.5, 0.5, "").passed
    assert not at_least("x", 0.49, 0.5, "").passed
    assert not at_least("x", float("nan"), 0.5, "").passed
    assert at_most("x", 0.5, 0.5, "").passed
    assert not at_most("x", 0.51, 0.5, "").passed
