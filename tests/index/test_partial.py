"""An index that leaves rows out answers like exact search over the others."""

import numpy as np
import pyarrow as pa
import pytest

from retrieval.index.attributes import Attributes
from retrieval.index.builder import build_index
from retrieval.index.filter import filter_from
from retrieval.index.partial import PartialBackend
from retrieval.index.planner import Costs
from retrieval.index.searcher import Searcher
from retrieval.index.side import Changes
from retrieval.index.spec import IndexSpec
from retrieval.types import Plan

N, D, K = 6000, 16, 20
NEVER = 1e9
COSTS = {
    Plan.INDEX: Costs(search=0, candidate=0, restricted=NEVER, gather=NEVER, score=NEVER),
    Plan.SELECTOR: Costs(search=NEVER, candidate=NEVER, restricted=0, gather=NEVER, score=NEVER),
    Plan.SCAN: Costs(search=NEVER, candidate=NEVER, restricted=NEVER, gather=0, score=0),
}


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    drawn = rng.standard_normal((count, D)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.parametrize("plan", list(COSTS), ids=lambda plan: plan.name)
@pytest.mark.parametrize("spec", [IndexSpec(), IndexSpec(factory="IVF16,Flat", search={"nprobe": 16})], ids=str)
@pytest.mark.parametrize("filtered", [False, True])
def test_retired_rows_are_never_answers_and_all_others_are_found(plan: Plan, spec: IndexSpec, filtered: bool) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, N), unit(rng, 5)
    served, group = rng.random(N) < 0.6, rng.integers(0, 2, N)
    backend = PartialBackend(build_index(vectors[served], spec), vectors, np.flatnonzero(served))
    attributes = Attributes({"group": pa.array(group)}, N)
    retired = np.flatnonzero(~served)
    searcher = Searcher(backend, np.arange(N), attributes=attributes, retired=retired, costs=COSTS[plan])
    excluded = [np.flatnonzero(served)[:3], retired[:5], *[np.empty(0, np.int64)] * 3]
    filters = [filter_from("group = 1") if filtered else None] * 5
    withdrawn = np.flatnonzero(served)[10:12]
    changed = searcher.with_changes(
        Changes(vectors=np.empty((0, D), np.float32), withdrawn=withdrawn, attributes=None), np.arange(N)
    )
    for one, lost in ((searcher, withdrawn[:0]), (changed, withdrawn)):
        found = one.search(queries, [K] * 5, excluded, filters)
        for b, rows in enumerate(found.rows):
            eligible = served & ((group == 1) | (not filtered))
            eligible[excluded[b]] = eligible[lost] = False
            scores = np.where(eligible, vectors @ queries[b], -np.inf)
            assert found.eligible[b] == eligible.sum()
            assert rows.tolist() == np.argsort(-scores, kind="stable")[:K].tolist()
    assert not searcher.meets(None, retired).any()


def test_a_bitmap_is_translated_once_and_forgotten_with_it() -> None:
    rng = np.random.default_rng(1)
    vectors, query, served = unit(rng, N), unit(rng, 1), rng.random(N) < 0.6
    backend = PartialBackend(build_index(vectors[served], IndexSpec()), vectors, np.flatnonzero(served))
    for _ in range(20):  # later bitmaps may lie where earlier ones did
        mask = rng.random(N) < 0.3
        bitmap = np.packbits(mask, bitorder="little")
        expected = np.argsort(np.where(mask & served, -(vectors @ query[0]), np.inf))[:K]
        for _ in range(2):
            assert backend.search(query, K, allowed=bitmap).rows[0].tolist() == expected.tolist()
            assert len(backend._inner_bitmaps) == 1
        del bitmap
    assert not backend._inner_bitmaps
