"""A batch of prepared requests, encoded and searched, and the answers that are made of what was found.

`solve` takes long and is mostly compiled code, so that it belongs on a thread of its own; `answer_of` is Python.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import PreparedEmbed, PreparedRetrieve, Trace, UserEvents
from retrieval.rpc.requests import Debug, Embedded, Retrieved, SearchPlan, Source
from retrieval.rpc.serving import ServingSnapshot
from retrieval.types import EventColumns, Plan, SideRows

__all__ = ["Answer", "Prepared", "Ranked", "Solved", "answer_of", "solve"]

_PLANS = {Plan.INDEX: SearchPlan.INDEX, Plan.SELECTOR: SearchPlan.SELECTOR, Plan.SCAN: SearchPlan.SCAN}
# Users per run of the encoder: an EmbedUsers call brings many at once, and activations grow with their tokens.
_ENCODED_TOGETHER = 64


@dataclass(slots=True)
class Ranked:
    """What was found for one request.

    Attributes:
        rows: of the items, best first, int64 `[n]`.
        scores: theirs, float32 `[n]`.
        source: where they come from.
        debug: how this came about; None where nobody wants to know.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    source: Source
    debug: Debug | None = None


Prepared = PreparedRetrieve | PreparedEmbed
Answer = Retrieved | Embedded
Solved = Ranked | Embedded


def answer_of(one: Prepared, solved: Solved) -> Answer:
    """The answer to a request of which this was found."""
    if isinstance(solved, Embedded):
        return solved
    assert isinstance(one, PreparedRetrieve)
    serving, rows = one.serving, solved.rows
    return Retrieved(
        items=serving.ids_of(rows),
        scores=solved.scores.tolist(),
        snapshot_version=serving.version,
        source=solved.source,
        shortfall=one.k - len(rows),
        unknown_items=one.user.unknown if isinstance(one.user, UserEvents) else 0,
        titles=serving.titles_of(rows) if one.include_titles else [],
        cold_items=serving.cold_places(rows) if solved.source is not Source.POPULARITY else [],
        debug=solved.debug,
    )


def solve(serving: ServingSnapshot, batch: Sequence[Prepared], metrics: Metrics) -> list[Solved]:
    """Answer requests of one snapshot: all users of the batch encoded together, then all searches together."""
    began = time.perf_counter()
    users: list[UserEvents] = []
    for one in batch:
        if isinstance(one, PreparedEmbed):
            users += one.users
        elif isinstance(one.user, UserEvents):
            users.append(one.user)
    embedded = iter(_embed(serving, users, metrics))
    answers: list[Solved | None] = []
    searches: list[PreparedRetrieve] = []
    queries: list[NDArray[np.float32]] = []
    for one in batch:
        if isinstance(one, PreparedEmbed):
            answers.append(_embedded(serving, one.users, [next(embedded) for _ in one.users]))
            continue
        query = next(embedded)[0] if isinstance(one.user, UserEvents) else one.user
        if isinstance(one.user, UserEvents) and not one.user.is_known:
            answers.append(_popular(serving, one))
            continue
        answers.append(None)
        searches.append(one)
        queries.append(query)
    encoded = time.perf_counter()
    found = iter(_search(serving, searches, queries, metrics))
    whole = [answer if answer is not None else next(found) for answer in answers]
    times = _Times(began, encoded, time.perf_counter())
    for one, answer in zip(batch, whole, strict=True):
        if isinstance(one, PreparedRetrieve) and isinstance(answer, Ranked) and one.trace is not None:
            answer.debug = times.told(one.trace, answer.debug, len(batch))
    return whole


@dataclass(frozen=True, slots=True)
class _Times:
    """Moments of a batch, by `time.perf_counter`."""

    began: float
    encoded: float
    searched: float

    def told(self, trace: Trace, debug: Debug | None, batch_size: int) -> Debug:
        """How an answer came about, and how long its batch took."""
        assert debug is not None
        return replace(
            debug,
            batch_size=batch_size,
            decode_seconds=trace.ready - trace.began,
            queue_seconds=self.began - trace.ready + trace.began - trace.came,
            encode_seconds=self.encoded - self.began,
            search_seconds=self.searched - self.encoded,
        )


def _embed(
    serving: ServingSnapshot, users: Sequence[UserEvents], metrics: Metrics
) -> list[tuple[NDArray[np.float32], int]]:
    """Each user's embedding `[D]`, zeros where nothing is known, and the events on items that were read for it."""
    read = np.zeros(len(users), np.int64)
    embeddings = np.zeros((len(users), serving.snapshot.searcher.width), np.float32)
    filled = [place for place, user in enumerate(users) if user.is_known]
    for start in range(0, len(filled), _ENCODED_TOGETHER):
        places = filled[start : start + _ENCODED_TOGETHER]
        chunk = [users[place] for place in places]
        events = EventColumns(
            items=np.concatenate([user.rows for user in chunk]),
            actions=np.concatenate([user.actions for user in chunk]),
            timestamps=np.concatenate([user.timestamps for user in chunk]),
        )
        ends = np.cumsum([len(user.rows) for user in chunk])
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        times = np.array([user.request_time for user in chunk], np.int64)
        actions = np.array([user.action for user in chunk], np.int64)
        sides = [user.side for user in chunk if user.side is not None]
        side = SideRows.joined(sides) if sides else None
        with metrics.stage("encode"):
            histories = gather_histories(events, starts, ends, times, serving.max_length, side, actions)
            histories = serving.as_read(histories)
            embeddings[places], read[places] = serving.embed(histories), histories.main_lengths
    return list(zip(embeddings, read.tolist(), strict=True))


def _embedded(
    serving: ServingSnapshot, users: Sequence[UserEvents], embedded: Sequence[tuple[NDArray[np.float32], int]]
) -> Embedded:
    return Embedded(
        values=np.concatenate([embedding for embedding, _ in embedded]).tolist() if embedded else [],
        width=serving.snapshot.searcher.width,
        events_read=[read for _, read in embedded],
        unknown_items=[user.unknown for user in users],
        snapshot_version=serving.version,
    )


def _search(
    serving: ServingSnapshot,
    searches: Sequence[PreparedRetrieve],
    queries: Sequence[NDArray[np.float32]],
    metrics: Metrics,
) -> list[Ranked]:
    if not searches:
        return []
    searcher = serving.snapshot.searcher
    answers: dict[int, Ranked] = {}
    for exact in (False, True):
        places = [place for place, one in enumerate(searches) if one.exact is exact]
        if not places:
            continue
        asked = [searches[place] for place in places]
        with metrics.stage("search"):
            result = searcher.search(
                np.stack([queries[place] for place in places]),
                [min(one.k, len(searcher)) for one in asked],
                [one.excluded for one in asked],
                [one.filter for one in asked],
                exact=exact,
            )
        counts = np.count_nonzero(result.rows >= 0, axis=1).tolist()
        for b, (place, one, count) in enumerate(zip(places, asked, counts, strict=True)):
            from_context = isinstance(one.user, UserEvents) and not len(one.user.rows)
            source = Source.CONTEXT if from_context else Source.MODEL
            answer = Ranked(result.rows[b, :count], result.scores[b, :count], source)
            if one.trace is not None:
                plan = _PLANS[Plan(result.plans[b])] if count else None
                answer.debug = Debug(plan=plan, eligible=int(result.eligible[b]))
            answers[place] = answer
    return [answers[place] for place in range(len(searches))]


def _popular(serving: ServingSnapshot, one: PreparedRetrieve) -> Ranked:
    rows = serving.snapshot.popular
    if one.filter is not None:
        rows = rows[serving.snapshot.searcher.meets(one.filter, rows)]
    debug = None
    if one.trace is not None:
        debug = Debug(plan=None, eligible=int(np.count_nonzero(~np.isin(rows, one.excluded))))
    # So many rows hold k that are not excluded, if there are k.
    rows = rows[: one.k + len(one.excluded)]
    rows = rows[~np.isin(rows, one.excluded)][: one.k]
    return Ranked(rows, serving.popularity[rows], Source.POPULARITY, debug)
