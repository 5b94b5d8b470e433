"""Peers that speak HTTP/2 or our messages badly, slowly or not at all: refused, and nothing of it stays."""

import logging
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from retrieval.histories.recorded import open_histories
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Embedding, RetrievalClient
from retrieval.rpc.errors import OverloadedError
from retrieval.rpc.logs import set_up_logs
from retrieval.rpc.server import ServerConfig, running_server
from tests.rpc import hostile, http2
from tests.rpc.test_metrics import of, scrape, serve
from tests.rpc.test_server import wait_for
from tests.rpc.world import ITEMS, WIDTH, World

SERVICE = pb.DESCRIPTOR.services_by_name["RetrievalService"]
PATH = f"/{SERVICE.full_name}/Retrieve"
LARGE = pb.RetrieveRequest(embedding={"values": [1.0] * WIDTH}, k=ITEMS, include_titles=True).SerializeToString()
THE_CALLERS = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}


def config(world: World, **values: object) -> ServerConfig:
    return ServerConfig.model_validate({"registry": world.registry.location, "port": 0, **values})


@pytest.fixture(scope="module")
def target(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a store of its own, in which anything may be recorded."""
    with (
        closing(open_histories(str(tmp_path_factory.mktemp("hostile") / "store"))) as store,
        running_server(config(world), store) as address,
    ):
        yield address


def code_of(channel: grpc.Channel, method: str, message: bytes) -> str:
    try:
        channel.unary_unary(f"/{SERVICE.full_name}/{method}")(message, timeout=20)
    except grpc.RpcError as error:
        code: str = error.code().name
        return code
    return "OK"


def is_answered(address: str) -> bool:
    with RetrievalClient(address, timeout=10) as client:
        try:
            return client.retrieve(Embedding([1.0] * WIDTH), k=3).shortfall == 0
        except OverloadedError:
            return False


@pytest.mark.parametrize("method", sorted(SERVICE.methods_by_name))
def test_whatever_hypothesis_makes_of_a_descriptor_is_answered_or_refused(target: str, method: str) -> None:
    kind = GetMessageClass(SERVICE.methods_by_name[method].input_type)
    with grpc.insecure_channel(target) as channel:
        for message in hostile.structured(kind, [1, 53], 100, seed=1):
            assert code_of(channel, method, message) in THE_CALLERS, message


def test_what_is_large_or_deep_is_answered_or_refused(integer_world: World, target: str) -> None:
    ids = [int(item) for item in integer_world.ids([0, 1, 2])]
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(target, options=options) as channel:
        for method, message in hostile.monsters(ids, WIDTH):
            assert code_of(channel, method, message) in THE_CALLERS, message[:1000]


def test_rubbish_below_grpc_leaves_the_server_as_it_was(integer_world: World) -> None:
    chance, message = random.Random(0), LARGE

    def ask(address: str, metrics: str) -> None:
        for make in http2.ATTACKS.values():
            http2.attack(address, make(chance, PATH, message))
        with RetrievalClient(address, timeout=10) as client:
            assert client.retrieve(integer_world.history(3), k=3).shortfall == 0
        wait_for(lambda: of(scrape(metrics), "calls_in_hand") == of(scrape(metrics), "waiting_calls") == 0)
        assert of(scrape(metrics), "rejections_total", reason="INTERNAL") == 0

    serve(config(integer_world, metrics_port=0), ask)


def test_a_connection_without_a_sign_of_life_is_closed(integer_world: World) -> None:
    with running_server(config(integer_world, keepalive_seconds=1)) as address, ExitStack() as stack:
        held = [stack.enter_context(one) for one in http2.half_open(address, PATH, LARGE, 4)]
        held.append(stack.enter_context(http2.slow_reader(address, PATH, LARGE, 10)))
        with RetrievalClient(address, timeout=10) as client:
            assert client.is_serving()
            start = time.monotonic()
            for connection in held:
                connection.settimeout(20)
                while connection.recv(65_536):
                    pass
            assert 1 < time.monotonic() - start < 15
            # A client of ours gives it, though it asks for nothing.
            assert client.retrieve(integer_world.history(3), k=3).shortfall == 0


def test_answers_that_nobody_takes_hold_no_slot_and_are_limited(integer_world: World) -> None:
    with running_server(config(integer_world, capacity=2)) as address, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(http2.slow_reader(address, PATH, LARGE, 2))
        # The two slots are free again, while the six answers lie there.
        wait_for(lambda: is_answered(address))
        # Of the server's first frame, SETTINGS: MAX_CONCURRENT_STREAMS, number 3.
        greeting = stack.enter_context(http2.half_open(address, PATH, LARGE, 1)[0]).recv(100)
        assert b"\x00\x03\x00\x00\x00\x22" in greeting, "the capacity and 32"


def test_callers_that_hang_up_or_send_no_text_leave_no_tracebacks_in_the_log(
    integer_world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    set_up_logs("text")
    try:
        with running_server(config(integer_world)) as address:
            for _ in range(5):
                http2.slow_reader(address, PATH, LARGE, 10).close()
                http2.attack(address, http2.call(PATH, LARGE, (b"x-request-id", b"\x99\xfe")))
            with RetrievalClient(address, timeout=10) as client:
                assert client.is_serving()
    finally:
        root.handlers[:], root.level = before
    assert "listening on" in (log := capfd.readouterr().err)
    assert "Traceback" not in log
