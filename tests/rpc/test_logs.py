"""Request ids and JSON lines, as a client and as a reader of the log sees them."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from retrieval.rpc.logs import request_id_of
from retrieval.rpc.server import ServerConfig, running_server
from tests.rpc import http2
from tests.rpc.world import World

STATE, RETRIEVE = (f"/retrieval.v1.RetrievalService/{method}" for method in ("GetServingState", "Retrieve"))


@pytest.fixture(scope="module")
def channel(integer_world: World) -> Iterator[grpc.Channel]:
    with (
        running_server(ServerConfig(registry=integer_world.registry.location, port=0)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield channel


def ids(call: grpc.Call) -> list[str]:
    return [value for key, value in call.trailing_metadata() if key == "x-request-id"]


def test_a_request_id_comes_back_with_answers_and_refusals(channel: grpc.Channel) -> None:
    sent = (("x-request-id", "page-view/17"),)
    _, call = channel.unary_unary(STATE).with_call(b"", metadata=sent)
    assert ids(call) == ["page-view/17"]
    with pytest.raises(grpc.RpcError) as refusal:
        channel.unary_unary(RETRIEVE)(b"", metadata=sent)
    assert ids(refusal.value) == ["page-view/17"]


def test_calls_without_an_id_get_one_each(channel: grpc.Channel) -> None:
    calls = [channel.unary_unary(STATE).with_call(b"")[1] for _ in range(2)]
    (first,), (second,) = map(ids, calls)
    assert len(first) == len(second) == 16
    assert first != second


@pytest.mark.parametrize("sent", ["", "two\nlines", "x" * 129, "a b", '"'])
def test_an_id_that_would_disturb_a_log_is_replaced(sent: str) -> None:
    assert request_id_of([("x-request-id", sent)]) != sent


def test_every_log_line_of_a_call_is_json_with_its_id(integer_world: World) -> None:
    command = [sys.executable, "-m", "retrieval.cli.main", "serve", str(integer_world.registry.location), "--port", "0"]
    options = ["--log-format", "json", "--log-level", "debug"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        with grpc.insecure_channel(address) as channel:
            channel.unary_unary(STATE)(b"", metadata=(("x-request-id", "one-of-ours"),), timeout=10)
        # Of which gRPC's core would write lines of its own.
        http2.attack(address, http2.call(STATE, b"", (b"grpc-timeout", b"xS")))
        process.terminate()
        _, log = process.communicate(timeout=30)
    lines = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    (ours,) = (line for line in lines if line.get("request_id") == "one-of-ours")
    assert ours["message"].startswith("GetServingState ended with OK")
    assert logging.getLevelName(ours["level"]) == logging.DEBUG
