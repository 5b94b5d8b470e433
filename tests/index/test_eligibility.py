"""Filters, exclusions, additions and withdrawals together, on every backend and plan, against a float64 oracle."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.data.vocabulary import Vocabulary
from retrieval.errors import FilterError, InputError
from retrieval.index import codes_backend, exact, settle
from retrieval.index.attributes import Attributes
from retrieval.index.backend import Index
from retrieval.index.builder import build_index
from retrieval.index.filter import Compare, Filter, In, Missing, filter_from
from retrieval.index.planner import Costs
from retrieval.index.searcher import Searcher
from retrieval.index.side import Changes
from retrieval.index.spec import IndexSpec
from retrieval.types import Answers, Plan

WIDTH = 8
EXACT = IndexSpec()
SPECS = [
    EXACT,
    IndexSpec(factory="IVF4,Int8", search={"nprobe": 1}),
    IndexSpec(factory="SQfp16"),
    IndexSpec(factory="SQbf16"),
    IndexSpec(factory="IVF4,Flat", search={"nprobe": 1}),
    IndexSpec(factory="IVF4,SQ8", search={"nprobe": 1}),
    IndexSpec(factory="HNSW8", search={"efSearch": 8}),
    IndexSpec(factory="IVF4,PQ4x4fs,RFlat", search={"nprobe": 1, "k_factor_rf": 2}),
    IndexSpec(factory="IVF4,PQ4x4fsr,Refine(SQfp16)", search={"nprobe": 1, "k_factor_rf": 2}),
]
# Every index, and those of our own codes also as they are where there is no compiler.
BACKENDS = [
    *(pytest.param(spec, False, id=spec.factory) for spec in SPECS),
    *(pytest.param(spec, True, id=f"{spec.factory}-without-compiler") for spec in SPECS[:2]),
]
# Each makes one plan the cheapest wherever it is possible at all.
PREFERRING = {
    Plan.INDEX: Costs(search=1e-9, candidate=0, restricted=1, gather=1, score=1),
    Plan.SELECTOR: Costs(search=1, candidate=0, restricted=1e-9, gather=1, score=1),
    Plan.SCAN: Costs(search=1, candidate=1, restricted=math.inf, gather=0, score=1e-12),
}


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    x = rng.normal(size=shape).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)


def backend_over(vectors: NDArray[np.float32], spec: IndexSpec) -> Index:
    return build_index(vectors, spec)


def attributes_of(group: NDArray[np.int64]) -> Attributes:
    """`group` g, missing where g is negative."""
    return Attributes({"group": pa.array(group, mask=group < 0)}, len(group))


@dataclass
class Problem:
    """A catalogue of indexed and added items with their ids, a batch of queries, and who may get what."""

    vocabulary: Vocabulary
    vectors: NDArray[np.float32]
    group: NDArray[np.int64]
    indexed: int
    withdrawn: NDArray[np.int64]
    tie_rank: NDArray[np.int64]
    queries: NDArray[np.float32]
    ks: list[int]
    excluded: list[NDArray[np.int64]]
    filters: list[Filter | None]

    def searcher(self, spec: IndexSpec, costs: Costs) -> Searcher:
        backend = backend_over(self.vectors[: self.indexed], spec)
        base = Searcher(
            backend,
            np.arange(self.indexed),
            attributes=attributes_of(self.group[: self.indexed]),
            costs=costs,
        )
        changes = Changes(
            vectors=self.vectors[self.indexed :],
            withdrawn=self.withdrawn,
            attributes=attributes_of(self.group[self.indexed :]),
        )
        return base.with_changes(changes, self.tie_rank)

    def eligible(self, b: int) -> NDArray[np.bool_]:
        filter_ = self.filters[b]
        if filter_ is None:
            mask = np.ones(len(self.vectors), bool)
        elif isinstance(filter_, In):
            mask = np.isin(self.group, np.array(filter_.values))
        elif isinstance(filter_, Compare):
            mask = (self.group >= 0) & (self.group < int(filter_.value))  # type: ignore[arg-type]
        else:
            mask = self.group < 0
        mask[self.excluded[b]] = False
        mask[self.withdrawn] = False
        return mask

    def excluded_rows(self) -> list[NDArray[np.int64]]:
        return [self.vocabulary.rows_of(self.vocabulary.ids_of(rows)) for rows in self.excluded]

    def check(self, answers: Answers, spec: IndexSpec) -> None:
        for b, k in enumerate(self.ks):
            eligible = self.eligible(b)
            assert answers.eligible[b] == eligible.sum()
            count = min(k, int(eligible.sum()))
            rows, scores = answers.rows[b, :count], answers.scores[b, :count]
            assert (answers.rows[b, count:] == -1).all()
            assert np.isneginf(answers.scores[b, count:]).all()
            assert len(set(rows.tolist())) == count
            assert eligible[rows].all()
            assert not set(self.vocabulary.ids_of(rows)) & set(self.vocabulary.ids_of(self.excluded[b]))
            truth = self.vectors.astype(np.float64) @ self.queries[b].astype(np.float64)
            np.testing.assert_allclose(scores, truth[rows], atol=1e-6)
            places = np.lexsort((self.tie_rank[rows], -scores))
            assert places.tolist() == list(range(count))
            if spec == EXACT or answers.plans[b] == Plan.SCAN:
                best = np.sort(truth[eligible])[::-1][:count]
                np.testing.assert_allclose(scores, best, atol=1e-6)
                # Of items that are all alike, the first by tie rank.
                alike = np.flatnonzero(eligible & (self.vectors == self.vectors[0]).all(axis=1))
                answered = rows[np.isin(rows, alike)]
                first = alike[np.argsort(self.tie_rank[alike])][: len(answered)]
                assert answered.tolist() == first.tolist()


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    indexed, added = draw(st.integers(40, 200) | st.integers(600, 700)), draw(st.sampled_from([0, 0, 1, 5, 60]))
    total = indexed + added
    vectors = unit(rng, total, WIDTH)
    copies = draw(st.sampled_from([0, 3, total]))  # up to all items alike
    vectors[rng.integers(0, total, copies)] = vectors[0]
    ks = draw(st.lists(st.sampled_from([1, 3, 10, 50, 300]), min_size=1, max_size=6))
    possible = [
        None,
        In("group", (0,)),
        In("group", (1, 2)),
        In("group", (9,)),
        Compare("group", "<", 8),
        Missing("group"),
    ]
    kind = draw(st.sampled_from(["text", "integers"]))
    numbers = rng.choice(np.array([-(2**63), -5, 0, 2**53, 2**63 - 1 - total]), 1) + np.arange(total)
    ids = pa.array(rng.permutation(numbers) if kind == "integers" else [f"ÿ{number}" for number in numbers])
    # Group 9 holds one item, group 10 nearly all.
    group = rng.choice([-1, 0, 1, 2, 10], total, p=[0.05, 0.05, 0.1, 0.4, 0.4])
    group[rng.integers(0, total)] = 9
    return Problem(
        vocabulary=Vocabulary(ids),
        vectors=vectors,
        group=group,
        indexed=indexed,
        withdrawn=rng.permutation(total)[: draw(st.sampled_from([0, 0, 1, 20, total]))],
        tie_rank=rng.permutation(total),
        queries=unit(rng, len(ks), WIDTH),
        ks=ks,
        excluded=[rng.permutation(total)[: rng.choice([0, 0, 5, total // 2, total])] for _ in ks],
        filters=[possible[draw(st.integers(0, len(possible) - 1))] for _ in ks],
    )


@pytest.mark.parametrize("plan", Plan, ids=lambda plan: plan.name)
@pytest.mark.parametrize(("spec", "plain"), BACKENDS)
def test_answers_are_full_allowed_true_and_in_order(
    monkeypatch: pytest.MonkeyPatch, spec: IndexSpec, plain: bool, plan: Plan
) -> None:
    if plain:
        for module in (codes_backend, exact, settle):
            monkeypatch.setattr(module, "library", lambda: None)

    @settings(max_examples=25, deadline=None)
    @given(problem=problems())
    def check(problem: Problem) -> None:
        searcher = problem.searcher(spec, PREFERRING[plan])
        problem.check(searcher.search(problem.queries, problem.ks, problem.excluded_rows(), problem.filters), spec)

    check()


def catalogue(spec: IndexSpec, count: int = 4000, costs: Costs | None = None) -> tuple[Searcher, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    vectors = unit(rng, count, WIDTH)
    attributes = Attributes({"place": pa.array(np.arange(count))}, count)
    return Searcher(backend_over(vectors, spec), np.arange(count), attributes=attributes, costs=costs), vectors


@pytest.mark.parametrize("plan", Plan, ids=lambda plan: plan.name)
def test_the_cheapest_plan_answers_and_is_named(plan: Plan) -> None:
    searcher, vectors = catalogue(EXACT, costs=PREFERRING[plan])
    answers = searcher.search(vectors[:2], [10, 10], None, [filter_from("place < 2000")] * 2)
    assert answers.plans.tolist() == [plan, plan]
    assert (answers.rows < 2000).all()
    assert answers.eligible.tolist() == [2000, 2000]


@pytest.mark.parametrize("plan", Plan, ids=lambda plan: plan.name)
def test_one_survivor_is_found(plan: Plan) -> None:
    for spec in SPECS:
        searcher, vectors = catalogue(spec, costs=PREFERRING[plan])
        answers = searcher.search(vectors[:3], [5] * 3, None, [filter_from("place = 3777")] * 3)
        assert answers.rows[:, 0].tolist() == [3777] * 3
        assert answers.eligible.tolist() == [1] * 3


def test_a_selector_is_not_trusted_where_survivors_are_unlike_the_query() -> None:
    rng = np.random.default_rng(3)
    count = 4000
    vectors = unit(rng, count, WIDTH)
    query = unit(rng, 1, WIDTH)
    # The survivors are the half of the catalogue farthest from the query.
    far = (vectors @ query[0] < np.median(vectors @ query[0])).astype(np.int64)
    attributes = Attributes({"far": pa.array(far)}, count)
    spec = IndexSpec(factory="IVF64,Flat", search={"nprobe": 16})
    costs = PREFERRING[Plan.SELECTOR]
    searcher = Searcher(backend_over(vectors, spec), np.arange(count), attributes=attributes, costs=costs)
    answers = searcher.search(query, [100], None, [In("far", (1,))])
    assert answers.plans.tolist() == [Plan.SCAN]
    truth = np.sort(np.where(far == 1, vectors @ query[0], -np.inf))[::-1][:100]
    np.testing.assert_allclose(answers.scores[0], truth, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.factory)
def test_an_answer_does_not_depend_on_who_shares_the_batch(spec: IndexSpec) -> None:
    searcher, _ = catalogue(spec, costs=Costs(search=1e-4, candidate=1e-8, restricted=2e-4, gather=1e-8, score=1e-7))
    rng = np.random.default_rng(1)
    queries = unit(rng, 24, WIDTH)
    ks = rng.choice([1, 20, 100, 700], 24).tolist()
    excluded = [rng.permutation(4000)[: rng.choice([0, 10, 300, 3000])] for _ in ks]
    texts = [None, "place < 2500", "place >= 3000", "place < 100"]
    filters = [filter_from(text) if text else None for text in rng.choice(np.array(texts, object), 24)]
    together = searcher.search(queries, ks, excluded, filters)
    for b in range(24):
        alone = searcher.search(queries[b : b + 1], ks[b : b + 1], excluded[b : b + 1], filters[b : b + 1])
        assert alone.rows[0].tolist() == together.rows[b, : ks[b]].tolist()
        assert alone.scores[0].tolist() == together.scores[b, : ks[b]].tolist()
        assert alone.plans[0] == together.plans[b]


def test_costs_are_measured_where_they_are_not_given() -> None:
    searcher, vectors = catalogue(SPECS[1])
    answers = searcher.search(vectors[:8], [10] * 8, None, [filter_from("place < 3000")] * 8)
    assert (answers.rows < 3000).all()
    assert np.isfinite(searcher._planner.costs.search)


def test_changes_leave_the_searcher_that_they_were_made_from_as_it_was() -> None:
    searcher, vectors = catalogue(EXACT, 50)
    added = Attributes({"place": pa.array([77])}, 1)
    changes = Changes(vectors=vectors[3:4], withdrawn=np.array([4]), attributes=added)
    changed = searcher.with_changes(changes, np.arange(51)[::-1].copy())
    assert changed.search(vectors[3:4], [2]).rows[0].tolist() == [50, 3]  # alike, and the tie rank runs backwards
    assert 4 not in changed.search(vectors[4:5], [50]).rows
    assert changed.search(vectors[3:4], [9], None, [filter_from("place = 77")]).rows[0, :2].tolist() == [50, -1]
    assert searcher.search(vectors[4:5], [1]).rows[0].tolist() == [4]
    assert len(searcher) == 50
    assert len(changed) == 51


def test_added_items_do_not_stand_in_for_what_an_index_missed() -> None:
    rng = np.random.default_rng(4)
    vectors, query = unit(rng, 4000, WIDTH), unit(rng, 1, WIDTH)
    searcher = Searcher(backend_over(vectors, IndexSpec(factory="IVF64,Flat", search={"nprobe": 1})), np.arange(4000))
    others = unit(rng, 3000, WIDTH)
    worst = others[np.argsort(others @ query[0])[:300]]
    changes = Changes(vectors=worst, withdrawn=np.empty(0, np.int64))
    rows = searcher.with_changes(changes, np.arange(4300)).search(query, [200]).rows[0]
    assert (rows < 4000).all()


def test_added_items_must_have_the_attributes_of_the_others() -> None:
    searcher, vectors = catalogue(EXACT, 50)
    for attributes in (None, Attributes({"place": pa.array(["x"])}, 1)):
        changes = Changes(vectors=vectors[:1], withdrawn=np.empty(0, np.int64), attributes=attributes)
        with pytest.raises(InputError, match="added items: attribute 'place' must be of type int64"):
            searcher.with_changes(changes, np.arange(51))


def test_filters_that_cannot_be_asked_are_refused() -> None:
    searcher, vectors = catalogue(EXACT, 50)
    with pytest.raises(FilterError, match="attribute 'colour' is not known"):
        searcher.search(vectors[:2], [1, 1], None, [None, filter_from("colour = 'red'")])
    bare = Searcher(backend_over(vectors, EXACT), np.arange(50))
    for ask in (bare.check, lambda filter_: bare.search(vectors[:1], [1], None, [filter_])):
        with pytest.raises(FilterError, match="filter 'place = 1': the catalogue has no attributes"):
            ask(filter_from("place = 1"))
