"""The service without a transport: requests in, answers out. The server and in-process callers use the same code.

Answering has two halves. `prepare_*` checks and translates one request: cheap, on whatever thread the request is.
`answer` encodes and searches a batch of prepared requests: all of the cost, on one thread.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories
from retrieval.errors import UnknownUserError
from retrieval.histories.codec import joined
from retrieval.histories.store import HistoryStore
from retrieval.rpc.errors import NoHistoriesError
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import (
    Known,
    Limits,
    PreparedEmbed,
    PreparedRetrieve,
    UserEvents,
    fresh_history,
    prepare_embed,
    prepare_retrieve,
    shown,
)
from retrieval.rpc.record import check_events
from retrieval.rpc.requests import (
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Recorded,
    RecordRequest,
    Retrieved,
    RetrieveRequest,
    ServingState,
    Source,
    StoredUser,
)
from retrieval.rpc.serving import ServingSnapshot
from retrieval.types import EventColumns, SideRows

__all__ = ["Answer", "Prepared", "RetrievalService"]

Prepared = PreparedRetrieve | PreparedEmbed
Answer = Retrieved | Embedded

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
        return serving.state(stored_users=self._histories is not None)

    def prepare(self, serving: ServingSnapshot, request: RetrieveRequest | EmbedRequest) -> Prepared:
        """Check a request and look up what it names. Blocks on the history store for stored users only.

        Raises:
            InvalidRequestError: something is wrong with the request; the sentence names the field.
            UnknownUserError: no history of a stored user is held.
            NoHistoriesError: a stored user is named, but there is no store.
        """
        now = int(self._clock())
        if isinstance(request, RetrieveRequest):
            user = self._look_up(serving, request.user, "")
            return prepare_retrieve(serving, request, user, now=now, limits=self._limits)
        # Refuse too many users before looking any of them up.
        wanted = request.users if len(request.users) <= self._limits.max_users else [None] * len(request.users)
        users = [self._look_up(serving, user, f"users[{place}].") for place, user in enumerate(wanted)]
        return prepare_embed(serving, request, users, now=now, limits=self._limits)

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
    found = iter(_search(serving, searches, queries, metrics))
    return [answer if answer is not None else next(found) for answer in answers]


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
    ks = [min(one.k, len(searcher)) for one in searches]
    with metrics.stage("search"):
        result = searcher.search(
            np.stack(queries), ks, [one.excluded for one in searches], [one.filter for one in searches]
        )
    answers = []
    for one, rows, scores in zip(searches, result.rows, result.scores, strict=True):
        count = int(np.count_nonzero(rows >= 0))
        from_context = isinstance(one.user, UserEvents) and not len(one.user.rows)
        source = Source.CONTEXT if from_context else Source.MODEL
        answers.append(_retrieved(serving, one, rows[:count], scores[:count], source))
    return answers


def _popular(serving: ServingSnapshot, one: PreparedRetrieve) -> Retrieved:
    rows = serving.snapshot.popular
    if one.filter is not None:
        rows = rows[serving.snapshot.searcher.meets(one.filter, rows)]
    # So many rows hold k that are not excluded, if there are k.
    rows = rows[: one.k + len(one.excluded)]
    rows = rows[~np.isin(rows, one.excluded)][: one.k]
    return _retrieved(serving, one, rows, serving.popularity[rows], Source.POPULARITY)


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
    )
