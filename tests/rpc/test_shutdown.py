"""The end of a server, in a process of its own: drained for the load balancer, held up by nobody."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.errors import UnavailableError
from tests.rpc.world import World

SERVER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from retrieval.rpc.server import ServerConfig, run_server
    config = ServerConfig(registry=Path(sys.argv[1]), port=0, drain_seconds=float(sys.argv[2]), grace_seconds=60)
    run_server(config, on_ready=lambda address: print(address, flush=True))
""")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def process(registry: Path | str, drain_seconds: float) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-c", SERVER, str(registry), str(drain_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running.stdout.readline().strip(), running
        finally:
            running.kill()


def test_a_server_that_drains_says_so_at_once_and_takes_calls_until_it_goes(integer_world: World) -> None:
    with process(integer_world.registry.location, 1.5) as (address, running), RetrievalClient(address, 10) as client:
        assert client.is_serving()
        with grpc.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            running.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            # A new connection, too: the load balancer has not noticed yet.
            with RetrievalClient(address, 10) as late:
                assert not late.is_serving()
                assert len(late.retrieve(integer_world.history(9), k=3).items) == 3
            assert running.poll() is None
            with pytest.raises(grpc.RpcError) as end:
                next(watch)
            assert end.value.code() is grpc.StatusCode.UNAVAILABLE
        assert running.wait(20) == 0
        with pytest.raises(UnavailableError):
            client.serving_state(timeout=1)


def test_an_open_health_watch_does_not_hold_up_the_end(integer_world: World) -> None:
    with process(integer_world.registry.location, 0) as (address, running), grpc.insecure_channel(address) as channel:
        watches = [
            health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service))
            for service in ("", "retrieval.v1.RetrievalService", "unknown")
        ]
        assert [next(watch).status for watch in watches] == [SERVING, SERVING, 3]
        start = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert time.monotonic() - start < 30, "the grace period is 60 s"
        assert next(watches[0]).status == NOT_SERVING
