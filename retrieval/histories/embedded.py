"""Bytes by key in a folder of this machine: LMDB, see docs/decisions/014-histories-in-lmdb.md."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from retrieval.errors import HistoryStoreError, InputError
from retrieval.histories.blobs import Change

__all__ = ["EmbeddedBlobs"]

# Addresses, not bytes of disk or memory: the file is as large as what it holds.
_ADDRESSES = 2**40
_READERS = 1024


class EmbeddedBlobs:
    """A folder with an LMDB environment. Several processes may hold it open, each once.

    Args:
        folder: made if it is missing.

    Raises:
        InputError: the folder holds something else.
        HistoryStoreError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / "dataset.json").exists():
            raise InputError(
                f"{folder}: is a dataset, not a store of histories; fill one from it with "
                f"`retrieval histories fill {folder} STORE`"
            )
        if folder.exists() and not (folder / "data.mdb").exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: is not a store of histories, and holds something else")
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without read-ahead: users are asked for in no order.
            self._environment = lmdb.open(
                str(folder), map_size=_ADDRESSES, max_readers=_READERS, readahead=False, meminit=False
            )
            # Places of readers that were killed.
            self._environment.reader_check()
        except (lmdb.Error, OSError) as error:
            raise HistoryStoreError(f"{folder}: cannot be opened as a store of histories ({error})") from None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise HistoryStoreError(f"{self._folder}: {error}") from error

    def get(self, key: bytes) -> bytes | None:
        """See `Blobs`."""
        with self._told(), self._environment.begin() as transaction:
            return transaction.get(key)

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See `Blobs`. One transaction, so of all keys or none."""
        with self._told(), self._environment.begin(write=True) as transaction:
            # In the order of the tree.
            for key in sorted(keys):
                held = transaction.get(key)
                content = change(key, held)
                if content != held:
                    transaction.put(key, content)

    def close(self) -> None:
        """See `Blobs`."""
        self._environment.close()
