"""A user's events ↔ the bytes that a store keeps for the user; `docs/histories.md` describes them.

What it means to record an event is decided here, once for all stores: `merged` is a pure function from the bytes held
and some events to the bytes to hold, such that recording events again, together or one by one, gives the same bytes.
"""

import struct
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import HistoryCorruptError
from retrieval.histories.beside import Beside, Told, decode_beside, encode_beside, told
from retrieval.histories.store import StoredHistory

__all__ = [
    "NO_EVENT_ID",
    "Columns",
    "Entry",
    "decode",
    "encode",
    "event_digest",
    "filled",
    "history_of",
    "joined",
    "merged",
]

NO_EVENT_ID = 0
"""Digest of an event that has no id."""

_HEADER = struct.Struct("<BxHI")
_STRING_ITEMS, _EVENT_IDS, _BESIDE = 1, 2, 4

Entry = tuple[int | str, str, int, int]
"""Item id, action, timestamp in seconds, digest of the event's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A user's events, oldest first; equal times in the order in which they were recorded.

    Attributes:
        timestamps: seconds, int64 `[T]`.
        items: item ids, int64 `[T]` or T strings.
        names: action names.
        codes: place of each event's action in `names`, uint16 `[T]`.
        digests: of the events' ids, uint64 `[T]`; `NO_EVENT_ID` where an event has none.
        beside: context and auxiliary series.
    """

    timestamps: NDArray[np.int64]
    items: NDArray[np.int64] | list[str]
    names: list[str]
    codes: NDArray[np.uint16]
    digests: NDArray[np.uint64]
    beside: Beside = field(default_factory=Beside)


def event_digest(event_id: str) -> int:
    """64 bits that stand for an event id, or `NO_EVENT_ID` for none.

    Two ids of one user meet by chance with a probability of about T² / 2⁶⁵.
    """
    if not event_id:
        return NO_EVENT_ID
    return int.from_bytes(blake2b(event_id.encode(), digest_size=8).digest(), "little") or 1


def encode(columns: Columns) -> bytes:
    """Bytes of a history."""
    flags, ids, texts = 0, b"", columns.names
    if columns.digests.any():
        flags |= _EVENT_IDS
        ids = columns.digests.astype("<u8").tobytes()
    items = b""
    if isinstance(columns.items, list):
        flags |= _STRING_ITEMS
        texts = texts + columns.items
    else:
        items = columns.items.astype("<i8").tobytes()
    encoded = [text.encode() for text in texts]
    beside = b""
    if columns.beside:
        flags |= _BESIDE
        beside = encode_beside(columns.beside)
    return b"".join(
        (
            _HEADER.pack(flags, len(columns.names), len(columns.timestamps)),
            columns.timestamps.astype("<i8").tobytes(),
            ids,
            items,
            np.fromiter(map(len, encoded), "<u4", len(encoded)).tobytes(),
            columns.codes.astype("<u2").tobytes(),
            *encoded,
            beside,
        )
    )


def decode(content: bytes) -> Columns:
    """A history out of its bytes.

    Raises:
        HistoryCorruptError: they are none.
    """
    try:
        return _decode(content)
    except (struct.error, ValueError) as error:
        raise HistoryCorruptError(f"a stored history of {len(content)} bytes is damaged ({error})") from None


def _decode(content: bytes) -> Columns:
    flags, num_names, num_events = _HEADER.unpack_from(content)
    if flags & ~(_STRING_ITEMS | _EVENT_IDS | _BESIDE):
        raise ValueError(f"flags {flags}")
    place = _HEADER.size

    def column(dtype: str, count: int) -> NDArray:
        nonlocal place
        values = np.frombuffer(content, dtype, count, place)
        place += values.nbytes
        return values

    strings = bool(flags & _STRING_ITEMS)
    timestamps = column("<i8", num_events)
    digests = column("<u8", num_events) if flags & _EVENT_IDS else np.zeros(num_events, np.uint64)
    items = None if strings else column("<i8", num_events)
    lengths = column("<u4", num_names + num_events * strings)
    codes = column("<u2", num_events)
    if num_events and int(codes.max()) >= num_names:
        raise ValueError("an action has no name")
    texts = []
    for length in lengths.tolist():
        texts.append(content[place : place + length].decode())
        place += length
    if not flags & _BESIDE and place != len(content):
        raise ValueError(f"{place} bytes were promised")
    return Columns(
        timestamps=timestamps,
        items=texts[num_names:] if items is None else items,
        names=texts[:num_names],
        codes=codes,
        digests=digests,
        beside=decode_beside(content, place) if flags & _BESIDE else Beside(),
    )


def history_of(columns: Columns) -> StoredHistory:
    """What a reader gets of a history."""
    return StoredHistory(
        items=columns.items,
        actions=[columns.names[code] for code in columns.codes.tolist()],
        timestamps=columns.timestamps,
        context={name: value for name, (_, value) in columns.beside.context.items()},
        auxiliary=columns.beside.series,
    )


class _Events:
    """A user's events as lists, to be added to."""

    def __init__(self) -> None:
        self.timestamps: list[int] = []
        self.items: list[int | str] = []
        self.actions: list[str] = []
        self.digests: list[int] = []
        self._lists: tuple[list, ...] = (self.timestamps, self.items, self.actions, self.digests)

    def extend(self, items: Sequence[int | str] | NDArray, actions: Sequence[str], timestamps: NDArray) -> None:
        """Take over events that are in order and without repeats."""
        self.items += items.tolist() if isinstance(items, np.ndarray) else items
        self.actions += actions
        self.timestamps += timestamps.tolist()

    def add(self, item: int | str, action: str, timestamp: int, digest: int) -> None:
        """Put one more event in its place, unless it is a repeat."""
        if self.items and isinstance(self.items[0], str) != isinstance(item, str):
            for values in self._lists:
                values.clear()
        if digest != NO_EVENT_ID and digest in self.digests:
            return
        place = bisect_right(self.timestamps, timestamp)
        if any(
            NO_EVENT_ID in (digest, self.digests[other]) and self.items[other] == item and self.actions[other] == action
            for other in range(bisect_left(self.timestamps, timestamp), place)
        ):
            return
        for values, value in zip(self._lists, (timestamp, item, action, digest), strict=True):
            values.insert(place, value)

    def drop_one(self) -> None:
        """Drop the oldest; among several, the one that was recorded last."""
        place = bisect_right(self.timestamps, self.timestamps[0]) - 1
        for values in self._lists:
            del values[place]


def merged(content: bytes | None, entries: Iterable[Entry], max_events: int, news: Iterable[Told] = ()) -> bytes:
    """Record events, and what is told beside them, in a history.

    - An event is a repeat, and passed over, if one with its id is held; where either has no id, if one of the same
      item, action and time is.
    - The last `max_events` by time stay; among equal times, those that were recorded first. So an event that fell out
      falls out again when it is repeated.
    - Item ids of a history are of one kind. An event of the other kind ends what was held: no catalogue knows both.

    Args:
        content: the history's bytes; None for a user that is not known yet.
        entries: the events, in the order in which they were recorded.
        max_events: how many stay, and how many points of each series.
        news: context and points of series.

    Raises:
        HistoryCorruptError: the bytes are no history.
    """
    events, beside = _Events(), Beside()
    if content is not None:
        held = decode(content)
        events.extend(held.items, [held.names[code] for code in held.codes.tolist()], held.timestamps)
        events.digests += held.digests.tolist()
        beside = held.beside
    for entry in entries:
        events.add(*entry)
        if len(events.items) > max_events:
            events.drop_one()
    codes = {name: code for code, name in enumerate(dict.fromkeys(events.actions))}
    strings = bool(events.items) and isinstance(events.items[0], str)
    return encode(
        Columns(
            timestamps=np.array(events.timestamps, np.int64),
            items=[str(item) for item in events.items] if strings else np.array(events.items, np.int64),
            names=list(codes),
            codes=np.fromiter((codes[name] for name in events.actions), np.uint16, len(events.actions)),
            digests=np.array(events.digests, np.uint64),
            beside=told(beside, news, max_events),
        )
    )


def filled(content: bytes | None, columns: Columns, max_events: int) -> bytes:
    """As `merged` for a whole history of events that have no ids, but quick where most of it is held already.

    Raises:
        HistoryCorruptError: the bytes are no history.
    """
    start, news = 0, _news_of(columns.beside)
    if content is None:
        if len(columns.timestamps) <= max_events and not news:
            return encode(columns)
    else:
        held = decode(content)
        if len(held.timestamps) >= max_events:
            # Those before would fall out at once.
            start = int(np.searchsorted(columns.timestamps, held.timestamps[0]))
        start += _equal_at_the_start(held, columns, start)
        if start == len(columns.timestamps) and not _tells_more(held.beside, news, max_events):
            return content
    actions = [columns.names[code] for code in columns.codes[start:].tolist()]
    items = columns.items[start:] if isinstance(columns.items, list) else columns.items[start:].tolist()
    times = columns.timestamps[start:].tolist()
    return merged(content, zip(items, actions, times, [NO_EVENT_ID] * len(times), strict=True), max_events, news)


def _tells_more(held: Beside, news: list[Told], max_points: int) -> bool:
    return bool(news) and encode_beside(told(held, news, max_points)) != encode_beside(held)


def _news_of(beside: Beside) -> list[Told]:
    news = [(True, name, time, value) for name, (time, value) in beside.context.items()]
    for name, series in beside.series.items():
        news += [(False, name, time, value) for time, value in zip(*series.lists(), strict=True)]
    return news


def _equal_at_the_start(held: Columns, columns: Columns, start: int) -> int:
    """How many events from `start` on are the first ones held, in the same order."""
    count = min(len(held.timestamps), len(columns.timestamps) - start)
    part = slice(start, start + count)
    code_of = {name: code for code, name in enumerate(held.names)}
    codes = np.array([code_of.get(name, -1) for name in columns.names], np.int64)
    equal = (held.timestamps[:count] == columns.timestamps[part]) & (held.codes[:count] == codes[columns.codes[part]])
    if isinstance(held.items, list) and isinstance(columns.items, list):
        pairs = zip(held.items[:count], columns.items[part], strict=True)
        equal &= np.fromiter((one == other for one, other in pairs), bool, count)
    elif isinstance(held.items, list) or isinstance(columns.items, list):
        return 0
    else:
        equal &= held.items[:count] == columns.items[part]
    return count if equal.all() else int(equal.argmin())


def joined(stored: StoredHistory | None, fresh: StoredHistory) -> StoredHistory:
    """A history with events that may not be in it yet, by the rules of `merged` for events without an id.

    Args:
        stored: the history; None for a user that is not known.
        fresh: the events, as many actions as items, with the user's context and auxiliary series.
    """
    if stored is None:
        return fresh
    events = _Events()
    events.extend(stored.items, stored.actions, stored.timestamps)
    events.digests += [NO_EVENT_ID] * len(events.items)
    items = fresh.items.tolist() if isinstance(fresh.items, np.ndarray) else fresh.items
    for item, action, timestamp in zip(items, fresh.actions, fresh.timestamps.tolist(), strict=True):
        events.add(item, action, timestamp, NO_EVENT_ID)
    beside = told(Beside(series=stored.auxiliary), _news_of(Beside(series=fresh.auxiliary)), sys.maxsize)
    return StoredHistory(
        items=events.items,  # type: ignore[arg-type]
        actions=events.actions,
        timestamps=np.array(events.timestamps, np.int64),
        context={**stored.context, **fresh.context},
        auxiliary=beside.series,
    )
