"""Recorded histories: users' last events and what stands beside them, on this machine or in a shared Redis."""

import json
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from retrieval.errors import InputError
from retrieval.histories.beside import Told
from retrieval.histories.blobs import Blobs
from retrieval.histories.codec import Columns, Entry, decode, event_digest, filled, history_of, merged
from retrieval.histories.commit import GroupCommit
from retrieval.histories.event import Event
from retrieval.histories.store import StoredHistory

__all__ = ["MAX_EVENTS", "MAX_ID_BYTES", "RecordedHistories", "open_histories"]

MAX_EVENTS = 1000
"""Events that are kept per user, unless a store is made with another number."""

MAX_ID_BYTES = 500
"""Length of a user's or an item's id in UTF-8, at most."""

# Format 2 has what stands beside events. Bytes of format 1 are bytes of format 2, so an older store becomes one.
_FORMAT, _OLDEST_FORMAT = 2, 1
# No user's key begins so.
_SETTINGS = b"\0settings"
_INTEGER = struct.Struct(">Q")


def open_histories(place: str, max_events: int | None = None) -> "RecordedHistories":
    """Open a store of histories, or make it.

    Args:
        place: a folder, or the URL of a Redis database, `redis://…` or `rediss://…`.
        max_events: events per user that a new store keeps; None is `MAX_EVENTS`.

    Raises:
        InputError: the place cannot hold histories, or holds some with another `max_events`.
        HistoryStoreError: the place cannot be read or written.
    """
    blobs: Blobs
    if place.startswith(("redis:", "rediss:")):
        try:
            from retrieval.histories.shared import SharedBlobs
        except ModuleNotFoundError:
            raise InputError("histories in Redis need its client: pip install 'retrieval[redis]'") from None
        blobs = SharedBlobs(place)
    else:
        from retrieval.histories.embedded import EmbeddedBlobs

        blobs = EmbeddedBlobs(Path(place))
    try:
        return RecordedHistories(blobs, max_events)
    except BaseException:
        blobs.close()
        raise


class RecordedHistories:
    """A `HistoryStore` over bytes by key.

    Args:
        blobs: where histories lie; closed with this object.
        max_events: events per user that a new store keeps; None is `MAX_EVENTS`.

    Raises:
        InputError: the store has another format, or another `max_events`.
        HistoryStoreError: the store cannot be read or written.

    Attributes:
        max_events: events per user that are kept, the latest ones.
    """

    def __init__(self, blobs: Blobs, max_events: int | None = None) -> None:
        if max_events is not None and max_events < 1:
            raise InputError(f"max_events must be at least 1, not {max_events}")
        self._blobs = blobs
        made = json.dumps({"format": _FORMAT, "max_events": max_events or MAX_EVENTS}).encode()
        blobs.update([_SETTINGS], lambda _, held: _upgraded(held) if held is not None else made)
        settings = json.loads(blobs.get(_SETTINGS) or b"{}")
        if settings.get("format") != _FORMAT:
            raise InputError(
                f"the store of histories has format {settings.get('format')!r}; this version reads {_FORMAT}"
            )
        self.max_events: int = settings["max_events"]
        if max_events not in (None, self.max_events):
            raise InputError(f"the store of histories was made for {self.max_events} events per user, not {max_events}")
        self._commit = GroupCommit(self._record)

    def read(self, user_id: int | str) -> StoredHistory | None:
        """See `HistoryStore`."""
        key = _key(user_id)
        content = self._blobs.get(key) if key is not None else None
        return history_of(decode(content)) if content is not None else None

    def append(self, events: Sequence[Event]) -> "Future[None]":
        """See `HistoryStore`."""
        return self._commit.submit(events)

    def _record(self, events: Sequence[Event]) -> None:
        parts: dict[bytes, tuple[list[Entry], list[Told]]] = {}
        for event in events:
            key = _key(event.user_id)
            assert key is not None, "ids are checked before they come here"
            entries, news = parts.setdefault(key, ([], []))
            if event.item_id is not None:
                entries.append((event.item_id, event.action, event.timestamp, event_digest(event.event_id)))
            news += [(True, name, event.timestamp, value) for name, value in event.context.items()]
            news += [(False, name, event.timestamp, value) for name, value in event.auxiliary.items()]

        def change(key: bytes, held: bytes | None) -> bytes:
            entries, news = parts[key]
            return merged(held, entries, self.max_events, news)

        self._blobs.update(list(parts), change)

    def fill(self, histories: Mapping[int | str, Columns]) -> None:
        """Add whole histories; durable at the return. What is held already is not added again.

        Args:
            histories: by user id; ascending times, no repeats, no ids of events.

        Raises:
            InputError: a user's id is too long.
            HistoryStoreError: they cannot be written.
        """
        by_key: dict[bytes, Columns] = {}
        for user_id, columns in histories.items():
            key = _key(user_id)
            if key is None:
                raise InputError(f"user {str(user_id)[:60]!r}…: ids have at most {MAX_ID_BYTES} bytes")
            by_key[key] = columns

        self._blobs.update(list(by_key), lambda key, held: filled(held, by_key[key], self.max_events))

    def close(self) -> None:
        """See `HistoryStore`."""
        self._commit.close()
        self._blobs.close()


def _upgraded(settings: bytes) -> bytes:
    found = json.loads(settings)
    return json.dumps(found | {"format": _FORMAT}).encode() if found.get("format") == _OLDEST_FORMAT else settings


def _key(user_id: int | str) -> bytes | None:
    """Where a user's history lies; None for what is no id. 7 and "7" are two users."""
    if isinstance(user_id, str):
        try:
            text = user_id.encode()
        except UnicodeEncodeError:
            return None
        return b"s" + text if len(text) <= MAX_ID_BYTES else None
    # Ascending as bytes, too, so that a dataset's users are written in the order of the tree.
    return b"i" + _INTEGER.pack(user_id + 2**63) if -(2**63) <= user_id < 2**63 else None
