"""Searching among eligible items with a full answer guaranteed, whatever the index leaves out.

Shape legend: B queries, N items of the index, A added items, D width, K answers per query, F fetched candidates, X
excluded rows of all queries together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.index.attributes import Attributes, Eligible, in_bitmap
from retrieval.index.backend import IndexBackend
from retrieval.index.filter import Filter
from retrieval.index.part import Part
from retrieval.index.planner import Costs, Planner, Step, depth_class
from retrieval.index.side import Changes, alive
from retrieval.types import Answers, Plan

__all__ = ["Searcher"]

# Candidates kept beyond those wanted, so that equal scores at the last place show; so many times more at each retry.
_SPARE, _SPARE_GROWTH = 16, 16
# Scores closer than this times the query's norm may be equal but for rounding (vectors have unit length).
_ROUNDING = 1e-6
# Elements of candidates' vectors gathered at once: 64 MiB.
_GATHERED = 1 << 24


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
        self._backend, self._tie_rank = backend, tie_rank
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
        return len(self._tie_rank)

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
        batch = _Batch.of(queries, ks, excluded, len(self))
        shape = len(queries), max(ks, default=0)
        answers = Answers(
            rows=np.full(shape, -1, np.int64),
            scores=np.full(shape, -np.inf, np.float32),
            plans=np.zeros(shape[0], np.int8),
            eligible=np.zeros(shape[0], np.int64),
        )
        if filters is None:
            self._search_group(batch, np.arange(len(queries)), None, answers, exact)
            return answers
        groups: dict[str, list[int]] = {}
        for b, filter_ in enumerate(filters):
            groups.setdefault(str(filter_), []).append(b)
        for members in groups.values():
            self._search_group(batch, np.array(members), filters[members[0]], answers, exact)
        return answers

    def _search_group(
        self,
        batch: "_Batch",
        members: NDArray[np.int64],
        filter_: Filter | None,
        answers: Answers,
        exact: bool,
    ) -> None:
        """Answer the queries of one filter."""
        indexed, added = (part.eligible(filter_) for part in (self._indexed, self._added))
        lost_indexed = batch.excluded_of(indexed, 0, self._count)
        lost_added = batch.excluded_of(added, self._count, len(self))
        from_index = np.minimum(batch.ks, indexed.count - lost_indexed)
        eligible = indexed.count + added.count - lost_indexed - lost_added
        goal = _Goal(
            indexed=indexed,
            added=added,
            from_index=from_index,
            wanted=np.minimum(batch.ks, eligible),
        )
        answers.eligible[members] = eligible[members]
        members = members[goal.wanted[members] > 0]
        needs = depth_class(batch.ks + np.maximum(lost_indexed, lost_added) + _SPARE)
        for need in sorted(set(needs[members].tolist())):
            pending = members[needs[members] == need]
            first = self._planner.scan(need, indexed.count) if exact else self._planner.first(need, indexed.count)
            step, spare, retry = first, _SPARE, False
            while len(pending):
                fetch_added = added.count if retry else min(need, added.count)
                settled = [
                    self._attempt(batch, part, goal, step, fetch_added, spare, answers)
                    for part in self._portions(pending, step.fetch + fetch_added)
                ]
                pending = pending[~np.concatenate(settled)]
                if not len(pending):
                    break
                step, spare, retry = self._planner.after(step, need, indexed.count), spare * _SPARE_GROWTH, True

    def _portions(self, members: NDArray[np.int64], fetch: int) -> Iterator[NDArray[np.int64]]:
        size = max(1, _GATHERED // (max(fetch, 1) * self.width))
        for start in range(0, len(members), size):
            yield members[start : start + size]

    def _attempt(
        self,
        batch: "_Batch",
        members: NDArray[np.int64],
        goal: "_Goal",
        step: Step,
        fetch_added: int,
        spare: int,
        answers: Answers,
    ) -> NDArray[np.bool_]:
        """Search once and write down the answers that this determines; which queries have one: bool `[members]`."""
        queries = batch.queries[members]
        found = self._fetch(queries, goal, step, fetch_added)
        keep = found.rows >= 0
        if len(batch.keys):
            keep &= ~batch.excludes(members, found.rows)
        if step.plan is Plan.INDEX and goal.indexed.count < self._count:
            keep &= goal.includes(np.maximum(found.rows, 0), self._count)
        wanted, from_index = goal.wanted[members], goal.from_index[members]
        whole = step.plan is Plan.SCAN and step.fetch == goal.indexed.count and fetch_added == goal.added.count
        width = found.rows.shape[1] if whole else min(found.rows.shape[1], int(wanted.max()) + spare)
        kept = found.compact(keep, width)
        of_index = keep & (found.rows < self._count) if fetch_added else keep
        full = np.count_nonzero(of_index, axis=1) >= from_index
        full &= np.count_nonzero(kept.rows >= 0, axis=1) >= wanted
        places, last = np.arange(len(members)), np.minimum(wanted, width) - 1
        margin = _ROUNDING * np.sqrt(np.einsum("bd,bd->b", queries, queries))
        settled = full & (kept.scores[places, last] > kept.cut + margin)
        is_true = self._backend.true_scores and step.plan is not Plan.SCAN and not fetch_added
        rows, scores = self._in_order(kept.rows, kept.scores if is_true else self._scores_of(queries, kept.rows))
        if step.plan is Plan.SELECTOR:
            settled &= ~self._planner.too_deep(queries, scores[places, last], step, goal.indexed.count)
        columns = min(width, answers.rows.shape[1])
        answered = (np.arange(columns) < wanted[:, None]) & settled[:, None]
        for into, found_ in ((answers.rows, rows), (answers.scores, scores)):
            into[members, :columns] = np.where(answered, found_[:, :columns], into[members, :columns])
        answers.plans[members[settled]] = step.plan
        return settled

    def _fetch(self, queries: NDArray[np.float32], goal: "_Goal", step: Step, fetch_added: int) -> "_Candidates":
        """Candidates of the index and of the added items, best first."""
        cut = np.full(len(queries), -np.inf, np.float32)
        parts = []
        if step.fetch:
            if step.plan is Plan.SCAN:
                parts.append(self._scan(queries, goal.indexed, step.fetch))
                limit = goal.indexed.count
            else:
                allowed = goal.indexed.bitmap if step.plan is Plan.SELECTOR else None
                found = self._backend.search(queries, step.fetch, allowed=allowed, effort=step.effort)
                parts.append((found.rows, found.scores))
                limit = self._backend.count
            if step.fetch < limit:
                # Whatever was not fetched scores no better than the last that was; −∞ where there was no last.
                np.copyto(cut, parts[0][1][:, -1], where=parts[0][0][:, -1] >= 0)
        if fetch_added:
            rows, scores = self._added.scanner.scan(queries, fetch_added, goal.added)
            parts.append((rows + self._count, scores))
            if fetch_added < goal.added.count:
                cut = np.maximum(cut, scores[:, -1])
        if len(parts) == 1:
            return _Candidates(*parts[0], cut)
        rows, scores = (np.hstack(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(-scores, axis=1, kind="stable")
        return _Candidates(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1), cut)

    def _scan(
        self, queries: NDArray[np.float32], eligible: Eligible, fetch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best of some items of the index by scoring them all."""
        if eligible.count == self._count and math.isfinite(effort := self._backend.exact_from):
            found = self._backend.search(queries, fetch, effort=effort)
            return found.rows, found.scores
        return self._indexed.scanner.scan(queries, fetch, eligible)

    def _scores_of(self, queries: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Candidates' true scores; −∞ of −1."""
        indexed = np.where(rows < self._count, rows, 0) if len(self) > self._count else rows
        gathered = np.asarray(self._backend.vectors[indexed], np.float32)
        if indexed is not rows:
            added = np.nonzero(rows >= self._count)
            gathered[added] = self._added.vectors[rows[added] - self._count]
        # Not a matrix product: its rounding would depend on where in the matrix an item stands.
        scores = np.einsum("bfd,bd->bf", gathered, queries)
        scores[rows < 0] = -np.inf
        return np.asarray(scores)

    def _in_order(
        self, rows: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates, best first, equal ones by tie rank; −1 come last."""
        unsure = np.flatnonzero((scores[:, 1:] >= scores[:, :-1]).any(axis=1))
        if len(unsure):
            order = np.lexsort((self._tie_rank[rows[unsure]], -scores[unsure]), axis=1)
            rows, scores = rows.copy(), scores.copy()
            rows[unsure] = np.take_along_axis(rows[unsure], order, axis=1)
            scores[unsure] = np.take_along_axis(scores[unsure], order, axis=1)
        return rows, scores


@dataclass(frozen=True, slots=True)
class _Goal:
    """What the queries of one filter want.

    Attributes:
        indexed: eligible items of the index.
        added: eligible added items.
        from_index: how many answers the index must be able to give each query of the batch, int64 `[B]`.
        wanted: how many answers each gets, int64 `[B]`.
    """

    indexed: Eligible
    added: Eligible
    from_index: NDArray[np.int64]
    wanted: NDArray[np.int64]

    def includes(self, rows: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        """Whether rows of the index are eligible; added ones among them are by how they were fetched."""
        return (rows >= count) | in_bitmap(self.indexed.bitmap, np.where(rows < count, rows, 0))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Fetched rows `[B, F]`, best first, −1 where there are none, and `cut` `[B]`: no row left out scores better."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    cut: NDArray[np.float32]

    def compact(self, keep: NDArray[np.bool_], width: int) -> "_Candidates":
        """The first `width` that are kept, `[B, width]`."""
        if keep.all():
            cut = self.cut if width == keep.shape[1] else np.maximum(self.cut, self.scores[:, width])
            return _Candidates(self.rows[:, :width], self.scores[:, :width], cut)
        place = np.cumsum(keep, axis=1) - 1
        b, f = np.nonzero(keep & (place < width))
        rows = np.full((len(keep), width), -1, np.int64)
        scores = np.full((len(keep), width), -np.inf, np.float32)
        rows[b, place[b, f]], scores[b, place[b, f]] = self.rows[b, f], self.scores[b, f]
        cut = self.cut.copy()
        b, f = np.nonzero(keep & (place == width))
        cut[b] = np.maximum(cut[b], self.scores[b, f])
        return _Candidates(rows, scores, cut)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Queries and what each excludes.

    Attributes:
        queries: `[B, D]`.
        ks: answers wanted, int64 `[B]`.
        owners: query of each excluded row, int64 `[X]`.
        rows: the excluded rows, int64 `[X]`.
        keys: owner · span + row, ascending, int64 `[X]`.
        span: more than any row.
    """

    queries: NDArray[np.float32]
    ks: NDArray[np.int64]
    owners: NDArray[np.int64]
    rows: NDArray[np.int64]
    keys: NDArray[np.int64]
    span: int

    @classmethod
    def of(
        cls,
        queries: NDArray[np.float32],
        ks: Sequence[int],
        excluded: Sequence[NDArray[np.int64]] | None,
        span: int,
    ) -> "_Batch":
        assert len(ks) == len(queries)
        if excluded is None:
            nothing = np.empty(0, np.int64)
            return cls(queries, np.asarray(ks, np.int64), nothing, nothing, nothing, span)
        assert len(excluded) == len(queries)
        owners = np.repeat(np.arange(len(queries)), [len(rows) for rows in excluded])
        rows = np.concatenate([*excluded, np.empty(0, np.int64)]).astype(np.int64, copy=False)
        keys = np.sort(owners * span + rows)
        return cls(queries, np.asarray(ks, np.int64), owners, rows, keys, span)

    def excluded_of(self, eligible: Eligible, begin: int, end: int) -> NDArray[np.int64]:
        """How many of the eligible rows of `begin:end` each query excludes, int64 `[B]`."""
        if len(self.rows) == 0:
            return np.zeros(len(self.queries), np.int64)
        inside = (self.rows >= begin) & (self.rows < end)
        owners = self.owners[inside][in_bitmap(eligible.bitmap, self.rows[inside] - begin)]
        return np.bincount(owners, minlength=len(self.queries))

    def excludes(self, members: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some queries' rows `[members, F]` they exclude; there are excluded rows."""
        keys = members[:, None] * self.span + rows
        places = np.minimum(np.searchsorted(self.keys, keys.ravel()), len(self.keys) - 1)
        return (self.keys[places] == keys.ravel()).reshape(rows.shape)
