"""Long rows, shortened for reading: which tokens stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.types import JaggedBatch


def rows(*kinds: list[int]) -> JaggedBatch:
    """Rows of the given kinds; every field tells a token's place in all rows."""
    flat = np.array([kind for row in kinds for kind in row], np.int64)
    place = np.arange(len(flat))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in kinds])]).astype(np.int64)
    return JaggedBatch(offsets=offsets, items=place, actions=place, timestamps=place, query_times=place + 1, kinds=flat)


def test_the_latest_stay_or_half_of_them_and_evenly_spaced_older_ones() -> None:
    batch = rows([0] * 3, [0] * 20)
    latest = batch.shortened(8, spread=False)
    assert latest.offsets.tolist() == [0, 3, 11]
    assert latest.items.tolist() == [0, 1, 2, *range(15, 23)]
    spread = batch.shortened(8, spread=True)
    assert spread.items.tolist() == [0, 1, 2, 5, 9, 13, 17, 19, 20, 21, 22]
    assert spread.query_times.tolist() == (spread.items + 1).tolist()


def test_what_stands_beside_the_events_stays() -> None:
    batch = rows([1, 2, 0, 0, 3, 0, 0, 0, 3])
    assert batch.shortened(6, spread=False).items.tolist() == [0, 1, 4, 6, 7, 8]
    assert batch.shortened(2, spread=True).items.tolist() == [0, 1, 4, 7, 8]
    assert rows([1, 1, 3]).shortened(2, spread=True).items.tolist() == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), max_size=40), max_size=4), st.integers(1, 30), st.booleans())
def test_rows_are_as_long_as_they_may_be_and_end_where_they_did(
    kinds: list[list[int]], length: int, spread: bool
) -> None:
    batch = rows(*kinds)
    short = batch.shortened(length, spread=spread)
    assert short.kinds is not None
    assert (np.diff(short.items) > 0).all()
    for row, before in enumerate(kinds):
        part = slice(int(short.offsets[row]), int(short.offsets[row + 1]))
        beside = sum(kind > 0 for kind in before)
        expected = len(before) if len(before) <= length else max(length, beside + min(1, len(before) - beside))
        assert part.stop - part.start == expected
        if before:
            assert short.items[part.stop - 1] == batch.offsets[row + 1] - 1
    again = short.shortened(length, spread=spread)
    assert again.items.tolist() == short.items.tolist()


@pytest.mark.parametrize("spread", [False, True])
def test_a_row_of_one_token_keeps_the_last_event(spread: bool) -> None:
    assert rows([0] * 9).shortened(1, spread=spread).items.tolist() == [8]
