"""Typed errors, each with the exit code that the command line gives it.

A user's mistake is an `InputError` and reads as one sentence that names what was wrong and where. A broken
invariant of our own is an `assert`, not an error of this module. The mapping to gRPC codes is in `rpc.status`.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FilterError",
    "HistoryCorruptError",
    "HistoryStoreError",
    "InputError",
    "InvalidRequestError",
    "NoSnapshotError",
    "RegistryBusyError",
    "RetrievalError",
    "SnapshotConflictError",
    "SnapshotCorruptError",
    "SnapshotError",
    "TrainingError",
    "TrainingStoppedError",
    "UnknownUserError",
    "UnknownVersionError",
]


class RetrievalError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class InputError(RetrievalError):
    """The user gave something that cannot be used: a file, an option, a request."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration has an unknown key or an impossible value."""


class DataError(InputError):
    """Event logs, item metadata or a dataset folder cannot be used."""


class CheckpointError(InputError):
    """An encoder checkpoint is missing, damaged or belongs to other data."""


class TrainingError(RetrievalError):
    """Training cannot go on; the last good checkpoint stays."""


class TrainingStoppedError(RetrievalError):
    """A signal ended training in good order; it can be resumed. The exit code is a shell's, 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class GateRefusedError(RetrievalError):
    """A rebuilt snapshot is not good enough to be published; the live one stays."""

    exit_code = 3


class FilterError(InputError):
    """A filter cannot be read, or cannot be asked of the catalogue's attributes."""


class InvalidRequestError(InputError):
    """A retrieval request is malformed; `field` names the part of the request at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.reason = message


class UnknownUserError(InputError):
    """A request names a user of whom no history is stored."""


class HistoryStoreError(RetrievalError):
    """The store of users' histories cannot be read or written; trying again later may help."""


class HistoryCorruptError(RetrievalError):
    """What is stored of a user is not a history."""


class SnapshotError(RetrievalError):
    """A snapshot or registry cannot be read or written."""


class UnknownVersionError(SnapshotError):
    """A registry has no such version, or it is about to be removed."""


class SnapshotCorruptError(SnapshotError):
    """A snapshot's bytes differ from what its manifest promises."""


class SnapshotConflictError(SnapshotError):
    """Somebody else changed a registry's live version, or took its lease, in the meantime."""


class RegistryBusyError(SnapshotError):
    """Another rebuild or publication is at work in a registry."""

    exit_code = 2


class NoSnapshotError(SnapshotError):
    """The registry holds no live snapshot (yet)."""
