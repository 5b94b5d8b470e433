"""Errors that only a service and its client have; the others are in `retrieval.errors`."""

from retrieval.errors import InputError, RetrievalError

__all__ = [
    "DeadlineError",
    "NoHistoriesError",
    "OverloadedError",
    "ServerFaultError",
    "UnavailableError",
    "VersionNotLoadedError",
]


class NoHistoriesError(InputError):
    """A request names a stored user, but the server holds no histories."""


class VersionNotLoadedError(InputError):
    """A request requires a snapshot that is not the live one."""


class OverloadedError(RetrievalError):
    """The server has more calls in hand than it takes; trying again a little later may help."""


class DeadlineError(RetrievalError):
    """No answer came within the call's deadline."""


class UnavailableError(RetrievalError):
    """No server answers at the address."""


class ServerFaultError(RetrievalError):
    """The server failed for a reason of its own, or answered as this client does not expect."""
