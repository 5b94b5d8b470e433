"""What a registry asks of the place where it lies; `local_storage` and `object_storage` are the two that there are."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["CURRENT", "LEASE", "Grant", "Storage"]

CURRENT, LEASE = "CURRENT", "LEASE"


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease that was granted.

    Attributes:
        token: greater than that of every lease before it, and than every version's number.
        confirm: raises `SnapshotConflictError` if the lease has passed to another meanwhile.
    """

    token: int
    confirm: Callable[[], None]


class Storage(Protocol):
    """Snapshots and the pointer to the live one, in one place. Failures of the place are `SnapshotError`s."""

    def versions(self) -> list[str]:
        """Names of all complete snapshots, in any order."""

    def manifest(self, version: str) -> bytes:
        """The bytes of a version's manifest."""

    def folder(self, version: str) -> Path:
        """A folder on this machine with a version's files."""

    def add(self, fill: Callable[[Path], str]) -> str:
        """Add a snapshot, which appears whole or not at all; only for the holder of the lease.

        Args:
            fill: fills the empty folder that it is given and returns the version's name.

        Returns:
            the version's name.
        """

    def remove(self, version: str) -> bool:
        """Remove a version; false if it stays because somebody on this machine is reading it."""

    def pointer(self) -> bytes | None:
        """Contents of CURRENT; None where there is none."""

    def replace_pointer(self, content: bytes, *, instead_of: bytes | None) -> None:
        """Replace CURRENT at once, and only if it still reads `instead_of`.

        Raises:
            SnapshotConflictError: it reads something else by now.
        """

    def lease(self) -> AbstractContextManager[Grant]:
        """The right to add and remove, which one process has at a time; sweeps what a killed holder left.

        Raises:
            RegistryBusyError: another has it.
        """
