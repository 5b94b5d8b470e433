"""Which way of searching a query takes: from how many items are eligible, and from what searching costs here.

Three ways give the same answers (`types.Plan`). Asking the index for more and dropping what is not eligible costs
little while most items are eligible. Scoring the eligible items alone costs little when they are few. In between, an
index that can look at eligible items only does so. Costs are measured where the index is, not assumed.

The plan of a query depends on the query, its filter and the index alone, never on who shares its batch.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.index.attributes import Eligible
from retrieval.index.backend import IndexBackend
from retrieval.index.exact import keeps, scan
from retrieval.types import Plan

__all__ = ["Costs", "Planner", "Step", "depth_class", "measure_costs"]

# Indexes are tuned for recall at 100; an answer that lies deeper needs more effort to be found as surely.
_TUNED_DEPTH: Final = 128
# Down to here effort may grow with the square root of the depth, beyond it must grow with the depth itself. Measured by
# benchmarks/filters.py; see docs/filters.md.
_ROOT_DEPTH: Final = 2048
# So few survivors are scanned faster than any index answers.
_ALWAYS_SCANNED: Final = 2048
# Queries share the gathering of survivors: those of one search, and where it is kept those of later ones. A plan must
# not depend on how many really do.
_SHARED_BY: Final = 8
_SHARED_BY_LATER: Final = 64
# A selector's search that had to go this many times deeper than planned is not trusted. Measured: see docs/filters.md.
_TOO_DEEP: Final = 2
_GROWTH: Final = 4
# First steps that are kept: working one out takes longer than most of what a search does in Python.
_REMEMBERED: Final = 4096
_CLASSES: Final = _TUNED_DEPTH * 2 ** np.arange(55)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds that parts of a search take; only their ratios matter.

    Attributes:
        search: one query of the index at effort 1.
        candidate: each candidate that it fetches.
        restricted: one query of the index over eligible items only, at effort 1; infinite where it cannot.
        gather: fetching one survivor for a scan, shared by queries.
        score: scoring it for one query.
    """

    search: float
    candidate: float
    restricted: float
    gather: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One attempt at answering.

    Attributes:
        plan: the way.
        fetch: candidates fetched per query.
        effort: of the index, 1 as tuned.
    """

    plan: Plan
    fetch: int
    effort: float = 1.0


def depth_class(need: NDArray[np.int64]) -> NDArray[np.int64]:
    """Depths rounded up to 128 times a power of 2: queries of one class are searched together.

    Rounding by class makes a query's depth, and with it an approximate answer, its own and not that of its batch.
    """
    return np.asarray(_CLASSES[_CLASSES.searchsorted(need)])


class Planner:
    """Plans for one index.

    Args:
        backend: the index.
        costs: of searching it; measured when first needed if not given.
    """

    def __init__(self, backend: IndexBackend, costs: Costs | None = None) -> None:
        self._backend, self._given = backend, costs
        self._firsts: dict[tuple[int, int], Step] = {}

    @cached_property
    def costs(self) -> Costs:
        """What searching costs."""
        return self._given if self._given is not None else measure_costs(self._backend)

    @cached_property
    def _sample(self) -> NDArray[np.float32]:
        """An even sample of the vectors, to tell by a score how deep it lies."""
        step = max(1, min(self._backend.count // 4096, 256))
        return np.asarray(self._backend.vectors[::step], np.float32)

    def steps(self, need: int, survivors: int, exact: bool = False) -> Iterator[Step]:
        """How to begin, and how to go on with queries that the step before left unanswered.

        Args:
            need: candidates wanted of the survivors, a depth class.
            survivors: items of the index that are eligible.
            exact: whether every survivor must be scored.
        """
        step = _scanned(need, survivors) if exact else self.first(need, survivors)
        while True:
            yield step
            step = self.after(step, need, survivors)

    def first(self, need: int, survivors: int) -> Step:
        """The first of `steps`."""
        step = self._firsts.get((need, survivors))
        if step is None:
            if len(self._firsts) >= _REMEMBERED:
                self._firsts.clear()
            step = self._firsts[need, survivors] = self._cheapest(need, survivors)
        return step

    def _cheapest(self, need: int, survivors: int) -> Step:
        count = self._backend.count
        if survivors == 0:
            return _scanned(need, survivors)
        if survivors == count and need <= 4 * _TUNED_DEPTH and need <= self._deepest:
            return self._index(need)
        if self._given is None and survivors <= _ALWAYS_SCANNED:
            return _scanned(need, survivors)
        share = survivors / count
        # Survivors among the d best are binomial; four deviations more than the mean rarely have to be repeated.
        depth = math.ceil((need + 4 * math.sqrt(need * (1 - share))) / share)
        ways = [(self._scan_cost(survivors), _scanned(need, survivors))]
        if depth <= min(count, self._deepest):
            ways.append((self._index_cost(depth), self._index(depth)))
        if survivors < count and need <= self._deepest and self._backend.supports_allowed:
            effort = self._effort(depth)
            cost = self.costs.restricted * effort + self.costs.candidate * need
            ways.append((cost, Step(plan=Plan.SELECTOR, fetch=min(need, count), effort=effort)))
        return min(ways, key=lambda way: way[0])[1]

    def after(self, step: Step, need: int, survivors: int) -> Step:
        """How to go on with queries that a step left unanswered: in the end by a scan that fetches every survivor."""
        if step.plan is Plan.SCAN:
            return _scanned(step.fetch * _GROWTH**2, survivors)
        fetch = step.fetch * _GROWTH
        if (
            step.plan is Plan.INDEX
            and fetch <= min(self._backend.count, self._deepest)
            and self._index_cost(fetch) < self._scan_cost(survivors)
        ):
            return self._index(fetch)
        return _scanned(need, survivors)

    def too_deep(
        self, queries: NDArray[np.float32], scores: NDArray[np.float32], step: Step, survivors: int
    ) -> NDArray[np.bool_]:
        """Which answers of a selector lie so deep in the whole catalogue that its effort cannot be trusted: bool `[B]`.

        Where eligible items are unlike the query (another category), far more than survivors / N would say score
        better than its last answer, and the parts of the index that were looked at need not hold the best of them.

        Args:
            queries: `[B, D]`.
            scores: each query's last answer, `[B]`.
            step: the selector's.
            survivors: items that are eligible.
        """
        if step.effort >= self._backend.exact_from:
            return np.zeros(len(queries), bool)
        expected = step.fetch / survivors * len(self._sample)
        deeper = np.count_nonzero(queries @ self._sample.T > scores[:, None], axis=1)
        # The square root allows for chance in the sample.
        limit = _TOO_DEEP * (expected + math.sqrt(expected) + 1)
        return np.asarray(deeper > limit)

    def _effort(self, depth: int) -> float:
        """To find what lies so deep; an exact search needs no more than what makes it one."""
        return min(_effort(depth), self._backend.exact_from)

    @property
    def _deepest(self) -> int:
        return self._backend.max_k if self._backend.max_k is not None else self._backend.count

    def _index(self, depth: int) -> Step:
        return Step(plan=Plan.INDEX, fetch=min(depth, self._backend.count), effort=self._effort(depth))

    def _index_cost(self, depth: int) -> float:
        return self.costs.search * self._effort(depth) + self.costs.candidate * depth

    def _scan_cost(self, survivors: int) -> float:
        shared_by = _SHARED_BY_LATER if keeps(self._backend.vectors, survivors) else _SHARED_BY
        return survivors * (self.costs.gather / shared_by + self.costs.score)


def _scanned(need: int, survivors: int) -> Step:
    return Step(plan=Plan.SCAN, fetch=min(need, survivors))


def _effort(depth: int) -> float:
    deeper = max(1.0, depth / _TUNED_DEPTH)
    return math.sqrt(deeper) if depth <= _ROOT_DEPTH else deeper


def measure_costs(backend: IndexBackend) -> Costs:
    """Time an index with its own vectors as queries: well under a second, on the calling thread's terms.

    Ratios are rounded to powers of two, so that two loads of one index on one machine plan alike.
    """
    queries = np.asarray(backend.vectors[:: max(1, backend.count // 16)][:16], np.float32)
    many = min(backend.count, 1024, backend.max_k or backend.count)
    few = min(_TUNED_DEPTH, many)
    search = _seconds(lambda: backend.search(queries, few)) / len(queries)
    deeper = _seconds(lambda: backend.search(queries, many)) / len(queries)
    restricted = math.inf
    if backend.supports_allowed:
        every_other = Eligible.of(np.arange(backend.count) % 2 == 0)
        allowed = _seconds(lambda: backend.search(queries, few, allowed=every_other.bitmap)) / len(queries)
        restricted = _rounded(allowed)
    rows = np.arange(0, backend.count, max(1, backend.count // 16384))
    alone = _seconds(lambda: scan(backend.vectors, queries[:1], 1, rows)) / len(rows)
    together = _seconds(lambda: scan(backend.vectors, queries, 1, rows)) / len(rows)
    score = max((together - alone) / max(len(queries) - 1, 1), alone / 100)
    return Costs(
        search=_rounded(search),
        candidate=_rounded(max((deeper - search) / max(many - few, 1), search / 1e5)),
        restricted=restricted,
        gather=_rounded(max(alone - score, alone / 100)),
        score=_rounded(score),
    )


def _seconds(run: Callable[[], object]) -> float:
    """The least of three runs."""
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _rounded(seconds: float) -> float:
    return float(2.0 ** round(math.log2(max(seconds, 1e-12))))
