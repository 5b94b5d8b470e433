"""The client's own limit: what the server's refusals teach it, and when it lets go."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event

import grpc
import pytest

from retrieval.errors import InvalidRequestError
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.aio import AsyncRetrievalClient
from retrieval.rpc.client import Embedding, RetrievalClient
from retrieval.rpc.errors import DeadlineError, OverloadedError
from retrieval.rpc.requests import RetrieveRequest
from retrieval.rpc.server import SERVICE
from retrieval.rpc.status import status_of
from retrieval.rpc.throttle import Throttle

USER = Embedding([1.0])
FULL = OverloadedError("1 calls are in hand, as many as this server takes; try again later")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(clock)


def fail(throttle: Throttle, error: Exception, calls: int = 1) -> None:
    with pytest.raises(type(error)) as raised, throttle.call(calls):
        raise error
    assert raised.value is error, "not sent"


@contextmanager
def opened(throttle: Throttle, calls: int) -> Iterator[None]:
    """So many calls that are open, and answered at the end."""
    with ExitStack() as stack:
        for _ in range(calls):
            stack.enter_context(throttle.call())
        yield


def is_refused_here(throttle: Throttle, calls: int = 1) -> bool:
    try:
        with throttle.call(calls):
            return False
    except OverloadedError as error:
        return error.by_client


def test_nothing_is_limited_until_the_server_refuses(throttle: Throttle) -> None:
    with opened(throttle, 1000):
        fail(throttle, DeadlineError("too short"))
        fail(throttle, InvalidRequestError("k", "is bad"))
        assert throttle.limit is None


def test_a_refusal_limits_to_what_else_is_open_and_each_further_one_takes_its_place(throttle: Throttle) -> None:
    with opened(throttle, 9):
        fail(throttle, FULL)
        assert throttle.limit == 9
        assert is_refused_here(throttle)
    with opened(throttle, 8):
        fail(throttle, FULL)
        assert throttle.limit == 8
    # While the server refuses, a deadline that passes is no better.
    with opened(throttle, 7):
        fail(throttle, DeadlineError("in line for too long"))
        assert throttle.limit == 7
    with opened(throttle, 6):
        fail(throttle, FULL)
        assert throttle.limit == 6


def test_as_many_answers_as_calls_are_allowed_allow_one_more(throttle: Throttle) -> None:
    with opened(throttle, 4):
        fail(throttle, FULL)
    # Four answers with few others open: one that does not bind learns nothing.
    limit = throttle.limit
    assert limit is not None
    for _ in range(4):
        with throttle.call():
            pass
    assert throttle.limit == limit
    for _ in range(5):
        with opened(throttle, 4):
            pass
    assert throttle.limit > limit + 1


def test_when_fewer_calls_are_open_than_the_limit_all_are_sent_at_once(throttle: Throttle) -> None:
    with opened(throttle, 5):
        fail(throttle, FULL)
        assert is_refused_here(throttle)
    for _ in range(1000):
        assert not is_refused_here(throttle)


def test_a_limit_is_forgotten_when_nothing_was_refused_for_seconds(throttle: Throttle, clock: Clock) -> None:
    with opened(throttle, 2):
        fail(throttle, FULL)
        clock.now += 4
        # Refusals of our own count: the limit is needed.
        assert is_refused_here(throttle)
        clock.now += 4
        assert is_refused_here(throttle)
        clock.now += 6
        assert not is_refused_here(throttle)
        assert throttle.limit is None


def test_who_is_refused_with_one_call_open_waits_longer_and_longer(throttle: Throttle, clock: Clock) -> None:
    fail(throttle, FULL)
    pauses = []
    for _ in range(8):
        begun = clock.now
        while is_refused_here_for_now(throttle):
            clock.now += 0.01
        pauses.append(clock.now - begun)
    assert pauses[0] < 0.1
    assert pauses == sorted(pauses)
    assert 0.9 < pauses[-1] < 1.1


def is_refused_here_for_now(throttle: Throttle) -> bool:
    """Sends a call, which the server refuses, unless it is refused here."""
    try:
        with throttle.call():
            raise FULL
    except OverloadedError as error:
        return error.by_client


def test_a_call_of_many_requests_counts_as_many_but_may_go_alone(throttle: Throttle) -> None:
    with opened(throttle, 10):
        fail(throttle, FULL)
    with throttle.call(9):
        assert is_refused_here(throttle, 9)
    assert not is_refused_here(throttle, 64)


def test_a_call_that_is_cancelled_gives_its_place_back(throttle: Throttle) -> None:
    with opened(throttle, 2):
        fail(throttle, FULL)

    async def cancelled() -> None:
        with throttle.call():
            raise asyncio.CancelledError

    limit = throttle.limit
    for _ in range(5):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled())
    assert throttle.limit == limit


@contextmanager
def serving(capacity: int) -> Iterator[tuple[str, Event, list[str]]]:
    """A server that refuses what is beyond its capacity, and answers the others when it is told to."""
    release, came, open_ = Event(), list[str](), [0]

    def answer(content: bytes, context: grpc.ServicerContext) -> bytes:
        came.append("")
        if open_[0] == capacity:
            status = status_of(FULL)
            context.set_trailing_metadata(status.trailing_metadata)
            context.abort(status.code, status.details)
        open_[0] += 1
        assert release.wait(20)
        open_[0] -= 1
        return pb.RetrieveResponse(snapshot_version="1", source=pb.SOURCE_MODEL).SerializeToString()

    server = grpc.server(ThreadPoolExecutor(8))
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Retrieve": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield address, release, came
    finally:
        release.set()
        server.stop(None)


def kinds(outcomes: list[object]) -> list[str]:
    return ["ours" if error.by_client else "theirs" for error in outcomes if isinstance(error, OverloadedError)]


async def ask(client: AsyncRetrievalClient, came: list[str]) -> list[object]:
    """Three calls one after the other while two are open that the server has taken."""
    first = [asyncio.ensure_future(client.retrieve(USER)) for _ in range(2)]
    while len(came) < 2:
        await asyncio.sleep(0.005)
    outcomes: list[object] = []
    for _ in range(3):
        outcomes += await asyncio.gather(client.retrieve(USER), return_exceptions=True)
    for call in first:
        call.cancel()
    await asyncio.gather(*first, return_exceptions=True)
    return outcomes


@pytest.mark.parametrize(("throttle_", "expected"), [(True, ["theirs", "ours", "ours"]), (False, ["theirs"] * 3)])
def test_the_asynchronous_client_sends_no_more_than_the_server_takes(throttle_: bool, expected: list[str]) -> None:
    async def run(address: str, came: list[str]) -> list[object]:
        async with AsyncRetrievalClient(address, timeout=10, throttle=throttle_) as client:
            return await ask(client, came)

    with serving(2) as (address, _, came):
        assert kinds(asyncio.run(run(address, came))) == expected
        assert len(came) == 2 + expected.count("theirs")


@pytest.mark.parametrize(("throttle_", "expected"), [(True, ["theirs", "ours", "ours"]), (False, ["theirs"] * 3)])
def test_so_does_the_other_client(throttle_: bool, expected: list[str]) -> None:
    with (
        serving(2) as (address, release, came),
        RetrievalClient(address, timeout=10, throttle=throttle_) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        first = [threads.submit(client.retrieve, USER) for _ in range(2)]
        while len(came) < 2:
            release.wait(0.005)
        outcomes: list[object] = []
        for _ in range(3):
            with pytest.raises(OverloadedError) as refused:
                client.retrieve(USER)
            outcomes.append(refused.value)
        if throttle_:
            with pytest.raises(OverloadedError, match="not sent"):
                client.batch_retrieve([RetrieveRequest(user=USER, k=1)] * 2)
        release.set()
        assert [call.result().snapshot_version for call in first] == ["1", "1"]
        assert kinds(outcomes) == expected
        assert client.retrieve(USER).snapshot_version == "1"
