"""The client for asyncio gives what the other one gives, many calls at once, and the same errors."""

import asyncio
from pathlib import Path

import grpc
import pytest

from retrieval.errors import InvalidRequestError, UnknownUserError
from retrieval.rpc.aio import AsyncRetrievalClient
from retrieval.rpc.client import Event, History, RetrievalClient, StoredUser
from retrieval.rpc.errors import DeadlineError, UnavailableError
from tests.rpc.world import START, USERS, World

LATER = START + 10_000_000


def test_many_calls_at_once_give_what_one_after_the_other_gives(
    world: World, client: RetrievalClient, address: str
) -> None:
    users = [world.history(user) for user in range(USERS)]
    expected = [client.retrieve(user, k=7, request_time=LATER, exclude_seen=True) for user in users]

    async def ask() -> None:
        async with AsyncRetrievalClient(address, timeout=30) as asynchronous:
            calls = (asynchronous.retrieve(user, k=7, request_time=LATER, exclude_seen=True) for user in users)
            answers = await asyncio.gather(*calls)
            for answer, wanted in zip(answers, expected, strict=True):
                assert answer.items == wanted.items
                assert answer.scores == pytest.approx(wanted.scores, abs=1e-5)
            embedded = await asynchronous.embed_users(users[:3], request_time=LATER)
            assert embedded.events_read == client.embed_users(users[:3], request_time=LATER).events_read
            assert await asynchronous.serving_state() == client.serving_state()
            assert await asynchronous.is_serving()

    asyncio.run(ask())


def test_errors_are_those_of_the_other_client(world: World, address: str) -> None:
    async def ask() -> None:
        async with AsyncRetrievalClient(address, timeout=30) as client:
            with pytest.raises(InvalidRequestError, match=r"^k: must be from 1 to 10000, not 0$"):
                await client.retrieve(world.history(0), k=0)
            with pytest.raises(InvalidRequestError) as refused:
                await client.retrieve(History(world.history(9).items[:2], [5, 4]))
            assert refused.value.field == "history.timestamps[1]"
            with pytest.raises(UnknownUserError):
                await client.retrieve(StoredUser(10**9))
            event = Event(user_id=1, item_id=world.ids([0])[0], action="", timestamp=-1, event_id="e")
            with pytest.raises(InvalidRequestError) as refused:
                await client.record_events([event])
            assert refused.value.field == "events[0].timestamp"
            with pytest.raises(DeadlineError):
                # Not one short history: timers are no finer than the millisecond in which that is answered.
                await client.embed_users([world.history(user) for user in range(USERS)] * 5, timeout=1e-6)
        async with AsyncRetrievalClient("127.0.0.1:1", timeout=5) as client:
            with pytest.raises(UnavailableError, match="no server answers"):
                await client.serving_state()

    asyncio.run(ask())


def test_a_certificate_that_is_not_the_servers_is_no_server(address: str, tmp_path: Path) -> None:
    async def ask() -> None:
        credentials = grpc.ssl_channel_credentials()
        async with AsyncRetrievalClient(address, timeout=2, credentials=credentials, token="t") as client:
            with pytest.raises(UnavailableError):
                await client.serving_state()

    asyncio.run(ask())
