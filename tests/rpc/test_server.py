"""The server under load, at its end, and with whatever a client may send."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.errors import UnknownUserError
from retrieval.histories.event import Event
from retrieval.histories.store import StoredHistory
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import RetrievalClient, StoredUser
from retrieval.rpc.errors import DeadlineError, OverloadedError
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.serving import ServingSnapshot
from retrieval.types import JaggedBatch
from tests.rpc.world import World

LATER = 20_000_000


@dataclass
class Gate:
    """Holds up every run of the encoder until it is opened, and counts the users that reach it."""

    open: threading.Event = field(default_factory=threading.Event)
    users: int = 0
    runs: int = 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    embed = ServingSnapshot.embed

    def held_up(self: ServingSnapshot, histories: JaggedBatch) -> NDArray:
        if threading.current_thread().name.startswith("encode-and-search"):
            gate.users += len(histories)
            gate.runs += 1
            assert gate.open.wait(20)
        return embed(self, histories)

    monkeypatch.setattr(ServingSnapshot, "embed", held_up)
    yield gate
    gate.open.set()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_calls_that_wait_past_their_deadline_or_are_cancelled_never_reach_the_encoder(
    integer_world: World, gate: Gate
) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    history = integer_world.history(9)
    with running_server(config) as address, RetrievalClient(address, timeout=20) as client:
        with ThreadPoolExecutor() as pool, grpc.insecure_channel(address) as channel:
            first = pool.submit(client.retrieve, history, k=3)
            wait_for(lambda: gate.users == 1)
            with pytest.raises(DeadlineError, match=r"no answer within 0.2 s"):
                client.retrieve(history, k=3, timeout=0.2)
            call = channel.unary_unary(
                "/retrieval.v1.RetrievalService/Retrieve", request_serializer=pb.RetrieveRequest.SerializeToString
            ).future(pb.RetrieveRequest(history=pb.History(items={"integers": {"values": history.items}},
                                                           timestamps=history.timestamps), k=3))  # fmt: skip
            time.sleep(0.2)
            assert call.cancel()
            time.sleep(0.2)
            gate.open.set()
            assert len(first.result().items) == 3
        assert len(client.retrieve(history, k=3).items) == 3
    assert gate.users == 2, "the first call and the last"


def test_more_calls_than_the_capacity_are_refused_at_once(integer_world: World, gate: Gate) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0, capacity=5)
    history = integer_world.history(9)
    with running_server(config) as address, RetrievalClient(address, timeout=20) as client:
        # Batches have been timed, so that a refusal can tell when to come back.
        gate.open.set()
        client.retrieve(history, k=3)
        gate.open.clear()
        gate.users = gate.runs = 0
        with ThreadPoolExecutor(5) as pool:
            first = pool.submit(client.retrieve, history, k=3)
            wait_for(lambda: gate.users == 1)
            waiting: list[Future] = [pool.submit(client.retrieve, history, k=3) for _ in range(4)]
            time.sleep(0.3)
            start = time.monotonic()
            with pytest.raises(OverloadedError, match="5 calls are in hand, as many as this server takes"):
                client.retrieve(history, k=3)
            assert time.monotonic() - start < 1
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary("/retrieval.v1.RetrievalService/Retrieve")(
                    pb.RetrieveRequest(embedding={"values": [1.0] * 16}, k=3).SerializeToString()
                )
            assert int(dict(refusal.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 1
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary("/retrieval.v1.RetrievalService/Retrieve")(b"no message")
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "not even decoded"
            assert client.is_serving()
            gate.open.set()
            assert [len(future.result().items) for future in (first, *waiting)] == [3] * 5
        assert len(client.retrieve(history, k=3).items) == 3
    assert gate.runs == 3, "the four that waited shared one run"


class SlowHistories:
    """A store that takes its time, and records nothing."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = threading.Event()

    def read(self, user_id: int | str) -> StoredHistory | None:
        self.asked.set()
        assert self.open.wait(20)
        return None

    def append(self, events: Sequence[Event]) -> "Future[None]":
        return Future()

    def close(self) -> None:
        pass


def test_a_slow_history_store_holds_up_nobody_else(integer_world: World) -> None:
    store = SlowHistories()
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    with (
        running_server(config, store) as address,
        RetrievalClient(address, timeout=20) as client,
        ThreadPoolExecutor() as pool,
    ):
        slow = pool.submit(client.retrieve, StoredUser(1))
        assert store.asked.wait(10)
        assert len(client.retrieve(integer_world.history(3), k=3, timeout=5).items) == 3
        store.open.set()
        assert isinstance(slow.exception(), UnknownUserError)


SERVER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from retrieval.rpc.server import ServerConfig, run_server
    from retrieval.rpc.serving import ServingSnapshot
    embed = ServingSnapshot.embed
    def slow(self, histories):
        print("encoding", flush=True)
        time.sleep(1)
        return embed(self, histories)
    def ready(address):
        ServingSnapshot.embed = slow
        print(address, flush=True)
    run_server(ServerConfig(registry=Path(sys.argv[1]), port=0), on_ready=ready)
    print("ended", flush=True)
""")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_calls_in_hand(integer_world: World, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVER, str(integer_world.registry.location)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        with RetrievalClient(address, timeout=20) as client, ThreadPoolExecutor() as pool:
            assert client.is_serving()
            answer = pool.submit(client.retrieve, integer_world.history(9), k=3)
            assert process.stdout.readline() == "encoding\n"
            process.send_signal(number)
            assert len(answer.result().items) == 3
        assert process.stdout.read() == "ended\n"
        assert process.wait(20) == 0, process.stderr.read()


def test_a_signal_while_the_first_snapshot_loads_ends_the_server_in_order(integer_world: World) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from retrieval.rpc.reload import Reloader
        from retrieval.rpc.server import ServerConfig, run_server
        load = Reloader._load
        def slow(self, version):
            print("loading", flush=True)
            time.sleep(0.5)
            return load(self, version)
        Reloader._load = slow
        run_server(ServerConfig(registry=Path(sys.argv[1]), port=0))
        print("ended", flush=True)
    """)
    command = [sys.executable, "-c", script, str(integer_world.registry.location)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.terminate()
        assert process.stdout.read() == "ended\n"
        assert process.wait(20) == 0


def test_health_turns_to_not_serving_before_the_server_goes(integer_world: World) -> None:
    config = ServerConfig(registry=integer_world.registry.location, port=0, grace_seconds=0.5)
    seen = []
    with ThreadPoolExecutor() as pool:
        with running_server(config) as address:
            channel = grpc.insecure_channel(address)
            request = health_pb2.HealthCheckRequest(service="retrieval.v1.RetrievalService")
            watch = health_pb2_grpc.HealthStub(channel).Watch(request)
            seen.append(next(watch).status)
            later = pool.submit(lambda: seen.append(next(watch).status))
        later.result()
        channel.close()
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


IDS = st.one_of(
    st.builds(lambda v: {"integers": {"values": v}}, st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8)),
    st.builds(lambda v: {"integers": {"values": v}}, st.lists(st.sampled_from([17 * n - 1000 for n in range(99)]))),
    st.builds(lambda v: {"strings": {"values": v}}, st.lists(st.text(max_size=20), max_size=4)),
    st.just({}),
)
TIMES = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 10**10)
FLOATS = st.floats(width=32)
HISTORIES = st.fixed_dictionaries(
    {},
    optional={
        "items": IDS,
        "actions": st.lists(st.sampled_from(["", "like", "skip", "buy"]), max_size=8),
        "timestamps": st.lists(TIMES, max_size=8).map(sorted) | st.lists(TIMES, max_size=8),
    },
)


@st.composite
def fitting_histories(draw: st.DrawFn) -> dict:
    items = draw(st.lists(st.sampled_from([17 * n - 1000 for n in range(99)]), max_size=30))
    times = draw(st.lists(st.integers(0, 7_258_118_399), min_size=len(items), max_size=len(items)).map(sorted))
    return {"items": {"integers": {"values": items}}, "timestamps": times}


STORED = st.one_of(
    st.builds(lambda v: {"integer": v}, st.integers(-5, 50)), st.builds(lambda v: {"string": v}, st.text()), st.just({})
)
VECTORS = st.builds(lambda v: {"values": v}, st.lists(FLOATS, min_size=14, max_size=17) | st.lists(FLOATS))
USER = st.one_of(
    st.builds(lambda v: {"history": v}, HISTORIES | fitting_histories()),
    st.builds(lambda v: {"stored_user": v}, STORED),
    st.just({}),
)
REQUESTS = st.builds(
    lambda user, rest: pb.RetrieveRequest(**user, **rest),
    USER | st.builds(lambda v: {"embedding": v}, VECTORS),
    st.fixed_dictionaries(
        {"k": st.integers(-(2**31), 2**31 - 1) | st.integers(1, 500)},
        optional={
            "request_time": TIMES,
            "exclude": IDS,
            "exclude_seen": st.booleans(),
            "include_titles": st.booleans(),
        },
    ),
)
EMBEDS = st.builds(
    lambda users, rest: pb.EmbedUsersRequest(users=users, **rest),
    st.lists(USER, max_size=4),
    st.fixed_dictionaries({}, optional={"request_time": TIMES}),
)
EXPECTED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


@pytest.fixture(scope="module")
def channel(integer_world: World) -> Iterator[grpc.Channel]:
    config = ServerConfig(registry=integer_world.registry.location, port=0)
    with running_server(config, integer_world.stored) as address, grpc.insecure_channel(address) as channel:
        yield channel


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def outcome(channel: grpc.Channel, method: str, content: bytes) -> tuple[bytes, grpc.StatusCode]:
    try:
        answer: bytes = channel.unary_unary(f"/retrieval.v1.RetrievalService/{method}")(content, timeout=20)
    except grpc.RpcError as error:
        return error.details().encode(), error.code()
    return answer, grpc.StatusCode.OK


@FUZZ
@given(request=REQUESTS)
def test_whatever_is_asked_is_answered_or_refused_as_the_callers_mistake(
    channel: grpc.Channel, request: pb.RetrieveRequest
) -> None:
    content, code = outcome(channel, "Retrieve", request.SerializeToString())
    if code is not grpc.StatusCode.OK:
        assert (code in EXPECTED, content != b"") == (True, True), content
        return
    answer = pb.RetrieveResponse.FromString(content)
    assert len(answer.items.integers.values) == len(answer.scores) == request.k - answer.shortfall
    assert all(-1.01 <= score <= 1.01 for score in answer.scores)


@FUZZ
@given(request=EMBEDS)
def test_whoever_is_to_be_embedded_is_answered_or_refused_as_the_callers_mistake(
    channel: grpc.Channel, request: pb.EmbedUsersRequest
) -> None:
    content, code = outcome(channel, "EmbedUsers", request.SerializeToString())
    if code is not grpc.StatusCode.OK:
        assert code in EXPECTED, content
        return
    answer = pb.EmbedUsersResponse.FromString(content)
    assert len(answer.values) == answer.width * len(request.users)


@FUZZ
@given(content=st.binary(max_size=200), method=st.sampled_from(["Retrieve", "EmbedUsers"]))
def test_any_bytes_are_answered_or_refused_as_the_callers_mistake(
    channel: grpc.Channel, content: bytes, method: str
) -> None:
    answer, code = outcome(channel, method, content)
    assert code in EXPECTED or code is grpc.StatusCode.OK, answer


def test_importing_the_client_loads_nothing_heavy() -> None:
    script = textwrap.dedent("""
        import sys
        import retrieval.rpc.client
        heavy = {"torch", "faiss", "pyarrow", "numpy", "pydantic", "duckdb"} & set(sys.modules)
        sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=dict(os.environ))


def test_the_client_works_without_the_heavy_packages(address: str, world: World, tmp_path: Path) -> None:
    """As on a machine that has only grpcio and protobuf."""
    item = world.ids([3])[0]
    script = textwrap.dedent(f"""
        import sys
        for name in ("torch", "faiss", "pyarrow", "numpy", "pydantic"):
            sys.modules[name] = None
        from retrieval.rpc.client import Embedding, History, RetrievalClient
        with RetrievalClient({address!r}, timeout=10) as client:
            client.wait_until_serving(10)
            history = History([{item!r}], [5])
            answer = client.retrieve(history, k=7)
            embedding = client.embed_users([history]).embedding(0)
            assert len(client.retrieve(Embedding(embedding), k=7).items) == len(answer.items) == 7
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=tmp_path)
