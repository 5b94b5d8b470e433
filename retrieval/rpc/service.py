"""The service without a transport: requests in, answers out. The server and in-process callers use the same code.

Answering has two halves. `prepare_*` checks and translates one request: cheap, on whatever thread the request is.
`answer` encodes and searches a batch of prepared requests: all of the cost, on one thread.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories
from retrieval.errors import InvalidRequestError, RetrievalError, UnknownUserError
from retrieval.histories.codec import joined
from retrieval.histories.store import HistoryStore
from retrieval.rpc.errors import NoHistoriesError
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import (
    Known,
    Limits,
    PreparedEmbed,
    PreparedRetrieve,
    Trace,
    UserEvents,
    fresh_history,
    prepare_embed,
    prepare_retrieve,
    shown,
)
from retrieval.rpc.record import check_events
from retrieval.rpc.requests import (
    Debug,
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Recorded,
    RecordRequest,
    Retrieved,
    RetrieveRequest,
    SearchPlan,
    ServingState,
    Source,
    StoredUser,
)
from retrieval.rpc.serving import ServingSnapshot
from retrieval.types import EventColumns, Plan, SideRows

__all__ = ["Answer", "Prepared", "RetrievalService"]

Prepared = PreparedRetrieve | PreparedEmbed
Answer = Retrieved | Embedded

_PLANS = {Plan.INDEX: SearchPlan.INDEX, Plan.SELECTOR: SearchPlan.SELECTOR, Plan.SCAN: SearchPlan.SCAN}
# Users per run of the encoder: an EmbedUsers call brings many at once, and activations grow with their tokens.
_ENCODED_TOGETHER = 64


class RetrievalService:
    """Answers requests from snapshots that it is handed. Holds no state of its own; any thread may use it.

    Args:
        histories: stored histories; None refuses requests that name a stored user.
        limits: what a call may ask for.
        clock: seconds since 1970 (UTC), for requests without a time.
        metrics: where the times of encoding and searching go; None keeps them nowhere that anyone reads.
    """

    def __init__(
        self,
        histories: HistoryStore | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
    ) -> None:
        self._histories = histories
        self._limits = limits if limits is not None else Limits()
        self._clock = clock
        self._metrics = metrics if metrics is not None else Metrics()

    def state(self, serving: ServingSnapshot) -> ServingState:
        """What is served."""
        limits, stored_users = self._limits, self._histories is not None
        return serving.state(stored_users=stored_users, max_k=limits.max_k, max_batch=limits.max_batch)

    def prepare(
        self, serving: ServingSnapshot, request: RetrieveRequest | EmbedRequest, came: float | None = None
    ) -> Prepared:
        """Check a request and look up what it names. Blocks on the history store for stored users only.

        Args:
            serving: the snapshot to answer from.
            request: the request.
            came: when it came, by `time.perf_counter`; None is now.

        Raises:
            InvalidRequestError: something is wrong with the request; the sentence names the field.
            UnknownUserError: no history of a stored user is held.
            NoHistoriesError: a stored user is named, but there is no store.
        """
        now, began = int(self._clock()), time.perf_counter()
        if isinstance(request, RetrieveRequest):
            user = self._look_up(serving, request.user, "")
            prepared = prepare_retrieve(serving, request, user, now=now, limits=self._limits)
            if not request.debug:
                return prepared
            return replace(prepared, trace=Trace(began if came is None else came, began, time.perf_counter()))
        # Refuse too many users before looking any of them up.
        wanted = request.users if len(request.users) <= self._limits.max_users else [None] * len(request.users)
        users = [self._look_up(serving, user, f"users[{place}].") for place, user in enumerate(wanted)]
        return prepare_embed(serving, request, users, now=now, limits=self._limits)

    def check_batch(self, size: int) -> None:
        """Check how many requests a BatchRetrieve has.

        Raises:
            InvalidRequestError: none, or too many.
        """
        if not 1 <= size <= self._limits.max_batch:
            raise InvalidRequestError("requests", f"has {size} requests; from 1 to {self._limits.max_batch} are taken")

    def prepare_batch(
        self, serving: ServingSnapshot, requests: Sequence[RetrieveRequest | RetrievalError], came: float | None = None
    ) -> list[Prepared | RetrievalError]:
        """`prepare` each request; what is wrong with one stands in its place, as does an error that is given."""
        prepared: list[Prepared | RetrievalError] = []
        for request in requests:
            if isinstance(request, RetrievalError):
                prepared.append(request)
                continue
            try:
                prepared.append(self.prepare(serving, request, came))
            except RetrievalError as error:
                prepared.append(error)
        return prepared

    def _look_up(self, serving: ServingSnapshot, user: History | StoredUser | Embedding | None, prefix: str) -> Known:
        if not isinstance(user, StoredUser):
            return user
        if self._histories is None:
            raise NoHistoriesError(f"{prefix}stored_user: this server holds no histories; send the history inline")
        history = self._histories.read(user.id)
        if user.fresh is not None:
            fresh = fresh_history(serving, user.fresh, self._limits, f"{prefix}fresh_events")
            history = joined(history, fresh) if len(fresh.items) or fresh.context or fresh.auxiliary else history
        if history is None:
            raise UnknownUserError(f"{prefix}stored_user: no history of user {shown(user.id)} is held")
        return history

    def begin_recording(self, serving: ServingSnapshot, request: RecordRequest) -> tuple[Recorded, "Future[None]"]:
        """Check events and begin to record them; does not block.

        Returns:
            The answer, to be given when the future is done.

        Raises:
            InvalidRequestError: something is wrong with the request; the sentence names the field.
            NoHistoriesError: there is no store.
        """
        if self._histories is None:
            raise NoHistoriesError("this server holds no histories, so it can record nothing")
        unknown = check_events(serving, request.events, now=int(self._clock()), limits=self._limits)
        return Recorded(unknown_items=unknown), self._histories.append(request.events)

    def record_events(self, serving: ServingSnapshot, request: RecordRequest) -> Recorded:
        """Record events here and now; they are durable at the return.

        Raises:
            InvalidRequestError, NoHistoriesError: as `begin_recording`.
            HistoryStoreError: the store cannot be written.
        """
        recorded, done = self.begin_recording(serving, request)
        done.result()
        return recorded

    def retrieve(self, serving: ServingSnapshot, request: RetrieveRequest) -> Retrieved:
        """Answer one request here and now.

        Raises:
            InvalidRequestError, UnknownUserError, NoHistoriesError: as `prepare`.
        """
        (answer,) = self.answer([self.prepare(serving, request)])
        assert isinstance(answer, Retrieved)
        return answer

    def batch_retrieve(
        self, serving: ServingSnapshot, requests: Sequence[RetrieveRequest]
    ) -> list[Retrieved | RetrievalError]:
        """Answer several requests here and now; one that is refused has its error in its place.

        Raises:
            InvalidRequestError: there are none, or too many.
        """
        self.check_batch(len(requests))
        prepared = self.prepare_batch(serving, requests)
        answers = iter(self.answer([one for one in prepared if not isinstance(one, RetrievalError)]))
        outcomes: list[Retrieved | RetrievalError] = []
        for one in prepared:
            outcome = one if isinstance(one, RetrievalError) else next(answers)
            assert isinstance(outcome, Retrieved | RetrievalError)
            outcomes.append(outcome)
        return outcomes

    def embed_users(self, serving: ServingSnapshot, request: EmbedRequest) -> Embedded:
        """Answer one request here and now.

        Raises:
            InvalidRequestError, UnknownUserError, NoHistoriesError: as `prepare`.
        """
        (answer,) = self.answer([self.prepare(serving, request)])
        assert isinstance(answer, Embedded)
        return answer

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer]:
        """Encode and search a batch; answers in the order of the requests.

        Each request is answered from the snapshot that it was prepared for, whoever shares the batch.
        """
        answers: dict[int, Answer] = {}
        places: dict[int, list[int]] = {}
        for place, one in enumerate(prepared):
            places.setdefault(id(one.serving), []).append(place)
        for group in places.values():
            serving = prepared[group[0]].serving
            answers.update(
                zip(group, _answer(serving, [prepared[place] for place in group], self._metrics), strict=True)
            )
        return [answers[place] for place in range(len(prepared))]


def _answer(serving: ServingSnapshot, batch: Sequence[Prepared], metrics: Metrics) -> list[Answer]:
    """Answers of one snapshot: all users of the batch encoded together, then all searches together."""
    began = time.perf_counter()
    users: list[UserEvents] = []
    for one in batch:
        if isinstance(one, PreparedEmbed):
            users += one.users
        elif isinstance(one.user, UserEvents):
            users.append(one.user)
    embedded = iter(_embed(serving, users, metrics))
    answers: list[Answer | None] = []
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
    return [times.told(one, answer, len(batch)) for one, answer in zip(batch, whole, strict=True)]


@dataclass(frozen=True, slots=True)
class _Times:
    """Moments of a batch, by `time.perf_counter`."""

    began: float
    encoded: float
    searched: float

    def told(self, one: Prepared, answer: Answer, batch_size: int) -> Answer:
        """An answer that tells how long its batch took, if it is to tell anything."""
        if not isinstance(one, PreparedRetrieve) or one.trace is None:
            return answer
        assert isinstance(answer, Retrieved)
        assert answer.debug is not None
        debug = replace(
            answer.debug,
            batch_size=batch_size,
            decode_seconds=one.trace.ready - one.trace.began,
            queue_seconds=self.began - one.trace.ready + one.trace.began - one.trace.came,
            encode_seconds=self.encoded - self.began,
            search_seconds=self.searched - self.encoded,
        )
        return replace(answer, debug=debug)


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
) -> list[Retrieved]:
    if not searches:
        return []
    searcher = serving.snapshot.searcher
    answers: dict[int, Retrieved] = {}
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
            answer = _retrieved(serving, one, result.rows[b, :count], result.scores[b, :count], source)
            if one.trace is not None:
                plan = _PLANS[Plan(result.plans[b])] if count else None
                answer = replace(answer, debug=Debug(plan=plan, eligible=int(result.eligible[b])))
            answers[place] = answer
    return [answers[place] for place in range(len(searches))]


def _popular(serving: ServingSnapshot, one: PreparedRetrieve) -> Retrieved:
    rows = serving.snapshot.popular
    if one.filter is not None:
        rows = rows[serving.snapshot.searcher.meets(one.filter, rows)]
    debug = None
    if one.trace is not None:
        debug = Debug(plan=None, eligible=int(np.count_nonzero(~np.isin(rows, one.excluded))))
    # So many rows hold k that are not excluded, if there are k.
    rows = rows[: one.k + len(one.excluded)]
    rows = rows[~np.isin(rows, one.excluded)][: one.k]
    return replace(_retrieved(serving, one, rows, serving.popularity[rows], Source.POPULARITY), debug=debug)


def _retrieved(
    serving: ServingSnapshot,
    one: PreparedRetrieve,
    rows: NDArray[np.int64],
    scores: NDArray[np.float32],
    source: Source,
) -> Retrieved:
    return Retrieved(
        items=serving.ids_of(rows),
        scores=scores.tolist(),
        snapshot_version=serving.version,
        source=source,
        shortfall=one.k - len(rows),
        unknown_items=one.user.unknown if isinstance(one.user, UserEvents) else 0,
        titles=serving.titles_of(rows) if one.include_titles else [],
        cold_items=serving.cold_places(rows) if source is not Source.POPULARITY else [],
    )
