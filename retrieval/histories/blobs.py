"""What histories need of a place that keeps bytes by key."""

from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Blobs", "Change"]

Change = Callable[[bytes, bytes | None], bytes]
"""From a key and the bytes held there, or None, to the bytes to hold. May be called more than once."""


class Blobs(Protocol):
    """Bytes by key, durable. Any thread may read; one thread at a time writes, beside other processes."""

    def get(self, key: bytes) -> bytes | None:
        """The bytes of a key, None where there are none.

        Raises:
            HistoryStoreError: they cannot be read.
        """
        ...

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """Replace the bytes of each key by what `change` makes of them, atomically key by key; durable at the return.

        Raises:
            HistoryStoreError: they cannot be written; some keys may have been.
        """
        ...

    def close(self) -> None:
        """Give the place back."""
        ...
