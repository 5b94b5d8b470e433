"""Wrong inputs: each gets one clear sentence, and the server goes on."""

import math
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from retrieval.errors import (
    HistoryStoreError,
    InputError,
    InvalidRequestError,
    NoSnapshotError,
    RetrievalError,
    UnknownUserError,
)
from retrieval.histories.event import Event
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Embedding, History, RetrievalClient, StoredUser
from retrieval.rpc.errors import NoHistoriesError, ServerFaultError, UnavailableError
from retrieval.rpc.prepare import Limits
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.status import DOMAIN
from tests.rpc.world import WIDTH, World

MANY = 20_001


@pytest.fixture(scope="module")
def bare(integer_world: World) -> Iterator[RetrievalClient]:
    """A client of a server over integer ids without stored histories."""
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    with running_server(config) as address, RetrievalClient(address, timeout=10) as client:
        client.retrieve(History([], []), k=1)
        yield client


MIXED: Any = [1, "a"]
GOOD = History([1, 2], [10, 20], ["like", ""])
NAMES = "is not an action of this snapshot; it has 'like', 'skip'"
CASES: list[tuple[Any, dict[str, Any], str]] = [
    (GOOD, {"k": 0}, "k: must be from 1 to 10000, not 0"),
    (GOOD, {"k": -5}, "k: must be from 1 to 10000, not -5"),
    (GOOD, {"k": 10_001}, "k: must be from 1 to 10000, not 10001"),
    (History([1, 2, 3], [20, 20, 10]), {}, "history.timestamps[2]: 10 is before 20, the one before it; send events "
     "oldest first"),
    (History([1, 2], [-1, 5]), {}, "history.timestamps[0]: -1 is not a time in seconds from 1970 to the year 2199"),
    (History([1], [1_700_000_000_000]), {}, "history.timestamps[0]: 1700000000000 is not a time in seconds from 1970 "
     "to the year 2199"),
    (History([1, 2], [1]), {}, "history.timestamps: has 1 entries, but history.items has 2"),
    (History([], [1]), {}, "history.timestamps: has 1 entries, but history.items has 0"),
    (History([1, 2], [1, 2], ["like"]), {}, "history.actions: has 1 entries, but history.items has 2; send one per "
     "item or none"),
    (History([1, 2], [1, 2], ["like", "buy"]), {}, f"history.actions[1]: 'buy' {NAMES}"),
    (History([1], [1], ["x" * 10**6]), {}, f"history.actions[0]: '{'x' * 60}…' {NAMES}"),
    (History(["1"], [1]), {}, "history.items: holds strings, but the catalogue's item ids are integers"),
    (GOOD, {"exclude": ["1"]}, "exclude: holds strings, but the catalogue's item ids are integers"),
    (GOOD, {"exclude": range(100_001)}, "exclude: has 100001 ids; at most 100000 are taken"),
    (GOOD, {"request_time": -1}, "request_time: -1 is not a time in seconds from 1970 to the year 2199"),
    (GOOD, {"request_time": 2**62}, f"request_time: {2**62} is not a time in seconds from 1970 to the year 2199"),
    (History([1] * MANY, range(MANY)), {}, "history.items: has 20001 events; at most 20000 are taken, send the "
     "latest"),
    (None, {}, "user: is missing; send history, stored_user or embedding"),
    (Embedding([1.0] * (WIDTH - 1)), {}, f"embedding.values: has 15 numbers; the snapshot's width is {WIDTH}"),
    (Embedding([]), {}, f"embedding.values: has 0 numbers; the snapshot's width is {WIDTH}"),
    (Embedding([0.0] * WIDTH), {}, "embedding.values: are all zero, which points nowhere"),
    (Embedding([1.0, math.nan] * 8), {}, "embedding.values[1]: nan is not a finite number"),
    (Embedding([math.inf] * WIDTH), {}, "embedding.values[0]: inf is not a finite number"),
    (Embedding([1.0] * WIDTH), {"exclude_seen": True}, "exclude_seen: needs a history or a stored user; list the "
     "items of a ready embedding's user in exclude"),
    (GOOD, {"k": 2**31}, "k: must be an integer of its range"),
    (GOOD, {"request_time": 2**63}, "request_time: must be an integer of its range"),
    (History([2**63], [1]), {}, "history.items: must be ids of one kind, all 64-bit integers or all strings"),
    (History(MIXED, [1, 2]), {}, "history.items: must be ids of one kind, all 64-bit integers or all strings"),
    (History(MIXED[::-1], [1, 2]), {}, "history.items: must be ids of one kind, all strings"),
    (History([1], [0.5]), {}, "history.timestamps: must be integers, in seconds"),  # type: ignore[list-item]
    (StoredUser(2**63), {}, "stored_user: must be a string or a 64-bit integer"),
]  # fmt: skip


@pytest.mark.parametrize(("user", "options", "sentence"), CASES, ids=[case[2][:60] for case in CASES])
def test_a_wrong_request_gets_one_clear_sentence(
    bare: RetrievalClient, user: Any, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        bare.retrieve(user, **{"k": 10, **options})
    assert str(raised.value).startswith(sentence)
    assert raised.value.field == sentence.split(":")[0]
    assert "\n" not in str(raised.value)
    assert bare.retrieve(GOOD, k=1).shortfall == 0


def test_strings_for_integers_are_named_the_other_way_round(world: World, client: RetrievalClient) -> None:
    if world.dataset.vocabulary.has_string_ids:
        with pytest.raises(InvalidRequestError, match="holds integers, but the catalogue's item ids are strings"):
            client.retrieve(GOOD, k=1)
    # An empty list has no kind.
    assert client.retrieve(History([], []), k=1).shortfall == 0


def test_a_stored_user_that_is_not_known_is_not_found(client: RetrievalClient) -> None:
    for unknown in (10**6, -1, "seven"):
        with pytest.raises(UnknownUserError, match=f"^stored_user: no history of user {unknown!r} is held$"):
            client.retrieve(StoredUser(unknown), k=1)


def test_a_server_without_histories_says_so(bare: RetrievalClient) -> None:
    with pytest.raises(NoHistoriesError, match="this server holds no histories; send the history inline"):
        bare.retrieve(StoredUser(1), k=1)
    assert not bare.serving_state().stored_users


@pytest.mark.parametrize(
    ("users", "sentence"),
    [
        ([GOOD, History([1, 2], [2, 1])], r"^users\[1\].history.timestamps\[1\]: 1 is before 2"),
        ([GOOD] * 257, "^users: has 257 users; at most 256 are taken$"),
        ([None], r"^users\[0\]: names no user; send history or stored_user$"),
    ],
)
def test_embed_users_names_the_user_at_fault(bare: RetrievalClient, users: list[Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        bare.embed_users(users)


def test_embed_users_names_the_stored_user_at_fault(client: RetrievalClient) -> None:
    with pytest.raises(UnknownUserError, match=r"^users\[1\].stored_user: no history of user 99 is held$"):
        client.embed_users([StoredUser(0), StoredUser(99)])


def call_raw(address: str, content: bytes, method: str = "Retrieve") -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(f"/retrieval.v1.RetrievalService/{method}")
        with pytest.raises(grpc.RpcError) as raised:
            call(content, timeout=10)
        return raised.value


def test_a_failure_carries_details_that_programs_can_read(address: str) -> None:
    error = call_raw(address, pb.RetrieveRequest(history=pb.History(timestamps=[1]), k=1).SerializeToString())
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", DOMAIN)
    assert [violation.field for violation in bad.field_violations] == ["history.timestamps"]


@pytest.mark.parametrize("method", ["Retrieve", "EmbedUsers", "GetServingState"])
def test_bytes_that_are_no_message_are_the_callers_mistake(address: str, method: str) -> None:
    error = call_raw(address, b"\xff\xff\xff\xff", method)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("request: is not a retrieval.v1.")


def test_a_stored_user_without_an_id_is_refused(address: str) -> None:
    error = call_raw(address, pb.RetrieveRequest(stored_user=pb.UserId(), k=1).SerializeToString())
    assert error.details() == "stored_user: holds no id; set `integer` or `string`"


def test_a_message_that_is_too_large_is_refused_and_the_server_goes_on(address: str) -> None:
    large = pb.RetrieveRequest(exclude=pb.ItemIds(strings=pb.StringList(values=["x" * 5_000_000])), k=1)
    assert call_raw(address, large.SerializeToString()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with RetrievalClient(address) as client:
        assert client.is_serving()


def test_no_snapshot_is_unavailable_and_not_serving(tmp_path: Path) -> None:
    config = ServerConfig(registry=tmp_path / "none", port=0)
    with running_server(config) as address, RetrievalClient(address) as client:
        for call in (lambda: client.retrieve(GOOD), lambda: client.embed_users([GOOD]), client.serving_state):
            with pytest.raises(NoSnapshotError, match=r"^no snapshot is loaded yet$"):
                call()
        assert not client.is_serving()
        with grpc.insecure_channel(address) as channel:
            whole = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert whole.status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_nobody_at_the_address_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with RetrievalClient(address) as client:
            with pytest.raises(UnavailableError, match=f"^{address}: no server answers"):
                client.retrieve(GOOD)
            with pytest.raises(UnavailableError, match=r"does not serve after 0.2 s"):
                client.wait_until_serving(0.2)


def test_a_port_that_is_taken_is_said_before_anything_starts(address: str, world: World) -> None:
    config = ServerConfig(registry=world.registry.location, port=int(address.rpartition(":")[2]))
    with pytest.raises(InputError, match="is the port taken by another server"), running_server(config):
        pass


def test_limits_are_configuration(integer_world: World) -> None:
    limits = Limits(max_k=5, max_events=1)
    config = ServerConfig(registry=integer_world.registry.location, port=0, limits=limits)
    with running_server(config) as address, RetrievalClient(address) as client:
        with pytest.raises(InvalidRequestError, match="from 1 to 5"):
            client.retrieve(History([], []), k=6)
        with pytest.raises(InvalidRequestError, match="at most 1 are taken"):
            client.retrieve(GOOD, k=5)


class Broken:
    """A history store whose disk is gone."""

    def read(self, user_id: int | str) -> None:
        raise OSError("secret detail of the machine")

    def append(self, events: Sequence[Event]) -> "Future[None]":
        done: Future[None] = Future()
        done.set_exception(HistoryStoreError("secret place of the machine: no space left"))
        return done

    def close(self) -> None:
        pass


def test_a_fault_of_the_server_is_logged_there_and_told_in_general_terms(
    integer_world: World, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    with running_server(config, Broken()) as address, RetrievalClient(address) as client:
        with pytest.raises(
            ServerFaultError, match="INTERNAL: the server failed on this call; its log says why"
        ) as told:
            client.retrieve(StoredUser(1))
        assert "secret" not in str(told.value)
        assert "secret detail of the machine" in caplog.text
        with pytest.raises(HistoryStoreError, match="histories cannot be used at the moment"):
            client.record_events([Event(user_id=1, item_id=1, timestamp=1)])
        assert "secret place of the machine" in caplog.text
        assert client.retrieve(GOOD, k=1).shortfall == 0


def test_every_error_of_the_client_is_one_of_ours() -> None:
    for error in (NoHistoriesError, ServerFaultError, UnavailableError, UnknownUserError, NoSnapshotError):
        assert issubclass(error, RetrievalError)
