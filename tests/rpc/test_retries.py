"""What the client does by itself: deadlines, second attempts, and sharing calls among replicas."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from retrieval.rpc.admin_client import AdminClient
from retrieval.rpc.aio import AsyncRetrievalClient
from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.errors import ServerFaultError, UnavailableError
from retrieval.rpc.server import SERVICE, ServerConfig, running_server
from retrieval.snapshot.registry import Registry
from tests.rpc.world import World, make_encoder, publish

ADMIN = "retrieval.v1.AdminService"


class Moody:
    """A server whose first calls fail with a code; notes the seconds that each call had left."""

    def __init__(self, failures: int, code: grpc.StatusCode) -> None:
        self.failures, self.code = failures, code
        self.remaining: list[float] = []

    def __call__(self, content: bytes, context: grpc.ServicerContext) -> bytes:
        self.remaining.append(context.time_remaining())
        if len(self.remaining) <= self.failures:
            context.abort(self.code, "not now")
        return b""


@contextmanager
def serving(moody: Moody) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(moody)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SERVICE, {"GetServingState": handler}),
            grpc.method_handlers_generic_handler(ADMIN, {"RollbackSnapshot": handler}),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def ask(address: str) -> None:
    with RetrievalClient(address) as client:
        client.serving_state()


def ask_asynchronously(address: str) -> None:
    async def over() -> None:
        async with AsyncRetrievalClient(address) as client:
            await client.serving_state()

    asyncio.run(over())


@pytest.mark.parametrize("client", [ask, ask_asynchronously])
def test_a_server_that_is_away_for_a_moment_is_asked_again_within_the_deadline(client: Callable[[str], None]) -> None:
    moody = Moody(4, grpc.StatusCode.UNAVAILABLE)
    with serving(moody) as address:
        client(address)
    assert len(moody.remaining) == 5
    # A second unless the caller says otherwise, for all attempts together.
    # gRPC sends the time rounded up.
    assert 1.02 >= moody.remaining[0] > moody.remaining[-1] > 0


@pytest.mark.parametrize("client", [ask, ask_asynchronously])
def test_after_five_attempts_a_server_is_unavailable(client: Callable[[str], None]) -> None:
    moody = Moody(9, grpc.StatusCode.UNAVAILABLE)
    with serving(moody) as address, pytest.raises(UnavailableError, match="not now"):
        client(address)
    assert len(moody.remaining) == 5


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_a_failure_that_a_second_attempt_would_make_worse_is_told_at_once(code: grpc.StatusCode) -> None:
    moody = Moody(1, code)
    with serving(moody) as address, pytest.raises(ServerFaultError, match="not now"):
        ask(address)
    assert len(moody.remaining) == 1


def test_a_rollback_is_not_attempted_twice() -> None:
    moody = Moody(1, grpc.StatusCode.UNAVAILABLE)
    with serving(moody) as address, AdminClient(address) as admin, pytest.raises(UnavailableError):
        admin.roll_back()
    assert len(moody.remaining) == 1


def test_calls_are_shared_among_replicas_and_go_on_without_one_of_them(integer_world: World, tmp_path: Path) -> None:
    registries = [Registry(tmp_path / name) for name in ("a", "b")]
    versions = [publish(one, integer_world.dataset, make_encoder(seed)) for seed, one in enumerate(registries)]
    configs = [ServerConfig(registry=registry.location, port=0) for registry in registries]
    with running_server(configs[0]) as first:
        with running_server(configs[1]) as second:
            # Two addresses of one name, without a name server.
            client = RetrievalClient(f"ipv4:{first},{second}", timeout=20)
            seen = [client.serving_state().snapshot_version for _ in range(20)]
            assert set(seen) == set(versions)
        with client:
            assert {client.serving_state().snapshot_version for _ in range(10)} == {versions[0]}
