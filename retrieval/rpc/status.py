"""Errors ↔ gRPC statuses: the one place that knows which error has which code. Used by both ends."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc

from retrieval.errors import (
    HistoryStoreError,
    InvalidRequestError,
    NoSnapshotError,
    RetrievalError,
    SnapshotConflictError,
    SnapshotCorruptError,
    SnapshotError,
    UnknownUserError,
    UnknownVersionError,
)
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.errors import (
    DeadlineError,
    NoHistoriesError,
    OverloadedError,
    ServerFaultError,
    UnauthenticatedError,
    UnavailableError,
    VersionNotLoadedError,
)
from retrieval.rpc.standard import details_from, details_to

__all__ = ["DOMAIN", "CallStatus", "error_from", "error_of", "error_to", "reason_of", "status_of"]

DOMAIN = "retrieval.v1"

_DETAILS = "grpc-status-details-bin"
# gRPC's own retries wait so many milliseconds.
_PUSHBACK = "grpc-retry-pushback-ms"

# Characters of a sentence: a status travels in headers, which hold a few KiB.
_LONGEST = 1000

_log = logging.getLogger(__name__)

# Error, code, ErrorInfo.reason; documented at the top of retrieval.proto and admin.proto. The first that fits counts.
_TABLE: tuple[tuple[type[RetrievalError], grpc.StatusCode, str], ...] = (
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (UnknownUserError, grpc.StatusCode.NOT_FOUND, "UNKNOWN_USER"),
    (NoHistoriesError, grpc.StatusCode.FAILED_PRECONDITION, "NO_HISTORIES"),
    (VersionNotLoadedError, grpc.StatusCode.FAILED_PRECONDITION, "VERSION_NOT_LOADED"),
    (NoSnapshotError, grpc.StatusCode.UNAVAILABLE, "NO_SNAPSHOT"),
    (HistoryStoreError, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (UnknownVersionError, grpc.StatusCode.NOT_FOUND, "UNKNOWN_VERSION"),
    (SnapshotConflictError, grpc.StatusCode.ABORTED, "SNAPSHOT_CONFLICT"),
    (SnapshotCorruptError, grpc.StatusCode.FAILED_PRECONDITION, "SNAPSHOT_CORRUPT"),
    (SnapshotError, grpc.StatusCode.FAILED_PRECONDITION, "SNAPSHOT_ERROR"),
)
_BY_REASON = {reason: error for error, _, reason in _TABLE}
_INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class CallStatus:
    """How a failed call ends.

    Attributes:
        code: gRPC's code.
        details: one sentence.
        trailing_metadata: the structured details, and when to try again where that is known.
    """

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def _entry(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Code and reason of an error."""
    found = ((code, reason) for kind, code, reason in _TABLE if isinstance(error, kind))
    return next(found, (grpc.StatusCode.INTERNAL, _INTERNAL))


def _told(error: Exception) -> str:
    """What a client is told of an error.

    One that the table does not list is a fault of the server, and addresses and files of ours are the operator's to
    know: these are logged, and the client learns no more than that.
    """
    if isinstance(error, HistoryStoreError):
        _log.error("%s", error)
        return "the store of histories cannot be used at the moment"
    if reason_of(error) == _INTERNAL:
        _log.error("a call failed", exc_info=error)
        return "the server failed on this call; its log says why"
    sentence = str(error)
    return sentence if len(sentence) <= _LONGEST else f"{sentence[:_LONGEST]}…"


def reason_of(error: Exception) -> str:
    """The ErrorInfo.reason that a failed call ends with."""
    return _entry(error)[1]


@lru_cache(maxsize=256)
def _details(code: int, message: str, reason: str, field: str, description: str) -> bytes:
    """Kept, since who is refused for want of capacity is one of many."""
    return details_to(code, message, DOMAIN, reason, field, description)


def status_of(error: Exception) -> CallStatus:
    """The status that a failed call ends with; what only the operator may know is logged."""
    (code, reason), message = _entry(error), _told(error)
    field, description = (error.field, error.reason) if isinstance(error, InvalidRequestError) else ("", "")
    metadata: list[tuple[str, str | bytes]] = [(_DETAILS, _details(code.value[0], message, reason, field, description))]
    if isinstance(error, OverloadedError) and error.retry_seconds is not None:
        metadata.append((_PUSHBACK, str(max(1, round(1000 * error.retry_seconds)))))
    return CallStatus(code, message, tuple(metadata))


def error_to(error: Exception) -> pb.Error:
    """An error of one request among several; what only the operator may know is logged."""
    code, reason = _entry(error)
    if isinstance(error, InvalidRequestError):
        return pb.Error(code=code.value[0], reason=reason, message=error.reason, field=error.field)
    return pb.Error(code=code.value[0], reason=reason, message=_told(error))


def error_from(message: pb.Error) -> RetrievalError:
    """The error that a client has of one request among several."""
    known = _known(message.reason, message.message, message.field, message.message)
    return known if known is not None else ServerFaultError(f"code {message.code}: {message.message}")


def error_of(call: grpc.RpcError, address: str, timeout: float | None) -> RetrievalError:
    """The error that a client raises for a failed call.

    Args:
        call: what gRPC raised; it has the call's code, details and trailing metadata, too.
        address: the server's address, for messages.
        timeout: the call's deadline in seconds, for messages.
    """
    assert isinstance(call, grpc.Call | grpc.aio.AioRpcError)
    code, sentence = call.code(), call.details() or ""
    metadata: Any = call.trailing_metadata() or ()
    content = next((value for key, value in metadata if key == _DETAILS), b"")
    reason, field, description = details_from(content, code.value[0], DOMAIN)
    known = _known(reason, sentence, field or "request", description)
    if known is not None:
        return known
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{address}: no answer within {timeout:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"{address}: no server answers ({sentence})")
    return ServerFaultError(f"{address}: {code.name}: {sentence}")


def _known(reason: str, sentence: str, field: str, description: str) -> RetrievalError | None:
    """The error of a reason of ours; None of any other."""
    if reason == "INVALID_REQUEST":
        return InvalidRequestError(field, description)
    return _BY_REASON[reason](sentence) if reason in _BY_REASON else None
