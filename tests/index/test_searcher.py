"""Every index against a float64 oracle, ties compared as ties."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.index.builder import build_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.types import SearchResult

EXACT = IndexSpec()
# So few probes that answers come up short on their own: the searcher must fill them.
APPROXIMATE = [
    IndexSpec(factory="IVF16,Int8", search={"nprobe": 1}),
    IndexSpec(factory="IVF16,Flat", search={"nprobe": 1}),
    IndexSpec(factory="HNSW8", search={"efSearch": 8}),
    IndexSpec(factory="IVF16,SQ8", search={"nprobe": 2}),
]


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    x = rng.normal(size=shape).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)


def searcher_over(vectors: NDArray[np.float32], spec: IndexSpec) -> Searcher:
    return Searcher(build_index(vectors, spec), np.arange(len(vectors)))


def assert_oracle(
    result: SearchResult,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    ks: list[int],
    excluded: list[NDArray[np.int64]],
) -> None:
    """Answers are full, allowed, distinct, in order, and no better item was left out."""
    for b, (k, without) in enumerate(zip(ks, excluded, strict=True)):
        scores = vectors.astype(np.float64) @ queries[b].astype(np.float64)
        scores[without] = -np.inf
        wanted = min(k, len(vectors) - len(without))
        rows = result.rows[b]
        assert (rows[:wanted] >= 0).all()
        assert (rows[wanted:] == -1).all()
        assert len(set(rows[:wanted].tolist())) == wanted
        assert not set(rows[:wanted].tolist()) & set(without.tolist())
        np.testing.assert_allclose(result.scores[b, :wanted], np.sort(scores)[::-1][:wanted], atol=2e-6)
        np.testing.assert_allclose(result.scores[b, :wanted], scores[rows[:wanted]], atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    items=st.integers(1, 60),
    ks=st.lists(st.integers(1, 80), min_size=1, max_size=6),
    repeats=st.integers(0, 30),
    seed=st.integers(0, 10_000),
)
def test_exact_answers_equal_the_oracle(items: int, ks: list[int], repeats: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(rng, items, 7)
    vectors[rng.integers(0, items, repeats)] = vectors[0]  # equal vectors, so equal scores
    queries = unit(rng, len(ks), 7)
    excluded = [rng.permutation(items)[: rng.integers(0, items + 1)] for _ in ks]
    assert_oracle(searcher_over(vectors, EXACT).search(queries, ks, excluded), vectors, queries, ks, excluded)


@pytest.mark.parametrize("spec", APPROXIMATE, ids=str)
def test_an_approximate_index_still_gives_full_and_allowed_answers(spec: IndexSpec) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 700, 16), unit(rng, 40, 16)
    excluded = [rng.permutation(700)[: rng.choice([0, 5, 300, 650, 699, 700])] for _ in queries]
    ks = [int(k) for k in rng.choice([1, 10, 100, 700, 1000], len(queries))]
    result = searcher_over(vectors, spec).search(queries, ks, excluded)
    for b, (k, without) in enumerate(zip(ks, excluded, strict=True)):
        answered = result.rows[b][result.rows[b] >= 0].tolist()
        assert len(answered) == len(set(answered)) == min(k, 700 - len(without))
        assert not set(answered) & set(without.tolist())
        assert (np.diff(result.scores[b, : len(answered)]) <= 0).all()


@pytest.mark.parametrize("spec", [EXACT, APPROXIMATE[0]], ids=str)
def test_equal_scores_come_in_the_order_of_the_tie_rank(spec: IndexSpec) -> None:
    rng = np.random.default_rng(1)
    vectors = unit(rng, 200, 8)
    twins = np.array([5, 50, 100, 150, 199])
    vectors[twins] = vectors[5]
    rank = rng.permutation(200)
    searcher = Searcher(build_index(vectors, spec), rank)
    expected = twins[np.argsort(rank[twins])]
    for k in (1, 2, 4, 5):
        assert searcher.search(vectors[5:6], [k]).rows[0].tolist() == expected[:k].tolist()


def test_one_batch_may_ask_for_different_depths() -> None:
    rng = np.random.default_rng(2)
    vectors, queries = unit(rng, 50, 8), unit(rng, 3, 8)
    searcher = searcher_over(vectors, EXACT)
    together = searcher.search(queries, [3, 50, 1])
    for b, k in enumerate([3, 50, 1]):
        assert together.rows[b, :k].tolist() == searcher.search(queries[b : b + 1], [k]).rows[0].tolist()
    assert (together.rows[0, 3:] == -1).all()
    assert np.isneginf(together.scores[0, 3:]).all()


def test_no_queries_give_no_answers() -> None:
    searcher = searcher_over(unit(np.random.default_rng(0), 5, 4), EXACT)
    assert searcher.search(np.empty((0, 4), np.float32), []).rows.shape == (0, 0)


def test_a_searcher_that_is_let_go_lets_go_of_its_index_at_once() -> None:
    vectors = unit(np.random.default_rng(5), 3000, 8)
    searcher = searcher_over(vectors, EXACT)
    searcher.search(vectors[:3], [10] * 3, [np.arange(700)] * 3)
    index = weakref.ref(searcher._backend)
    gc.disable()  # a snapshot's memory must not wait for the collector
    try:
        del searcher
        assert index() is None
    finally:
        gc.enable()
