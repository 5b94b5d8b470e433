"""Connections of clients: what all of their calls have in common. Loads no more than `rpc.client`."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from retrieval.rpc.status import error_of
from retrieval.rpc.throttle import Throttle

__all__ = ["AsyncConnection", "Connection"]

_OPTIONS = [
    # Embeddings of many users are larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
]


class Connection:
    """A connection to a server. Any number of threads may share it.

    Args:
        address: HOST:PORT of the server.
        timeout: seconds that a call may take unless it says otherwise.
        credentials: `grpc.ssl_channel_credentials(root, key, certificate)` for a server with TLS; None is in the clear.
        token: bearer token, for a server that asks for one.
        service_config: gRPC's, as JSON: which calls are tried again when.
    """

    def __init__(
        self,
        address: str,
        timeout: float,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        service_config: str | None = None,
    ) -> None:
        self._address, self._timeout, self._metadata = address, timeout, _authorization(token)
        if credentials is not None:
            self._channel = grpc.secure_channel(address, credentials, options=_options(service_config))
        else:
            self._channel = grpc.insecure_channel(address, options=_options(service_config))

    def _described(self, method: MethodDescriptor) -> Callable[..., Any]:
        """A method of ours."""
        messages = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        return self._method(f"/{method.containing_service.full_name}/{method.name}", *messages)

    def _method(self, path: str, request: Any, response: Any) -> Callable[..., Any]:
        """A method by its path, /PACKAGE.SERVICE/METHOD, and the classes of its messages."""
        method: Callable[..., Any] = self._channel.unary_unary(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return method

    def _call(
        self,
        method: Callable[..., Any],
        message: Any,
        timeout: float | None,
        throttle: Throttle | None = None,
        calls: int = 1,
    ) -> Any:
        """Send a message and wait for the answer; it counts as so many calls of a throttle."""
        seconds = timeout if timeout is not None else self._timeout
        with _counted(throttle, calls):
            try:
                return method(message, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                raise error_of(error, self._address, seconds) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()


class AsyncConnection:
    """`Connection` for asyncio, to be made and used in one event loop."""

    def __init__(
        self,
        address: str,
        timeout: float,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        service_config: str | None = None,
    ) -> None:
        self._address, self._timeout, self._metadata = address, timeout, _authorization(token)
        if credentials is not None:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_options(service_config))
        else:
            self._channel = grpc.aio.insecure_channel(address, options=_options(service_config))

    def _described(self, method: MethodDescriptor) -> Callable[..., Awaitable[Any]]:
        """A method of ours."""
        messages = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        return self._method(f"/{method.containing_service.full_name}/{method.name}", *messages)

    def _method(self, path: str, request: Any, response: Any) -> Callable[..., Awaitable[Any]]:
        method: Callable[..., Awaitable[Any]] = self._channel.unary_unary(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return method

    async def _call(
        self,
        method: Callable[..., Awaitable[Any]],
        message: Any,
        timeout: float | None,
        throttle: Throttle | None = None,
        calls: int = 1,
    ) -> Any:
        seconds = timeout if timeout is not None else self._timeout
        with _counted(throttle, calls):
            try:
                return await method(message, timeout=seconds, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                raise error_of(error, self._address, seconds) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()


def _counted(throttle: Throttle | None, calls: int) -> AbstractContextManager[None]:
    return throttle.call(calls) if throttle is not None else nullcontext()


def _options(service_config: str | None) -> list[tuple[str, Any]]:
    return _OPTIONS if service_config is None else [*_OPTIONS, ("grpc.service_config", service_config)]


def _authorization(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call: the bearer token, if there is one."""
    return (("authorization", f"Bearer {token}"),) if token is not None else ()
