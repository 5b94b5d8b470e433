"""Which plan is taken when, by costs given by hand."""

import copy
import math

import numpy as np
import pytest

from retrieval.index.backend import Index
from retrieval.index.builder import build_index
from retrieval.index.planner import Costs, Planner, Step, depth_class
from retrieval.index.spec import IndexSpec
from retrieval.types import Plan

COUNT = 10_000
# In microseconds; a scanned survivor costs 0.1 + 0.8 / 8 = 0.2.
COSTS = Costs(search=200, candidate=0.5, restricted=210, gather=0.8, score=0.1)


@pytest.fixture(scope="module")
def backend() -> Index:
    vectors = np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32)
    return build_index(vectors, IndexSpec(factory="IVF100,Int8"))


@pytest.fixture(scope="module")
def exact(backend: Index) -> Index:
    return build_index(backend.vectors, IndexSpec())


def test_depths_are_rounded_up_to_classes() -> None:
    needs = np.array([0, 1, 128, 129, 256, 257, 2048, 2049])
    assert depth_class(needs).tolist() == [128, 128, 128, 256, 256, 512, 2048, 4096]


@pytest.mark.parametrize(
    ("need", "survivors", "plan"),
    [
        (128, COUNT, Plan.INDEX),
        (512, COUNT, Plan.INDEX),
        (128, 9500, Plan.INDEX),  # depth 146, effort 1.07: 287 against 288 of a selector and 1,900 of a scan
        (128, 5000, Plan.SELECTOR),  # depth 320, effort 1.58: 396 against 476 and 1,000
        (128, 1500, Plan.SCAN),  # 300
        (128, 1, Plan.SCAN),
        (128, 0, Plan.SCAN),
    ],
)
def test_the_plan_follows_from_the_costs(backend: Index, need: int, survivors: int, plan: Plan) -> None:
    assert Planner(backend, COSTS).first(need, survivors).plan is plan


def test_effort_grows_with_the_root_of_the_depth_and_then_with_the_depth(backend: Index) -> None:
    cheap = Costs(search=1e-9, candidate=0, restricted=math.inf, gather=1, score=1)
    planner = Planner(backend, cheap)
    efforts = [planner.first(need, COUNT).effort for need in (128, 512, 2048, 8192)]
    assert efforts == [1, 2, 4, 64]


def test_a_search_that_fell_short_goes_four_times_deeper_and_then_scans(backend: Index) -> None:
    cheap = Costs(search=1e-9, candidate=0, restricted=math.inf, gather=1, score=1)
    planner = Planner(backend, cheap)
    step = planner.first(128, 8000)
    fetches = []
    while step.plan is Plan.INDEX:
        fetches.append(step.fetch)
        step = planner.after(step, 128, 8000)
    assert fetches == [fetches[0] * 4**n for n in range(len(fetches))]
    assert len(fetches) == 3  # 186, 744, 2,976; 11,904 is more than the catalogue
    assert step == Step(plan=Plan.SCAN, fetch=128)
    assert planner.after(step, 128, 8000).fetch == 128 * 16
    assert planner.after(planner.after(step, 128, 8000), 128, 8000).fetch == 8000


def test_an_exact_index_needs_no_more_effort_however_deep(exact: Index) -> None:
    # Nor can a selector's answer lie too deep: without that, its cost would be 200 · √(320 / 128) here.
    planner = Planner(exact, Costs(search=200, candidate=0.5, restricted=210, gather=0.8, score=0.055))
    assert planner.first(128, 5000) == Step(plan=Plan.SELECTOR, fetch=128)  # 274 against 360 and 775
    assert planner.first(128, 1700) == Step(plan=Plan.SCAN, fetch=128)  # 264
    cheap = Costs(search=1e-9, candidate=0, restricted=math.inf, gather=1, score=1)
    assert Planner(exact, cheap).first(8192, COUNT) == Step(plan=Plan.INDEX, fetch=8192)


def test_a_selector_is_not_asked_to_do_more_than_makes_it_exact(backend: Index, exact: Index) -> None:
    # All of the catalogue scores better than this.
    queries, scores = np.ones((1, 4), np.float32), np.full(1, -1e9, np.float32)
    step = Step(plan=Plan.SELECTOR, fetch=128)
    assert Planner(backend, COSTS).too_deep(queries, scores, step, 5000).tolist() == [True]
    assert Planner(exact, COSTS).too_deep(queries, scores, step, 5000).tolist() == [False]
    everywhere = Step(plan=Plan.SELECTOR, fetch=128, effort=backend.exact_from)
    assert Planner(backend, COSTS).too_deep(queries, scores, everywhere, 5000).tolist() == [False]
    cheap = Costs(search=1, candidate=0, restricted=1e-9, gather=1, score=1)
    assert Planner(backend, cheap).first(8192, 5000).effort == backend.exact_from == 100


def test_an_index_with_a_limit_is_not_asked_for_more(backend: Index) -> None:
    limited = copy.copy(backend)
    limited.max_k = 2048
    cheap = Costs(search=1e-9, candidate=0, restricted=1e-9, gather=1, score=1)
    planner = Planner(limited, cheap)
    assert planner.first(2048, COUNT).plan is Plan.INDEX
    assert planner.first(8192, COUNT).plan is Plan.SCAN
    assert planner.first(2048, 5000).plan is Plan.SELECTOR
