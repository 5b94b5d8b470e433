"""The typed client for asyncio. Loads no more than `rpc.client`.

async with AsyncRetrievalClient("localhost:50051") as client:
    answers = await asyncio.gather(*(client.retrieve(user, k=100) for user in users))
"""

from collections.abc import Sequence

import grpc

from retrieval.errors import RetrievalError
from retrieval.histories.event import Event
from retrieval.index.filter import Filter
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import SERVICE, SERVICE_CONFIG, retrieve_message
from retrieval.rpc.connection import AsyncConnection
from retrieval.rpc.convert import (
    batch_from,
    batch_request_to,
    embed_request_to,
    embedded_from,
    retrieved_from,
    state_from,
)
from retrieval.rpc.convert_record import record_request_to, recorded_from
from retrieval.rpc.requests import (
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Ids,
    Recorded,
    RecordRequest,
    Retrieved,
    RetrieveRequest,
    ServingState,
    StoredUser,
)
from retrieval.rpc.standard import HEALTH_CHECK, SERVING, HealthCheckRequest, HealthCheckResponse
from retrieval.rpc.throttle import Throttle

__all__ = ["AsyncRetrievalClient"]

_METHODS = pb.DESCRIPTOR.services_by_name["RetrievalService"].methods_by_name


class AsyncRetrievalClient(AsyncConnection):
    """`RetrievalClient` whose calls are awaited: same arguments, answers, errors, deadlines and retries.

    To be made and used in one event loop. Args as of `RetrievalClient`.
    """

    def __init__(
        self,
        address: str,
        timeout: float = 1.0,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        throttle: bool = True,
    ) -> None:
        super().__init__(address, timeout, credentials, token, SERVICE_CONFIG)
        # What a server has room for: calls that are answered, and calls that record.
        self._answering = Throttle() if throttle else None
        self._recording = Throttle() if throttle else None
        self._retrieve = self._described(_METHODS["Retrieve"])
        self._batch_retrieve = self._described(_METHODS["BatchRetrieve"])
        self._embed_users = self._described(_METHODS["EmbedUsers"])
        self._record_events = self._described(_METHODS["RecordEvents"])
        self._state = self._described(_METHODS["GetServingState"])
        self._health = self._method(HEALTH_CHECK, HealthCheckRequest, HealthCheckResponse)

    async def retrieve(
        self,
        user: History | StoredUser | Embedding,
        *,
        k: int = 100,
        request_time: int | None = None,
        exclude: Ids = (),
        exclude_seen: bool = False,
        include_titles: bool = False,
        filter: Filter | str | None = None,
        required_version: str = "",
        action: str = "",
        exact: bool = False,
        debug: bool = False,
        timeout: float | None = None,
    ) -> Retrieved:
        """As `RetrievalClient.retrieve`."""
        message = retrieve_message(
            user, k, request_time, exclude, exclude_seen, include_titles, filter, required_version, action, exact, debug
        )
        return retrieved_from(await self._call(self._retrieve, message, timeout, self._answering))

    async def batch_retrieve(
        self, requests: Sequence[RetrieveRequest], *, timeout: float | None = None
    ) -> list[Retrieved | RetrievalError]:
        """As `RetrievalClient.batch_retrieve`."""
        message = batch_request_to(requests)
        return batch_from(await self._call(self._batch_retrieve, message, timeout, self._answering, len(requests)))

    async def embed_users(
        self,
        users: Sequence[History | StoredUser],
        *,
        request_time: int | None = None,
        action: str = "",
        timeout: float | None = None,
    ) -> Embedded:
        """As `RetrievalClient.embed_users`."""
        message = embed_request_to(EmbedRequest(users=users, request_time=request_time, action=action))
        return embedded_from(await self._call(self._embed_users, message, timeout, self._answering))

    async def record_events(self, events: Sequence[Event], *, timeout: float | None = None) -> Recorded:
        """As `RetrievalClient.record_events`."""
        message = record_request_to(RecordRequest(events=events))
        return recorded_from(await self._call(self._record_events, message, timeout, self._recording))

    async def serving_state(self, *, timeout: float | None = None) -> ServingState:
        """As `RetrievalClient.serving_state`."""
        return state_from(await self._call(self._state, pb.GetServingStateRequest(), timeout))

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        """As `RetrievalClient.is_serving`."""
        answer = await self._call(self._health, HealthCheckRequest(service=SERVICE), timeout)
        return bool(answer.status == SERVING)
