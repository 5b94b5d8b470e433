"""Errors ↔ gRPC statuses: the one place that knows which error has which code."""

import logging

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from retrieval.errors import (
    HistoryStoreError,
    InvalidRequestError,
    NoSnapshotError,
    RetrievalError,
    UnknownUserError,
)
from retrieval.rpc.errors import (
    DeadlineError,
    NoHistoriesError,
    OverloadedError,
    ServerFaultError,
    UnauthenticatedError,
    UnavailableError,
    VersionNotLoadedError,
)

__all__ = ["DOMAIN", "error_of", "reason_of", "status_of"]

DOMAIN = "retrieval.v1"

# gRPC's own retries wait so many milliseconds.
_PUSHBACK = "grpc-retry-pushback-ms"

_log = logging.getLogger(__name__)

# Error, code, ErrorInfo.reason; documented at the top of retrieval.proto.
_TABLE: tuple[tuple[type[RetrievalError], int, str], ...] = (
    (InvalidRequestError, code_pb2.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (UnknownUserError, code_pb2.NOT_FOUND, "UNKNOWN_USER"),
    (NoHistoriesError, code_pb2.FAILED_PRECONDITION, "NO_HISTORIES"),
    (VersionNotLoadedError, code_pb2.FAILED_PRECONDITION, "VERSION_NOT_LOADED"),
    (NoSnapshotError, code_pb2.UNAVAILABLE, "NO_SNAPSHOT"),
    (HistoryStoreError, code_pb2.UNAVAILABLE, "STORE_UNAVAILABLE"),
    (UnauthenticatedError, code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (OverloadedError, code_pb2.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (DeadlineError, code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
)
_BY_REASON = {reason: error for error, _, reason in _TABLE}


def _packed(*details: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest) -> list[any_pb2.Any]:
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)
        packed.append(box)
    return packed


def reason_of(error: Exception) -> str:
    """The ErrorInfo.reason that a failed call ends with."""
    return next((reason for kind, _, reason in _TABLE if isinstance(error, kind)), "INTERNAL")


def status_of(error: Exception) -> grpc.Status:
    """The status that a failed call ends with.

    An error that the table does not list is a fault of the server: it is logged, and the client learns no more than
    that.
    """
    for kind, code, reason in _TABLE:
        if not isinstance(error, kind):
            continue
        details = _packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
        if isinstance(error, InvalidRequestError):
            violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.reason)
            details += _packed(error_details_pb2.BadRequest(field_violations=[violation]))
        message = str(error)
        if isinstance(error, HistoryStoreError):
            # Addresses and files of ours are the operator's to know.
            _log.error("%s", message)
            message = "the store of histories cannot be used at the moment"
        status = rpc_status.to_status(status_pb2.Status(code=code, message=message, details=details))
        if isinstance(error, OverloadedError) and error.retry_seconds is not None:
            pushback = (_PUSHBACK, str(max(1, round(1000 * error.retry_seconds))))
            status = status._replace(trailing_metadata=(*status.trailing_metadata, pushback))
        return status
    _log.error("a call failed", exc_info=error)
    return rpc_status.to_status(
        status_pb2.Status(
            code=code_pb2.INTERNAL,
            message="the server failed on this call; its log says why",
            details=_packed(error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN)),
        )
    )


def error_of(call: grpc.RpcError, address: str, timeout: float | None) -> RetrievalError:
    """The error that a client raises for a failed call.

    Args:
        call: what gRPC raised; it has the call's code, details and trailing metadata, too.
        address: the server's address, for messages.
        timeout: the call's deadline in seconds, for messages.
    """
    assert isinstance(call, grpc.Call | grpc.aio.AioRpcError)
    code, sentence = call.code(), call.details() or ""
    reason, field, description = _details(call)
    if reason == "INVALID_REQUEST":
        return InvalidRequestError(field, description)
    if reason in _BY_REASON:
        return _BY_REASON[reason](sentence)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{address}: no answer within {timeout:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"{address}: no server answers ({sentence})")
    return ServerFaultError(f"{address}: {code.name}: {sentence}")


def _details(call: "grpc.Call | grpc.aio.AioRpcError") -> tuple[str, str, str]:
    """ErrorInfo.reason of our domain, and the first field violation; empty where a failure carries none."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:
        # Details that contradict the code: not from our server.
        status = None
    reason, field, description = "", "request", ""
    for box in status.details if status is not None else ():
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if box.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
        elif box.Unpack(bad) and bad.field_violations:
            field, description = bad.field_violations[0].field, bad.field_violations[0].description
    return reason, field, description
