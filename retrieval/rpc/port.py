"""A port on which gRPC services are offered."""

import logging
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from retrieval.errors import InputError
from retrieval.rpc.accept import accepting_ahead
from retrieval.rpc.health import Health

__all__ = ["Port"]

_log = logging.getLogger(__name__)


class Port:
    """A gRPC server at one address.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        credentials: for TLS; None sends everything in the clear.
        options: gRPC's, beside those that every port has.
        interceptors: gRPC interceptors around every call.
    """

    def __init__(
        self,
        host: str,
        port: int,
        credentials: grpc.ServerCredentials | None,
        options: Sequence[tuple[str, int]] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._host = f"[{host}]" if ":" in host else host
        self._port, self._credentials = port, credentials
        # Otherwise a second server on a taken port would silently share its calls.
        alone = ("grpc.so_reuseport", 0)
        with accepting_ahead():
            self._server = grpc.aio.server(options=[*options, alone], interceptors=interceptors)
        self._names: list[str] = []

    @property
    def address(self) -> str:
        """HOST:PORT that a client on this machine can use."""
        return f"{self._host}:{self._port}"

    def offer(self, name: str, handlers: grpc.GenericRpcHandler) -> None:
        """Offer a service of this name; before `start`."""
        self._server.add_generic_rpc_handlers((handlers,))
        self._names.append(name)

    def offer_health(self, servicer: Health) -> None:
        """Offer the standard health service; before `start`."""
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        self._names.append(health.SERVICE_NAME)

    def offer_reflection(self) -> None:
        """Offer reflection of what is offered already."""
        reflection.enable_server_reflection((*self._names, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Listen.

        Raises:
            InputError: the port is taken or the host is not this machine's.
        """
        try:
            if self._credentials is not None:
                self._port = self._server.add_secure_port(self.address, self._credentials)
            else:
                self._port = self._server.add_insecure_port(self.address)
        except RuntimeError:
            raise InputError(f"{self.address}: cannot listen there; is the port taken by another server?") from None
        await self._server.start()
        _log.info("listening on %s: %s", self.address, ", ".join(self._names))

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, give those in hand this time to finish, and close."""
        await self._server.stop(grace_seconds)
