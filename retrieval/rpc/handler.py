"""What is around every call: who calls, how it is counted and logged, and how it ends when it fails."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from retrieval.errors import InvalidRequestError
from retrieval.rpc.logs import REQUEST_ID, request_id, request_id_of
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.security import Tokens, client_of
from retrieval.rpc.status import reason_of, status_of

__all__ = ["Method", "handlers_of", "parsed"]

Method = Callable[[bytes, grpc.aio.ServicerContext, str], Awaitable[bytes]]
"""Answers the bytes of a call; is told the call and its client."""

_log = logging.getLogger(__name__)


def handlers_of(
    service: ServiceDescriptor,
    methods: Mapping[str, Method],
    *,
    metrics: Metrics,
    tokens: Tokens | None,
    certificates: bool,
) -> grpc.GenericRpcHandler:
    """Handlers of a service.

    Args:
        service: whose `methods` these are, all of them.
        methods: by name.
        metrics: where calls are counted.
        tokens: who may call; None takes anybody.
        certificates: whether clients show certificates.
    """
    assert set(methods) == set(service.methods_by_name)

    def handler(name: str) -> grpc.RpcMethodHandler:
        return _unary(name, methods[name], metrics, tokens, certificates=certificates)

    return grpc.method_handlers_generic_handler(service.full_name, {name: handler(name) for name in methods})


def _unary(
    name: str, method: Method, metrics: Metrics, tokens: Tokens | None, *, certificates: bool
) -> grpc.RpcMethodHandler:
    """A handler from bytes to bytes: knows its client, counts its calls, ends failures with a status of ours."""

    async def call(content: bytes, context: grpc.aio.ServicerContext) -> bytes:
        start, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        remaining = context.time_remaining()
        sent: Any = context.invocation_metadata()
        this = request_id_of(sent)
        request_id.set(this)
        try:
            client = client_of(context, tokens, certificates=certificates)
            answer = await method(content, context, client)
            code = grpc.StatusCode.OK
            context.set_trailing_metadata(((REQUEST_ID, this),))
            return answer
        except Exception as error:
            status = status_of(error)
            code = status.code
            metrics.rejected(reason_of(error))
        finally:
            seconds = time.perf_counter() - start
            if code is grpc.StatusCode.CANCELLED and remaining is not None and seconds >= remaining:
                # gRPC cancels the handler of a call whose deadline passes.
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            metrics.call(name, code.name, seconds)
            _log.debug("%s ended with %s after %.2f ms", name, code.name, 1000 * seconds)
        await context.abort(status.code, status.details, (*status.trailing_metadata, (REQUEST_ID, this)))
        raise AssertionError("abort always raises")

    return grpc.unary_unary_rpc_method_handler(call)


_Message = TypeVar("_Message", bound=Message)


def parsed(kind: type[_Message], content: bytes) -> _Message:
    """A request's message.

    Raises:
        InvalidRequestError: the bytes are none.
    """
    try:
        return kind.FromString(content)
    except DecodeError:
        raise InvalidRequestError("request", f"is not a {kind.DESCRIPTOR.full_name} message") from None
