"""Spans of calls over real sockets, in an exporter in memory."""

import asyncio
from pathlib import Path

import grpc
import pytest

from retrieval.errors import InputError
from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.server import Server, ServerConfig
from retrieval.rpc.tracing import exported_traces, tracing_interceptor
from tests.rpc.world import World

pytest.importorskip("opentelemetry.instrumentation.grpc", reason="needs the extra otel")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_call_is_a_span_below_its_callers_and_a_health_check_is_none(integer_world: World) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel, RetrievalClient(address, 10) as client:
            assert client.is_serving()
            sent = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
            channel.unary_unary("/retrieval.v1.RetrievalService/GetServingState")(b"", metadata=sent, timeout=10)
            with pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary("/retrieval.v1.RetrievalService/Retrieve")(b"", timeout=10)
            assert "must be from 1" in refusal.value.details()

    async def run() -> None:
        config = ServerConfig(registry=integer_world.registry.location, port=0)
        server = Server(config, interceptors=[tracing_interceptor(provider)])
        try:
            await server.start()
            await asyncio.to_thread(ask, server.address)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), 30))
    state, retrieve = sorted(exporter.get_finished_spans(), key=lambda span: span.name)
    assert [span.name.rpartition("/")[2] for span in (state, retrieve)] == ["GetServingState", "Retrieve"]
    assert state.context is not None
    assert state.parent is not None
    assert (f"{state.context.trace_id:032x}", f"{state.parent.span_id:016x}") == (TRACE, CALLER)
    assert retrieve.attributes is not None
    assert retrieve.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_traces_are_off_unless_the_environment_names_where_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with exported_traces() as interceptors:
        assert interceptors == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    with exported_traces() as interceptors:
        assert len(interceptors) == 1


def test_an_endpoint_without_the_packages_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*retrieval\[otel\]"), exported_traces():
        pass
