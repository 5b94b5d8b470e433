"""OpenTelemetry traces of calls, by its own gRPC instrumentation; needs the extra `otel`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from retrieval.errors import InputError

__all__ = ["exported_traces", "tracing_interceptor"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def tracing_interceptor(provider: Any) -> grpc.aio.ServerInterceptor:
    """A span for each call, the child of the caller's if it sent a trace context; health checks have none.

    Args:
        provider: an `opentelemetry.trace.TracerProvider`.
    """
    from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters

    return aio_server_interceptor(tracer_provider=provider, filter_=filters.negate(filters.health_check()))


@contextmanager
def exported_traces() -> Iterator[list[grpc.aio.ServerInterceptor]]:
    """Interceptors of a server whose traces go where the environment says; none if it names no OTLP endpoint.

    The variables are OpenTelemetry's: OTEL_EXPORTER_OTLP_ENDPOINT turns traces on, OTEL_SERVICE_NAME and
    OTEL_TRACES_SAMPLER work as everywhere. What is not yet sent is sent at the end of the block.

    Raises:
        InputError: an endpoint is named, but OpenTelemetry is not installed.
    """
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        yield []
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise InputError(f"{endpoint} is set, but {error.name} is not installed; install retrieval[otel]") from None
    # OTEL_SERVICE_NAME stands above this name.
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "retrieval"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    try:
        yield [tracing_interceptor(provider)]
    finally:
        provider.shutdown()
