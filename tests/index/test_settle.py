"""The compiled settling of answers does what its reference does, and scores an item the same whoever found it."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.index.builder import build_index
from retrieval.index.codes import library
from retrieval.index.searcher import Searcher
from retrieval.index.settle import Excluded, Fetched, Goal, Table, settle, settle_reference
from retrieval.index.spec import IndexSpec
from retrieval.types import Answers

Settled = tuple[list[bool], list[list[int]], list[list[float]]]
WIDTH = 20


def fetched(rng: np.random.Generator, scores: NDArray[np.float32], share: float, noise: float) -> Fetched:
    """Some of the items, best first by scores that may be a little off."""
    count = scores.shape[1]
    width = max(1, int(share * count))
    off = (scores + noise * rng.normal(size=scores.shape)).astype(np.float32)
    rows = np.argsort(-off, axis=1, kind="stable")[:, :width]
    found = np.take_along_axis(off, rows, axis=1)
    short = rng.choice([0, 0, 3])  # places that the index did not fill
    if short:
        rows[:, -short:], found[:, -short:] = -1, -np.inf
    return Fetched(rows.astype(np.int64), found, width == count)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 150),
    added=st.sampled_from([0, 0, 1, 30]),
    share=st.sampled_from([0.2, 0.7, 1.0]),
    noise=st.sampled_from([0.0, 0.0, 0.4]),
    check=st.booleans(),
    most_excluded=st.sampled_from([0, 3, 100]),
)
def test_compiled_and_reference_settle_the_same(
    seed: int, count: int, added: int, share: float, noise: float, check: bool, most_excluded: int
) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(seed)
    batch = 5
    # Small whole numbers: their products are exact, and many are equal.
    vectors, queries = (rng.integers(-1, 2, (rows, WIDTH)).astype(np.float32) for rows in (count + added, batch))
    vectors[:, 3:] = 0
    table = Table(vectors[:count], vectors[count:], rng.permutation(count + added))
    members = np.flatnonzero(rng.random(batch) < 0.8)
    true = queries[members] @ vectors.T
    index = fetched(rng, true[:, :count], share, noise) if rng.random() < 0.9 else None
    extra = fetched(rng, true[:, count:], share, 0.0) if added else None
    excluded = [rng.permutation(count + added)[: rng.integers(0, most_excluded + 1)] for _ in range(batch)]
    wanted = rng.integers(1, 12, batch)
    goal = Goal(
        queries=queries,
        wanted=wanted,
        from_index=np.minimum(wanted, rng.integers(0, 12, batch)),
        excluded=Excluded.of(excluded),
        allowed=np.packbits(rng.random(count) < 0.7, bitorder="little"),
    )

    def settled(by: Callable[..., NDArray[np.bool_]]) -> Settled:
        answers = Answers(
            rows=np.full((batch, 12), -1, np.int64),
            scores=np.full((batch, 12), -np.inf, np.float32),
            plans=np.zeros(batch, np.int8),
            eligible=np.zeros(batch, np.int64),
        )
        flags = by(table, goal, members, index, extra, check, noise == 0, answers)
        return flags.tolist(), answers.rows.tolist(), answers.scores.tolist()

    assert settled(settle) == settled(settle_reference)


def test_exclusions_are_counted_among_the_rows_of_a_bitmap() -> None:
    lost = Excluded.of([np.array([1, 2, 9]), np.empty(0, np.int64), np.array([4, 12])])
    assert lost is not None
    even = np.packbits(np.arange(10) % 2 == 0, bitorder="little")
    assert lost.count(even, 0, 10).tolist() == [1, 0, 1]
    assert lost.count(np.packbits(np.ones(5, bool), bitorder="little"), 10, 15).tolist() == [0, 0, 1]
    assert Excluded.of(None) is None
    assert Excluded.of([np.empty(0, np.int64)] * 3) is None


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Int8", "IVF8,Flat", "HNSW8"])
def test_an_item_has_one_score_whichever_way_finds_it(factory: str) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(3000, 50)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    searcher = Searcher(build_index(vectors, IndexSpec(factory=factory)), np.arange(len(vectors)))
    for query in vectors[:20]:
        asked, scanned = (searcher.search(query[None], [40], exact=exact) for exact in (False, True))
        of = dict(zip(scanned.rows[0].tolist(), scanned.scores[0].tolist(), strict=True))
        found = dict(zip(asked.rows[0].tolist(), asked.scores[0].tolist(), strict=True))
        common = found.keys() & of.keys()
        assert common
        assert {row: found[row] for row in common} == {row: of[row] for row in common}
