"""What a scrape says after calls over real sockets."""

import asyncio
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrieval.errors import InputError, InvalidRequestError
from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.errors import DeadlineError
from retrieval.rpc.server import Server, ServerConfig
from tests.rpc.test_server import Gate, gate, wait_for
from tests.rpc.world import ITEMS, World

__all__ = ["gate"]

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(address: str) -> Figures:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(figures: Figures, name: str, **labels: str) -> float:
    return figures.get((f"retrieval_{name}", frozenset(labels.items())), 0.0)


def serve(config: ServerConfig, ask: Callable[[str, str], None]) -> None:
    """Run `ask(address, metrics address)` beside a server."""

    async def run() -> None:
        server = Server(config)
        try:
            await server.start()
            assert server.metrics_address is not None
            await asyncio.to_thread(ask, server.address, server.metrics_address)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_served_calls_move_the_counters(integer_world: World) -> None:
    history = integer_world.history(9)

    def ask(address: str, metrics: str) -> None:
        before = scrape(metrics)
        assert of(before, "calls_total", method="Retrieve", code="OK") == 0
        with RetrievalClient(address, timeout=10) as client:
            client.retrieve(history, k=3)
            client.retrieve(history, k=ITEMS + 1)
            client.embed_users([history])
            with pytest.raises(InvalidRequestError):
                client.retrieve(history, k=0)
            version = client.serving_state().snapshot_version
        after = scrape(metrics)
        assert of(after, "calls_total", method="Retrieve", code="OK") == 2
        assert of(after, "calls_total", method="Retrieve", code="INVALID_ARGUMENT") == 1
        assert of(after, "calls_total", method="EmbedUsers", code="OK") == 1
        assert of(after, "call_seconds_count", method="Retrieve", code="OK") == 2
        assert of(after, "call_seconds_count", method="Retrieve", code="INVALID_ARGUMENT") == 1
        for stage in ("decode", "queue"):
            assert of(after, "stage_seconds_count", stage=stage) == 4, f"{stage}: the refused call, too"
        for stage in ("encode", "answer"):
            assert of(after, "stage_seconds_count", stage=stage) == 3, stage
        assert of(after, "stage_seconds_count", stage="search") == 2, "EmbedUsers searches nothing"
        assert of(after, "batch_size_count") == of(after, "batch_size_sum") == 4
        assert of(after, "rejections_total", reason="INVALID_REQUEST") == 1
        assert of(after, "shortfalls_total") == 1
        assert of(after, "waiting_calls") == of(after, "calls_in_hand") == 0
        assert of(after, "snapshot", version=version) == 1
        assert of(after, "snapshot_loads_total", result="loaded") == 1
        assert 0 < of(after, "snapshot_age_seconds") < 3600

    serve(ServerConfig(registry=integer_world.registry.location, port=0, metrics_port=0), ask)


def test_calls_before_the_first_snapshot_are_counted_as_rejections(tmp_path: Path) -> None:
    def ask(address: str, metrics: str) -> None:
        with RetrievalClient(address, timeout=10) as client, pytest.raises(Exception, match="no snapshot"):
            client.serving_state()
        figures = scrape(metrics)
        # The client tries again.
        assert of(figures, "rejections_total", reason="NO_SNAPSHOT") > 0
        assert of(figures, "snapshot_age_seconds") != of(figures, "snapshot_age_seconds"), "not a number"

    serve(ServerConfig(registry=tmp_path, port=0, metrics_port=0), ask)


def test_a_taken_metrics_port_is_one_clear_sentence(integer_world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = ServerConfig(registry=integer_world.registry.location, port=0, metrics_port=port)
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot serve metrics there"):
            serve(config, lambda *_: None)


def test_a_deadline_that_passes_is_no_cancellation(integer_world: World, gate: Gate) -> None:
    history = integer_world.history(9)

    def ask(address: str, metrics: str) -> None:
        with RetrievalClient(address) as client, pytest.raises(DeadlineError):
            client.retrieve(history, k=3, timeout=0.2)
        wait_for(lambda: of(scrape(metrics), "calls_total", method="Retrieve", code="DEADLINE_EXCEEDED") == 1)
        assert of(scrape(metrics), "calls_total", method="Retrieve", code="CANCELLED") == 0
        gate.open.set()

    serve(ServerConfig(registry=integer_world.registry.location, port=0, metrics_port=0), ask)
