"""The service without a transport: requests in, answers out. The server and in-process callers use the same code.

Answering has three parts. `prepare` checks and translates one request; `solve` encodes and searches a batch of prepared
requests, which takes long; `answer_of` makes an answer of what was found.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from retrieval.errors import InvalidRequestError, RetrievalError, UnknownUserError
from retrieval.histories.codec import joined
from retrieval.histories.store import HistoryStore
from retrieval.rpc.errors import NoHistoriesError
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import (
    Known,
    Limits,
    Trace,
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
    StoredUser,
)
from retrieval.rpc.serving import ServingSnapshot
from retrieval.rpc.solve import Answer, Prepared, Solved, answer_of, solve

__all__ = ["RetrievalService"]


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
        """Encode and search a batch; answers in the order of the requests."""
        return [answer_of(one, solved) for one, solved in zip(prepared, self.solve(prepared), strict=True)]

    def solve(self, prepared: Sequence[Prepared]) -> list[Solved]:
        """What `answer` takes long for; `answer_of` makes an answer of it.

        Each request is answered from the snapshot that it was prepared for, whoever shares the batch.
        """
        solved: dict[int, Solved] = {}
        places: dict[int, list[int]] = {}
        for place, one in enumerate(prepared):
            places.setdefault(id(one.serving), []).append(place)
        for group in places.values():
            serving = prepared[group[0]].serving
            solved.update(zip(group, solve(serving, [prepared[place] for place in group], self._metrics), strict=True))
        return [solved[place] for place in range(len(prepared))]
