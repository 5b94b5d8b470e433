"""Logs of a server: plain lines, or JSON lines for machines, each with the id of the request that it is about."""

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

__all__ = ["REQUEST_ID", "LogFormat", "request_id", "request_id_of", "set_up_logs"]

LogFormat = Literal["text", "json"]

REQUEST_ID = "x-request-id"
"""Metadata key, in calls and in trailing metadata of answers."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that this task works on; empty outside of calls."""

# What cannot disturb a log or a header.
_SOUND = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id_of(metadata: object) -> str:
    """The id that a caller sent in the metadata of a call; a new one if it sent none, or one that is not sound."""
    for key, value in metadata or ():  # type: ignore[attr-defined]
        if key == REQUEST_ID and isinstance(value, str) and _SOUND.fullmatch(value):
            return value
    return secrets.token_hex(8)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, current = super().formatMessage(record), request_id.get()
        return f"{line} [{current}]" if current else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _is_no_callers_doing(record: logging.LogRecord) -> bool:
    """Whether a record of gRPC's own is news: callers that hang up, or send headers that are no text, are not."""
    return not str(record.msg).startswith(("ExecuteBatchError", "Invalid encoding"))


def set_up_logs(kind: LogFormat, level: str = "INFO") -> None:
    """Send this process's logs to standard error.

    Args:
        kind: plain lines, or one JSON object per line: time, level, logger, message, request_id, exception.
        level: the least that is logged; "DEBUG" has a line for every call.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if kind == "json" else _Text())
    # With a traceback for each call, and the caller's bytes in it.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_callers_doing)
    logging.basicConfig(level=level, handlers=[handler], force=True)
