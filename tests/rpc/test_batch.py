"""Many requests in one call: each answered as if it had come alone, or refused alone."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from retrieval.errors import HistoryStoreError, InvalidRequestError, UnknownUserError
from retrieval.histories.store import StoredHistory
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.aio import AsyncRetrievalClient
from retrieval.rpc.client import Embedding, History, RetrievalClient, Retrieved, RetrieveRequest, StoredUser
from retrieval.rpc.errors import DeadlineError, OverloadedError, VersionNotLoadedError
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from tests.rpc.test_server import Gate, gate, wait_for
from tests.rpc.world import START, USERS, WIDTH, World

__all__ = ["gate"]

LATER = START + 10_000_000


def requests_of(world: World) -> list[RetrieveRequest]:
    """All kinds of users, with everything that a request may say."""
    return [
        *(RetrieveRequest(user=world.history(user), k=1 + user, request_time=LATER) for user in range(0, USERS, 3)),
        RetrieveRequest(user=StoredUser(3), k=5, request_time=LATER, exclude_seen=True, include_titles=True),
        RetrieveRequest(user=Embedding([1.0] * WIDTH), k=400, exclude=world.ids([1, 2])),
        RetrieveRequest(user=History([], []), k=4),
        RetrieveRequest(user=world.history(9), k=7, request_time=LATER, exact=True),
    ]


def assert_alike(answer: Any, expected: Retrieved) -> None:
    assert isinstance(answer, Retrieved), answer
    assert answer.items == expected.items
    np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-5)
    assert (answer.source, answer.shortfall, answer.titles) == (expected.source, expected.shortfall, expected.titles)
    assert answer.cold_items == expected.cold_items
    assert answer.snapshot_version == expected.snapshot_version


def test_many_requests_in_one_call_are_answered_as_one_by_one(
    world: World, service: RetrievalService, serving: ServingSnapshot, client: RetrievalClient, address: str
) -> None:
    requests = requests_of(world)
    alone = [service.retrieve(serving, request) for request in requests]

    async def asked() -> list[Any]:
        async with AsyncRetrievalClient(address, timeout=20) as asynchronous:
            return list(await asynchronous.batch_retrieve(requests))

    for answers in (client.batch_retrieve(requests), service.batch_retrieve(serving, requests), asyncio.run(asked())):
        assert len(answers) == len(requests)
        for answer, expected in zip(answers, alone, strict=True):
            assert_alike(answer, expected)


def test_what_is_wrong_with_one_request_stands_in_its_place(
    world: World, service: RetrievalService, serving: ServingSnapshot, client: RetrievalClient
) -> None:
    good = RetrieveRequest(user=world.history(9), k=5, request_time=LATER)
    requests = [
        good,
        RetrieveRequest(user=History(world.history(9).items[:2], [5, 4]), k=5),
        RetrieveRequest(user=StoredUser("nobody"), k=5),
        RetrieveRequest(user=None, k=5),
        good,
        RetrieveRequest(user=world.history(9), k=5, required_version="000007-0123456789ab"),
        RetrieveRequest(user=world.history(9), k=0),
    ]
    expected = service.retrieve(serving, good)
    for outcomes in (client.batch_retrieve(requests), service.batch_retrieve(serving, requests)):
        assert_alike(outcomes[0], expected)
        assert_alike(outcomes[4], expected)
        kinds = [type(outcomes[place]) for place in (1, 2, 3, 5, 6)]
        wanted = [InvalidRequestError, UnknownUserError, InvalidRequestError, VersionNotLoadedError]
        assert kinds == [*wanted, InvalidRequestError]
        sentences = [str(outcomes[place]) for place in (1, 3, 6)]
        assert sentences[0].startswith("history.timestamps[1]: 4 is before 5")
        assert sentences[1:] == [
            "user: is missing; send history, stored_user or embedding",
            "k: must be from 1 to 10000, not 0",
        ]
        for outcome in (outcomes[1], outcomes[6]):
            assert isinstance(outcome, InvalidRequestError)
        assert [getattr(outcomes[place], "field", None) for place in (1, 3, 6)] == [
            "history.timestamps[1]",
            "user",
            "k",
        ]


def test_an_error_tells_another_client_its_code_and_reason(address: str) -> None:
    request = pb.BatchRetrieveRequest(
        requests=[{"k": 3}, {"fresh_events": {}, "k": 3}, {"stored_user": {"integer": -1}}]
    )
    with grpc.insecure_channel(address) as channel:
        content = channel.unary_unary("/retrieval.v1.RetrievalService/BatchRetrieve")(request.SerializeToString())
    errors = [result.error for result in pb.BatchRetrieveResponse.FromString(content).results]
    assert [(error.code, error.reason, error.field) for error in errors] == [
        (grpc.StatusCode.INVALID_ARGUMENT.value[0], "INVALID_REQUEST", "user"),
        (grpc.StatusCode.INVALID_ARGUMENT.value[0], "INVALID_REQUEST", "fresh_events"),
        (grpc.StatusCode.NOT_FOUND.value[0], "UNKNOWN_USER", ""),
    ]
    assert all(error.message for error in errors)


@pytest.mark.parametrize("count", [0, 65])
def test_none_and_too_many_are_refused_as_a_whole(
    count: int, world: World, service: RetrievalService, serving: ServingSnapshot, client: RetrievalClient
) -> None:
    requests = [RetrieveRequest(user=History([], []), k=1)] * count
    for ask in (client.batch_retrieve, lambda many: service.batch_retrieve(serving, many)):
        with pytest.raises(InvalidRequestError, match=f"^requests: has {count} requests; from 1 to 64 are taken$"):
            ask(requests)


def test_a_value_that_cannot_be_sent_is_named_with_its_place(client: RetrievalClient) -> None:
    with pytest.raises(InvalidRequestError) as error:
        client.batch_retrieve([RetrieveRequest(user=History([], []), k=1), RetrieveRequest(user=None, k=2**40)])
    assert error.value.field == "requests[1].k"


def test_a_call_counts_as_many_calls_as_it_has_requests(integer_world: World, gate: Gate) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0, capacity=5)
    one = RetrieveRequest(user=integer_world.history(9), k=3)
    # What the server takes is asked here, and not what the client would send after a refusal.
    with running_server(config) as address, RetrievalClient(address, timeout=20, throttle=False) as client:
        assert (client.serving_state().max_batch, client.serving_state().max_k) == (5, 10_000)
        with pytest.raises(InvalidRequestError, match=r"^requests: has 6 requests; from 1 to 5 are taken$"):
            client.batch_retrieve([one] * 6)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.batch_retrieve, [one] * 3)
            wait_for(lambda: gate.users > 0)
            with pytest.raises(OverloadedError, match=r"^3 calls are in hand, and 3 more are more than this server"):
                client.batch_retrieve([one] * 3)
            second = pool.submit(client.batch_retrieve, [one] * 2)
            time.sleep(0.2)
            gate.open.set()
            assert [len(first.result()), len(second.result())] == [3, 2]
        assert len(client.batch_retrieve([one] * 5)) == 5


def test_a_call_whose_deadline_passes_leaves_no_request_behind(integer_world: World, gate: Gate) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0, capacity=5)
    one = RetrieveRequest(user=integer_world.history(9), k=3)
    with running_server(config) as address, RetrievalClient(address, timeout=20) as client:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.retrieve, integer_world.history(9), k=3)
            wait_for(lambda: gate.users == 1)
            with pytest.raises(DeadlineError):
                client.batch_retrieve([one] * 4, timeout=0.2)
            gate.open.set()
            first.result()
        assert len(client.batch_retrieve([one] * 5)) == 5
    assert gate.users == 6, "the first call and the last five"


class FailingHistories:
    """A store that holds one user and fails on another."""

    def read(self, user_id: int | str) -> StoredHistory | None:
        if user_id == 1:
            raise HistoryStoreError("/secret/place: broken")
        return None

    def append(self, events: Any) -> Any:
        raise AssertionError(events)

    def close(self) -> None:
        """Holds nothing."""


def test_a_store_that_fails_fails_the_requests_that_need_it(integer_world: World, tmp_path: Path) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    requests = [
        RetrieveRequest(user=StoredUser(1), k=3),
        RetrieveRequest(user=integer_world.history(9), k=3),
        RetrieveRequest(user=StoredUser(2), k=3),
    ]
    with running_server(config, FailingHistories()) as address, RetrievalClient(address, timeout=20) as client:
        broken, answer, unknown = client.batch_retrieve(requests)
    assert isinstance(broken, HistoryStoreError)
    assert "secret" not in str(broken)
    assert isinstance(answer, Retrieved)
    assert isinstance(unknown, UnknownUserError)
