"""Searching among eligible items with a full answer guaranteed, whatever the index leaves out.

Shape legend: B queries, N items of the index, A added items, D width, K answers per query.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.index.attributes import Attributes, Eligible, in_bitmap
from retrieval.index.backend import IndexBackend
from retrieval.index.filter import Filter
from retrieval.index.part import Part
from retrieval.index.planner import Costs, Planner, Step, depth_class
from retrieval.index.settle import Excluded, Fetched, Goal, Table, settle
from retrieval.index.side import Changes, alive
from retrieval.types import Answers, Plan

__all__ = ["Searcher"]

# Candidates fetched beyond those wanted, so that equal scores at the last place show.
_SPARE = 16
# Candidates held at once: 48 MiB.
_FETCHED = 1 << 22


class Searcher:
    """An immutable handle on an index, the attributes of its items and what changed since it was built.

    Every query gets exactly min(k, eligible items) answers, best first, equal scores in the order of `tie_rank`;
    eligible are items that were not withdrawn, that meet the query's filter and that it does not exclude. Scores are
    inner products of the float32 embeddings, whatever the index stores. Neither filters nor exclusions cost recall:
    `planner.Planner` chooses the way by what it costs, and a query that an approximate index cannot fill is answered
    by scoring every eligible item.

    Args:
        backend: the index and the vectors in it.
        tie_rank: order among equal scores, int64 `[N + A]`.
        attributes: of the index's items; None refuses filters.
        changes: since the index was built; None for none.
        retired: rows of the table of vectors that the index leaves out, int64: never answered, changes or not.
        costs: of searching, to plan by; measured when first needed if not given.
    """

    def __init__(
        self,
        backend: IndexBackend,
        tie_rank: NDArray[np.int64],
        *,
        attributes: Attributes | None = None,
        changes: Changes | None = None,
        retired: NDArray[np.int64] | None = None,
        costs: Costs | None = None,
    ) -> None:
        if changes is None:
            nothing = np.empty((0, backend.width), np.float32)
            changes = Changes(vectors=nothing, withdrawn=np.empty(0, np.int64), attributes=None)
        self._count = count = len(backend.vectors)
        self._retired = retired if retired is not None else np.empty(0, np.int64)
        assert backend.count + len(self._retired) == count
        added = len(changes.vectors)
        assert len(tie_rank) == count + added
        assert changes.vectors.shape[1] == backend.width
        assert attributes is None or len(attributes) == count
        assert changes.attributes is None or len(changes.attributes) == added
        self._backend, self._table = backend, Table(backend.vectors, changes.vectors, tie_rank)
        self._planner = Planner(backend, costs)
        withdrawn = np.concatenate([np.asarray(changes.withdrawn, np.int64), self._retired])
        self._indexed = Part(backend.vectors, attributes, alive(withdrawn, 0, count))
        self._added = Part(changes.vectors, changes.attributes, alive(withdrawn, count, count + added))

    def with_changes(self, changes: Changes, tie_rank: NDArray[np.int64]) -> "Searcher":
        """A searcher over the same index with these changes in place of its present ones; this one stays as it is.

        Args:
            changes: everything since the index was built.
            tie_rank: order among equal scores, int64 `[N + A]`.

        Raises:
            InputError: the added items have not the attributes of the index's items.
        """
        attributes = self._indexed.attributes
        if attributes is not None and len(changes.vectors):
            given = changes.attributes.types if changes.attributes is not None else {}
            for name, type_ in attributes.types.items():
                if given.get(name) != type_:
                    raise InputError(f"added items: attribute {name!r} must be of type {type_}, not {given.get(name)}")
        changed = Searcher(self._backend, tie_rank, attributes=attributes, changes=changes, retired=self._retired)
        changed._planner = self._planner
        return changed

    def __len__(self) -> int:
        """Rows, withdrawn ones among them: N + A."""
        return len(self._table.tie_rank)

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self._backend.width

    @property
    def filterable(self) -> dict[str, tuple[str, bool]]:
        """What filters can ask about: `Attributes.kinds`."""
        return self._indexed.attributes.kinds if self._indexed.attributes is not None else {}

    def check(self, filter_: Filter) -> None:
        """Whether a filter can be asked of the items.

        Raises:
            FilterError: there are no attributes, or the filter does not fit them.
        """
        self._indexed.check(filter_)

    def meets(self, filter_: Filter | None, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows are not withdrawn and meet a filter (None: anything), in the shape of `rows`.

        Raises:
            FilterError: as `check`.
        """
        found = np.zeros(rows.shape, bool)
        count = self._count
        for part, begin, end in ((self._indexed, 0, count), (self._added, count, len(self))):
            inside = (rows >= begin) & (rows < end)
            found[inside] = in_bitmap(part.eligible(filter_).bitmap, rows[inside] - begin)
        return found

    def search(
        self,
        queries: NDArray[np.float32],
        ks: Sequence[int],
        excluded: Sequence[NDArray[np.int64]] | None = None,
        filters: Sequence[Filter | None] | None = None,
        *,
        exact: bool = False,
    ) -> Answers:
        """Find the best eligible items of each query.

        Queries with the same filter share their searches.

        Args:
            queries: finite user embeddings, float32 `[B, D]`.
            ks: answers wanted by each query, at least 1.
            excluded: rows that each query must not get, without repeats; None excludes nothing.
            filters: what each query's answers must meet, None for anything; None for no filters.
            exact: whether to score every eligible item instead of asking the index.

        Returns:
            Answers `[B, max(ks)]`, −1 past the last answer of a query.

        Raises:
            FilterError: as `check`.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        assert len(ks) == len(queries)
        assert excluded is None or len(excluded) == len(queries)
        groups: dict[str, list[int]] = {}
        for b, filter_ in enumerate(filters or ()):
            groups.setdefault(str(filter_), []).append(b)
        if len(groups) <= 1:
            return self._search_group(queries, ks, excluded, filters[0] if filters else None, exact)
        answers = _no_answers(len(queries), max(ks))
        for members in groups.values():
            assert filters is not None
            theirs = None if excluded is None else [excluded[b] for b in members]
            found = self._search_group(queries[members], [ks[b] for b in members], theirs, filters[members[0]], exact)
            columns = found.rows.shape[1]
            answers.rows[members, :columns], answers.scores[members, :columns] = found.rows, found.scores
            answers.plans[members], answers.eligible[members] = found.plans, found.eligible
        return answers

    def _search_group(
        self,
        queries: NDArray[np.float32],
        ks: Sequence[int],
        excluded: Sequence[NDArray[np.int64]] | None,
        filter_: Filter | None,
        exact: bool,
    ) -> Answers:
        """Answer queries of one filter."""
        indexed, added = self._indexed.eligible(filter_), self._added.eligible(filter_)
        answers = _no_answers(len(queries), max(ks, default=0))
        k, lost = np.asarray(ks, np.int64), Excluded.of(excluded)
        of_index: int | NDArray[np.int64] = indexed.count
        need = k + _SPARE
        answers.eligible.fill(indexed.count + added.count)
        if lost is not None:
            lost_indexed = lost.count(indexed.bitmap, 0, self._count)
            lost_added = lost.count(added.bitmap, self._count, len(self))
            of_index = indexed.count - lost_indexed
            need += np.maximum(lost_indexed, lost_added)
            answers.eligible[:] -= lost_indexed + lost_added
        goal = Goal(
            queries=queries,
            wanted=np.minimum(k, answers.eligible),
            from_index=np.minimum(k, of_index),
            excluded=lost,
            allowed=indexed.bitmap,
        )
        needs = depth_class(need)
        needs[goal.wanted == 0] = 0
        for depth in sorted(set(needs.tolist()) - {0}):
            pending, fetch_added = (needs == depth).nonzero()[0], min(depth, added.count)
            for step in self._planner.steps(depth, indexed.count, exact):
                settled = [
                    self._attempt(goal, members, indexed, added, step, fetch_added, answers)
                    for members in _portions(pending, step.fetch + fetch_added)
                ]
                pending, fetch_added = pending[~np.concatenate(settled)], added.count
                if not len(pending):
                    break
        return answers

    def _attempt(
        self,
        goal: Goal,
        members: NDArray[np.int64],
        indexed: Eligible,
        added: Eligible,
        step: Step,
        fetch_added: int,
        answers: Answers,
    ) -> NDArray[np.bool_]:
        """Search once and write down the answers that this determines; which queries have one: bool `[members]`."""
        queries = goal.queries if len(members) == len(goal.queries) else goal.queries[members]
        of_index = self._fetch(queries, indexed, step) if step.fetch else None
        of_added = None
        if fetch_added:
            rows, scores = self._added.scanner.scan(queries, fetch_added, added)
            of_added = _fetched(rows, scores, fetch_added == added.count)
        settled = settle(
            self._table,
            goal,
            members,
            of_index,
            of_added,
            check_index=step.plan is Plan.INDEX and indexed.count < self._count,
            are_true=self._backend.true_scores and step.plan is not Plan.SCAN and not fetch_added,
            answers=answers,
        )
        if step.plan is Plan.SELECTOR:
            last = answers.scores[members, goal.wanted[members] - 1]
            settled &= ~self._planner.too_deep(queries, last, step, indexed.count)
        answers.plans[members] = step.plan
        return settled

    def _fetch(self, queries: NDArray[np.float32], indexed: Eligible, step: Step) -> Fetched:
        """Candidates of the index."""
        backend = self._backend
        if step.plan is not Plan.SCAN:
            allowed = indexed.bitmap if step.plan is Plan.SELECTOR else None
            found = backend.search(queries, step.fetch, allowed=allowed, effort=step.effort)
            return _fetched(found.rows, found.scores, step.fetch >= backend.count)
        complete = step.fetch == indexed.count
        if indexed.count == self._count and math.isfinite(effort := backend.exact_from):
            found = backend.search(queries, step.fetch, effort=effort)
            return _fetched(found.rows, found.scores, complete)
        return _fetched(*self._indexed.scanner.scan(queries, step.fetch, indexed), complete)


def _no_answers(queries: int, columns: int) -> Answers:
    shape = queries, columns
    answers = Answers(
        rows=np.empty(shape, np.int64),
        scores=np.empty(shape, np.float32),
        plans=np.zeros(queries, np.int8),
        eligible=np.empty(queries, np.int64),
    )
    answers.rows.fill(-1)
    answers.scores.fill(-np.inf)
    answers.eligible.fill(0)
    return answers


def _fetched(rows: NDArray[np.int64], scores: NDArray[np.float32], complete: bool) -> Fetched:
    return Fetched(np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(scores, np.float32), complete)


def _portions(members: NDArray[np.int64], fetch: int) -> list[NDArray[np.int64]]:
    """Members in turns of so many that their candidates are not too many at once."""
    size = max(1, _FETCHED // max(fetch, 1))
    return [members] if len(members) <= size else [members[at : at + size] for at in range(0, len(members), size)]
