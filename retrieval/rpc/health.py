"""The standard health service, whose watchers let a server go.

The one that comes with gRPC keeps every `Watch` open for as long as its client likes, so that a server that stops
waits for its whole grace period.
"""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["Health"]

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Health of a server as a whole ("") and of its services, on one event loop. All begin as NOT_SERVING.

    Args:
        services: names that are known; "" is always.
    """

    def __init__(self, *services: str) -> None:
        self._services = {"", *services}
        self._serving = self._closed = False
        self._changed = asyncio.Event()

    def set_serving(self, serving: bool) -> None:
        """Tell whether the server serves."""
        self._serving = serving
        self._tell()

    def close(self) -> None:
        """End all watches, now and from now on."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status_of(self, service: str) -> int:
        if service not in self._services:
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if self._serving else _Response.NOT_SERVING)

    async def Check(  # noqa: D102 (gRPC's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._status_of(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this server has no such service")
        return _Response(status=status)

    async def Watch(  # noqa: D102 (gRPC's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        told: int | None = None
        while True:
            changed, status = self._changed, self._status_of(request.service)
            if status != told:
                await context.write(_Response(status=status))
                told = status
                continue
            if self._closed:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            await changed.wait()
