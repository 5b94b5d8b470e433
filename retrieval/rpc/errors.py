"""Errors that only a service and its client have; the others are in `retrieval.errors`."""

from retrieval.errors import InputError, RetrievalError

__all__ = [
    "DeadlineError",
    "NoHistoriesError",
    "OverloadedError",
    "ServerFaultError",
    "UnauthenticatedError",
    "UnavailableError",
    "VersionNotLoadedError",
]


class NoHistoriesError(InputError):
    """A request names a stored user, but the server holds no histories."""


class VersionNotLoadedError(InputError):
    """A request requires a snapshot that is not the live one."""


class UnauthenticatedError(RetrievalError):
    """The server asks for a token, and the call has no valid one."""


class OverloadedError(RetrievalError):
    """The server has more work than it takes; trying again a little later may help.

    Attributes:
        retry_seconds: after how long, as far as the server knows; None if it does not.
        by_client: whether the client refused the call by itself and sent nothing.
    """

    def __init__(self, message: str, retry_seconds: float | None = None, *, by_client: bool = False) -> None:
        super().__init__(message)
        self.retry_seconds, self.by_client = retry_seconds, by_client


class DeadlineError(RetrievalError):
    """No answer came within the call's deadline."""


class UnavailableError(RetrievalError):
    """No server answers at the address."""


class ServerFaultError(RetrievalError):
    """The server failed for a reason of its own, or answered as this client does not expect."""
