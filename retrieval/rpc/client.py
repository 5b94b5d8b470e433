"""The typed client; `rpc.aio` has the same for asyncio. Loads neither torch, faiss, pyarrow nor numpy.

from retrieval.rpc.client import History, RetrievalClient

with RetrievalClient("localhost:50051") as client:
    answer = client.retrieve(History(items=[12, 7], timestamps=[1_700_000_000, 1_700_000_060]), k=100)
    print(answer.items, answer.scores, answer.snapshot_version)
"""

import json
import time
from collections.abc import Sequence

import grpc

from retrieval.errors import RetrievalError
from retrieval.histories.event import Event
from retrieval.index.filter import Filter, filter_from
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.connection import Connection
from retrieval.rpc.convert import (
    batch_from,
    batch_request_to,
    embed_request_to,
    embedded_from,
    retrieve_request_to,
    retrieved_from,
    state_from,
)
from retrieval.rpc.convert_record import record_request_to, recorded_from
from retrieval.rpc.errors import UnavailableError
from retrieval.rpc.requests import (
    Attribute,
    Debug,
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Ids,
    Recorded,
    RecordRequest,
    Retrieved,
    RetrieveRequest,
    SearchPlan,
    ServingState,
    Source,
    StoredUser,
)
from retrieval.rpc.standard import HEALTH_CHECK, SERVING, HealthCheckRequest, HealthCheckResponse
from retrieval.rpc.throttle import Throttle

__all__ = [
    "SERVICE",
    "SERVICE_CONFIG",
    "Attribute",
    "Debug",
    "Embedded",
    "Embedding",
    "Event",
    "History",
    "Recorded",
    "RetrievalClient",
    "RetrieveRequest",
    "Retrieved",
    "SearchPlan",
    "ServingState",
    "Source",
    "StoredUser",
    "retrieve_message",
]

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["RetrievalService"]
_METHODS = _DESCRIPTOR.methods_by_name
SERVICE: str = _DESCRIPTOR.full_name

# Any call may be repeated: the server recognises recorded events. All five attempts fit in the default deadline, so
# that a server without a snapshot is reported as that and not as a deadline that passed.
_SERVICE_CONFIG = {
    # A name with several addresses is that of replicas, all of which are to be asked.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.02s",
                "maxBackoff": "0.2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
SERVICE_CONFIG = json.dumps(_SERVICE_CONFIG)
_POLL_SECONDS = 0.1


def retrieve_message(
    user: History | StoredUser | Embedding,
    k: int,
    request_time: int | None,
    exclude: Ids,
    exclude_seen: bool,
    include_titles: bool,
    filter: Filter | str | None,
    required_version: str,
    action: str,
    exact: bool,
    debug: bool,
) -> pb.RetrieveRequest:
    """The message of a `RetrievalClient.retrieve`, whose arguments these are."""
    request = RetrieveRequest(
        user=user,
        k=k,
        request_time=request_time,
        exclude=exclude,
        exclude_seen=exclude_seen,
        include_titles=include_titles,
        filter=filter_from(filter) if isinstance(filter, str) else filter,
        required_version=required_version,
        action=action,
        exact=exact,
        debug=debug,
    )
    return retrieve_request_to(request)


class RetrievalClient(Connection):
    """A connection to a retrieval server. Any number of threads may share it.

    All calls raise, with the server's sentence:

    - `InvalidRequestError`: the request is malformed; `field` names the part at fault
    - `UnknownUserError`: no history of the stored user is held; `NoHistoriesError`: the server holds none at all
    - `HistoryStoreError`: the server's store of histories cannot be read or written at the moment
    - `VersionNotLoadedError`: the live snapshot is not the required one
    - `NoSnapshotError`: the server has no snapshot yet; `UnavailableError`: no server answers
    - `OverloadedError`: the server has more calls in hand than it takes; with `by_client`, the client knows that from
      refusals of late and has not sent the call
    - `UnauthenticatedError`: the server asks for a token, and this one's is missing or unknown
    - `DeadlineError`: no answer came in time
    - `ServerFaultError`: anything else

    Args:
        address: HOST:PORT of the server, or what else gRPC takes for a name, for instance dns:///HOST:PORT; calls go to
            all addresses of the name in turn.
        timeout: seconds that a call may take unless it says otherwise.
        credentials: `grpc.ssl_channel_credentials(root, key, certificate)` for a server with TLS; None is in the clear.
        token: bearer token, for a server that asks for one.
        throttle: whether to refuse calls here while the server refuses them (`rpc.throttle`).
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

    def retrieve(
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
        """The best items for a user, best first: exactly min(k, eligible items) of them.

        Args:
            user: an inline history, a stored user, or a ready embedding.
            k: how many.
            request_time: the moment for which candidates are wanted, in seconds since 1970 (UTC); None is now.
            exclude: items that must not be in the answer.
            exclude_seen: also leave out every item of the history.
            include_titles: also answer the items' titles.
            filter: what items must meet to be in the answer, as a value or as text (`retrieval.index.filter`).
            required_version: the snapshot that must answer; "" is whichever is live.
            action: which the user is likely to meet the items with; "" is any positive one.
            exact: score every eligible item instead of asking the index.
            debug: also tell how the answer came about (`Retrieved.debug`).
            timeout: seconds; None takes the client's.

        Raises:
            FilterError: the text is no filter.
            RetrievalError: see the class.
        """
        message = retrieve_message(
            user, k, request_time, exclude, exclude_seen, include_titles, filter, required_version, action, exact, debug
        )
        return retrieved_from(self._call(self._retrieve, message, timeout, self._answering))

    def batch_retrieve(
        self, requests: Sequence[RetrieveRequest], *, timeout: float | None = None
    ) -> list[Retrieved | RetrievalError]:
        """Many `retrieve`s in one call, answered from one snapshot.

        Args:
            requests: from 1 to 64, of any users.
            timeout: seconds for all of them; None takes the client's.

        Returns:
            What became of each request, in their order: its answer, or the error that `retrieve` would have raised.

        Raises:
            RetrievalError: see the class; of the call as a whole.
        """
        message = batch_request_to(requests)
        return batch_from(self._call(self._batch_retrieve, message, timeout, self._answering, len(requests)))

    def embed_users(
        self,
        users: Sequence[History | StoredUser],
        *,
        request_time: int | None = None,
        action: str = "",
        timeout: float | None = None,
    ) -> Embedded:
        """The embeddings by which `retrieve` would search for these users.

        Args:
            users: inline histories and stored users.
            request_time: the moment, in seconds since 1970 (UTC); None is now.
            action: as in `retrieve`.
            timeout: seconds; None takes the client's.

        Raises:
            RetrievalError: see the class.
        """
        message = embed_request_to(EmbedRequest(users=users, request_time=request_time, action=action))
        return embedded_from(self._call(self._embed_users, message, timeout, self._answering))

    def record_events(self, events: Sequence[Event], *, timeout: float | None = None) -> Recorded:
        """Add events to stored histories. They are durable when this returns, and count from the next call on.

        May be repeated: an event that is held already is not recorded again.

        Args:
            events: what users did; at most 1000 events.
            timeout: seconds; None takes the client's.

        Raises:
            RetrievalError: see the class. Any of the events may have been recorded.
        """
        message = record_request_to(RecordRequest(events=events))
        return recorded_from(self._call(self._record_events, message, timeout, self._recording))

    def serving_state(self, *, timeout: float | None = None) -> ServingState:
        """What the server serves at this moment.

        Raises:
            RetrievalError: see the class.
        """
        return state_from(self._call(self._state, pb.GetServingStateRequest(), timeout))

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the server's health service says that it serves.

        Raises:
            RetrievalError: see the class.
        """
        answer = self._call(self._health, HealthCheckRequest(service=SERVICE), timeout)
        return bool(answer.status == SERVING)

    def wait_until_serving(self, seconds: float) -> None:
        """Wait for a server that is being started, or that has no snapshot yet.

        Raises:
            UnavailableError: it does not serve within so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                if self.is_serving():
                    return
                why = "it has no snapshot"
            except UnavailableError as error:
                why = str(error)
            if time.monotonic() >= end:
                raise UnavailableError(f"{self._address}: does not serve after {seconds:g} s ({why})")
            time.sleep(_POLL_SECONDS)
