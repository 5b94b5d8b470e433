"""Events that are recorded count in the next call, once, for their own user, and outlive a killed server."""

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

from retrieval.errors import InvalidRequestError, RetrievalError, UnknownUserError
from retrieval.histories.recorded import open_histories
from retrieval.histories.store import StoredHistory
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Event, History, RetrievalClient, Source, StoredUser
from retrieval.rpc.errors import DeadlineError, NoHistoriesError, OverloadedError
from retrieval.rpc.requests import RecordRequest, RetrieveRequest
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.service import RetrievalService
from tests.rpc.test_server import wait_for
from tests.rpc.world import START, World

LATER = START + 10_000_000


@pytest.fixture(scope="module")
def recording(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RetrievalClient]:
    """A client of a server whose store is empty."""
    folder = tmp_path_factory.mktemp("recording")
    config = ServerConfig(registry=world.registry.location, port=0)
    with (
        closing(open_histories(str(folder / "store"))) as store,
        running_server(config, store) as address,
        RetrievalClient(address, timeout=10) as client,
    ):
        yield client


def events_of(user: int | str, history: History) -> list[Event]:
    names = history.actions or [""] * len(history.items)
    return [
        Event(user_id=user, item_id=cast("int | str", item), action=action, timestamp=time, event_id=f"{place}")
        for place, (item, action, time) in enumerate(zip(history.items, names, history.timestamps, strict=True))
    ]


def ask(client: RetrievalClient, user: History | StoredUser) -> Any:
    return client.retrieve(user, k=20, request_time=LATER, exclude_seen=True)


@pytest.mark.parametrize("user", [900, "900", "Zoë"])
def test_each_event_counts_in_the_next_call(world: World, recording: RetrievalClient, user: int | str) -> None:
    history = world.history(13)
    with pytest.raises(UnknownUserError):
        ask(recording, StoredUser(user))
    for count, event in enumerate(events_of(user, history), 1):
        assert recording.record_events([event]).unknown_items == 0
        so_far = History(history.items[:count], history.timestamps[:count], history.actions[:count])
        expected = ask(recording, so_far)
        assert ask(recording, StoredUser(user)) == expected
        assert event.item_id not in expected.items


def test_a_repeat_and_a_late_event_change_nothing_else(world: World, recording: RetrievalClient) -> None:
    history = world.history(9)
    events = events_of(901, history)
    recording.record_events(events[3:])
    recording.record_events(events[:5])
    recording.record_events(events)
    assert ask(recording, StoredUser(901)) == ask(recording, history)


def test_fresh_events_of_a_stored_user_count_for_one_call(world: World, recording: RetrievalClient) -> None:
    history = world.history(13)
    stored, fresh = events_of(902, history)[:9], History(history.items[6:], history.timestamps[6:], history.actions[6:])
    recording.record_events(stored)
    before = ask(recording, StoredUser(902))
    assert ask(recording, StoredUser(902, fresh)) == ask(recording, history) != before
    assert ask(recording, StoredUser(902, History([], []))) == before == ask(recording, StoredUser(902))
    together = recording.embed_users([StoredUser(902, fresh), history], request_time=LATER)
    assert together.events_read[0] == together.events_read[1]
    np.testing.assert_allclose(together.embedding(0), together.embedding(1), atol=1e-6)
    # Somebody of whom nothing is stored.
    assert ask(recording, StoredUser(903, history)) == ask(recording, history)
    with pytest.raises(UnknownUserError):
        ask(recording, StoredUser(903, History([], [])))


def test_items_and_actions_that_no_snapshot_knows_are_kept_and_passed_over(
    world: World, recording: RetrievalClient
) -> None:
    history = world.history(5)
    new: Any = "not-there-yet" if world.dataset.vocabulary.has_string_ids else 987_654_321
    events = events_of(904, history)
    later = [Event(user_id=904, item_id=new, timestamp=LATER, action="teleport")] * 2
    assert recording.record_events([*events, *later]).unknown_items == 2
    answer = ask(recording, StoredUser(904))
    assert answer.unknown_items == 1, "the repeat is the same event"
    assert answer.items == ask(recording, history).items
    # Of items that are all unknown nothing is known.
    recording.record_events([Event(user_id=905, item_id=new, timestamp=LATER)])
    assert ask(recording, StoredUser(905)).source is Source.POPULARITY


def good(world: World, **changes: Any) -> Event:
    return Event(**{"user_id": 906, "item_id": world.ids([0])[0], "timestamp": START, **changes})


@pytest.mark.parametrize(
    ("changes", "field", "sentence"),
    [
        ({"user_id": ""}, "user_id", "is empty"),
        ({"user_id": "u" * 501}, "user_id", "has 501 bytes; at most 500 are taken"),
        ({"action": "é" * 51}, "action", "has 102 bytes; at most 100 are taken"),
        ({"event_id": "e" * 101}, "event_id", "has 101 bytes; at most 100 are taken"),
        ({"timestamp": -1}, "timestamp", "-1 is not a time in seconds from 1970 to a day from now"),
        ({"timestamp": 1_800_000_000_000}, "timestamp", "1800000000000 is not a time in seconds"),
        ({"user_id": 2**63}, "user_id", "must be a string or a 64-bit integer"),
        ({"item_id": None}, "item_id", "holds no id, and the event tells neither context nor auxiliary"),
        ({"timestamp": 1.5}, "timestamp", "must be an integer, in seconds"),
        ({"action": 3}, "action", "must be text"),
    ],
)
def test_one_wrong_event_is_named_and_none_is_recorded(
    world: World, recording: RetrievalClient, changes: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequestError) as told:
        recording.record_events([good(world), good(world, **changes)])
    assert told.value.field == f"events[1].{field}"
    assert sentence in told.value.reason
    with pytest.raises(UnknownUserError):
        ask(recording, StoredUser(906))


def test_other_wrong_requests_are_named(world: World, recording: RetrievalClient) -> None:
    wrong: Any = 1 if world.dataset.vocabulary.has_string_ids else "1"
    with pytest.raises(InvalidRequestError, match=r"^events\[0\].item_id: is .*, but the catalogue's ids are "):
        recording.record_events([good(world, item_id=wrong)])
    with pytest.raises(InvalidRequestError, match=r"^events: has 0 events; from 1 to 1000 are taken$"):
        recording.record_events([])
    with pytest.raises(InvalidRequestError, match=r"^events: has 1001 events"):
        recording.record_events([good(world)] * 1001)
    with pytest.raises(InvalidRequestError, match=r"^fresh_events.timestamps\[1\]: 1 is before 2"):
        ask(recording, StoredUser(1, History(world.ids([0, 1]), [2, 1])))
    with pytest.raises(InvalidRequestError, match=r"^users\[0\].fresh_events.items: holds"):
        recording.embed_users([StoredUser(1, History([wrong], [1]))])


def test_messages_that_no_client_of_ours_sends_are_named(recording: RetrievalClient) -> None:
    def refused(method: str, message: Any) -> str:
        with grpc.insecure_channel(recording._address) as channel, pytest.raises(grpc.RpcError) as told:
            channel.unary_unary(f"/retrieval.v1.RetrievalService/{method}")(message.SerializeToString(), timeout=10)
        assert told.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(told.value.details())

    item, user = pb.ItemId(integer=1), pb.UserId(integer=1)
    assert refused("RecordEvents", pb.RecordEventsRequest(events=[pb.Event(item_id=item)])).startswith(
        "events[0].user_id: holds no id"
    )
    assert refused("RecordEvents", pb.RecordEventsRequest(events=[pb.Event(user_id=user)])).startswith(
        "events[0].item_id: holds no id"
    )
    for who in ({"history": pb.History()}, {"embedding": {"values": [1.0] * 16}}, {}):
        assert refused("Retrieve", pb.RetrieveRequest(fresh_events=pb.History(), k=1, **who)).startswith(
            "fresh_events: needs a stored user"
        )


def test_a_server_without_histories_records_nothing(integer_world: World) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    with (
        running_server(config) as address,
        RetrievalClient(address, timeout=10) as client,
        pytest.raises(NoHistoriesError, match="it can record nothing"),
    ):
        client.record_events([good(integer_world)])


def test_in_process_and_over_the_socket_are_one(world: World, tmp_path: Path, recording: RetrievalClient) -> None:
    serving = world.open()
    with closing(open_histories(str(tmp_path / "store"))) as store:
        service = RetrievalService(store)
        history = world.history(17)
        here = service.record_events(serving, RecordRequest(events=events_of(907, history)))
        assert here == recording.record_events(events_of(907, history))
        request = RetrieveRequest(user=StoredUser(907), k=20, request_time=LATER, exclude_seen=True)
        assert service.retrieve(serving, request).items == ask(recording, StoredUser(907)).items
        with pytest.raises(InvalidRequestError, match=r"^events: has 0"):
            service.record_events(serving, RecordRequest(events=[]))


def test_nobody_gets_anothers_history(world: World, recording: RetrievalClient) -> None:
    """Many users at once, whose ids are alike; each one's answer is that of its own events."""
    users: list[int | str] = [*range(1000, 1010), *(str(number) for number in range(1000, 1010))]
    histories = {user: world.history(place) for place, user in enumerate(users)}

    def live(user: int | str) -> None:
        for event in events_of(user, histories[user]):
            recording.record_events([event])
        # By their embeddings: rounding depends on who shares a batch.
        embedded = recording.embed_users([StoredUser(user), histories[user]], request_time=LATER)
        np.testing.assert_allclose(embedded.embedding(0), embedded.embedding(1), atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, users))
    for user in users:
        assert ask(recording, StoredUser(user)) == ask(recording, histories[user])


class StuckHistories:
    """A store whose disk hangs."""

    def __init__(self) -> None:
        self.waiting: list[Future[None]] = []

    def read(self, user_id: int | str) -> StoredHistory | None:
        return None

    def append(self, events: object) -> "Future[None]":
        self.waiting.append(Future())
        return self.waiting[-1]

    def close(self) -> None:
        pass


def test_a_disk_that_hangs_refuses_events_but_no_candidates(integer_world: World) -> None:
    store = StuckHistories()
    config = ServerConfig(registry=integer_world.registry.location, port=0, capacity=3)
    with (
        running_server(config, store) as address,
        RetrievalClient(address, timeout=20) as client,
        ThreadPoolExecutor() as pool,
    ):
        calls = [pool.submit(client.record_events, [good(integer_world)]) for _ in range(3)]
        wait_for(lambda: len(store.waiting) == 3)
        with pytest.raises(OverloadedError, match="3 RecordEvents calls are in hand"):
            client.record_events([good(integer_world)])
        assert client.retrieve(integer_world.history(3), k=3).shortfall == 0
        store.waiting[0].set_result(None)
        assert next(as_completed(calls, 10)).result().unknown_items == 0
        # A call whose deadline passes gives its place back, and is withdrawn from the store.
        with pytest.raises(DeadlineError, match="no answer within"):
            client.record_events([good(integer_world)], timeout=2)
        wait_for(lambda: store.waiting[3].cancelled())
        for waiting in store.waiting[1:3]:
            waiting.set_result(None)
        assert [call.result(10).unknown_items for call in calls] == [0, 0, 0]


SERVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from retrieval.histories.recorded import open_histories
    from retrieval.rpc.server import ServerConfig, run_server
    config = ServerConfig(registry=Path(sys.argv[1]), port=0)
    run_server(config, open_histories(sys.argv[2]), on_ready=lambda address: print(address, flush=True))
""")


@contextmanager
def process(registry: Path | str, store: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", SERVER, str(registry), str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running.stdout.readline().strip(), running
        finally:
            running.kill()


def test_every_acknowledged_event_outlives_a_killed_server(integer_world: World, tmp_path: Path) -> None:
    item = integer_world.ids([0])[0]
    acknowledged: list[tuple[int, str]] = []
    enough, dead = threading.Event(), threading.Event()

    def record(client: RetrievalClient, writer: int) -> None:
        """Some users are a writer's own and some are everybody's; each event has an action of its own."""
        for number in range(10**6):
            user, name = (writer if number % 2 else 99), f"{writer}-{number}"
            try:
                client.record_events([Event(user_id=user, item_id=item, timestamp=number, action=name, event_id=name)])
            except RetrievalError:
                assert dead.is_set()
                return
            acknowledged.append((user, name))
            if len(acknowledged) >= 200:
                enough.set()

    with (
        process(integer_world.registry.location, tmp_path / "store") as (address, running),
        RetrievalClient(address, timeout=30) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        writers = [pool.submit(record, client, writer) for writer in range(8)]
        assert enough.wait(60)
        dead.set()
        running.send_signal(signal.SIGKILL)
        running.wait(20)
        for writer in writers:
            writer.result(60)
    with (
        process(integer_world.registry.location, tmp_path / "store") as (address, _),
        RetrievalClient(address, 10) as client,
    ):
        events = client.embed_users([StoredUser(user) for user in (*range(8), 99)])
        assert all(events.events_read)
        # The store is opened beside the server, as an operator would.
        with closing(open_histories(str(tmp_path / "store"))) as store:
            for user in (*range(8), 99):
                found = store.read(user)
                assert found is not None
                names = list(found.actions)
                assert set(names) >= {name for whose, name in acknowledged if whose == user}
                assert len(set(names)) == len(names), "once each"
                assert user == 99 or all(name.startswith(f"{user}-") for name in names)
