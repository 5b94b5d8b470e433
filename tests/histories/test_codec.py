"""What recording means, against an oracle that keeps a list of events and does what the documentation says."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.errors import HistoryCorruptError
from retrieval.histories.codec import (
    Columns,
    Entry,
    decode,
    encode,
    event_digest,
    filled,
    history_of,
    joined,
    merged,
)
from retrieval.histories.store import StoredHistory


@dataclass
class Oracle:
    """One user's events, by the rules of `merged`, slowly."""

    bound: int
    held: list[Entry] = field(default_factory=list)

    def record(self, event: Entry) -> None:
        item, action, time, digest = event
        if self.held and type(self.held[0][0]) is not type(item):
            self.held = []
        for other in self.held:
            if digest and other[3] and digest == other[3]:
                return
            if not (digest and other[3]) and (item, action, time) == other[:3]:
                return
        # By time, then by the order in which they came; the last of the oldest goes.
        self.held = sorted([*self.held, event], key=lambda one: one[2])
        if len(self.held) > self.bound:
            oldest = [one for one in self.held if one[2] == self.held[0][2]]
            self.held.remove(oldest[-1])


def entries_of(content: bytes) -> list[Entry]:
    columns = decode(content)
    items = columns.items if isinstance(columns.items, list) else columns.items.tolist()
    actions = [columns.names[code] for code in columns.codes]
    return list(zip(items, actions, columns.timestamps.tolist(), columns.digests.tolist(), strict=True))


def entries(items: st.SearchStrategy[int | str]) -> st.SearchStrategy[list[Entry]]:
    one = st.tuples(
        items, st.sampled_from(["", "like", "é"]), st.integers(0, 6), st.sampled_from([0, 0, 1, 2, 2**64 - 1])
    )
    return st.lists(one, max_size=25)


INTEGERS: st.SearchStrategy[int | str] = st.sampled_from([0, 1, -5, 2**63 - 1])
STRINGS: st.SearchStrategy[int | str] = st.sampled_from(["", "a", "Zoë", "\0", "🎬"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    events=entries(INTEGERS) | entries(STRINGS) | entries(INTEGERS | STRINGS),
    bound=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 25), max_size=4),
)
def test_recording_is_what_the_oracle_does_together_or_in_parts(
    events: list[Entry], bound: int, cuts: list[int]
) -> None:
    oracle = Oracle(bound)
    for event in events:
        oracle.record(event)
    content = merged(None, events, bound)
    assert entries_of(content) == oracle.held
    parts: bytes | None = None
    edges = [0, *sorted(cuts), len(events)]
    for start, end in pairwise(edges):
        parts = merged(parts, events[start:end], bound)
    assert parts == content


@settings(max_examples=200, deadline=None, derandomize=True)
@given(events=entries(INTEGERS), bound=st.integers(1, 6), which=st.integers(0, 30))
def test_a_repeat_of_any_event_without_an_id_changes_nothing(events: list[Entry], bound: int, which: int) -> None:
    """Whether it is still held or has fallen out."""
    events = [(item, action, time, 0) for item, action, time, _ in events]
    content = merged(None, events, bound)
    repeated = events[which % len(events) :] if events else []
    assert merged(content, repeated, bound) == content


def test_a_repeat_by_id_changes_nothing_even_if_it_fell_out_among_equals() -> None:
    events: list[Entry] = [(1, "", 5, 11), (2, "", 5, 12), (3, "", 5, 13), (4, "", 9, 14)]
    content = merged(None, events, 2)
    assert entries_of(content) == [events[0], events[3]]
    for event in events:
        assert merged(content, [event], 2) == content


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    log=st.tuples(entries(INTEGERS), entries(INTEGERS)) | st.tuples(entries(STRINGS), entries(STRINGS | INTEGERS)),
    cut=st.integers(0, 25),
    bound=st.integers(1, 30),
)
def test_filling_is_recording_a_whole_log(log: tuple[list[Entry], list[Entry]], cut: int, bound: int) -> None:
    """What is held is a part of the log, other events, or both."""
    events, others = ([(*event[:3], 0) for event in part] for part in log)
    columns = decode(merged(None, events, 100))
    logged = entries_of(encode(columns))
    for held in (None, merged(None, logged[:cut], bound), merged(None, [*logged[:cut], *log[1], *others], bound)):
        assert entries_of(filled(held, columns, bound)) == entries_of(merged(held, logged, bound))
    content = filled(None, columns, bound)
    assert filled(content, columns, bound) == content


@pytest.mark.parametrize("bad", [b"", b"\0" * 3, b"\xff" * 40, b"\0\0\1\0\1\0\0\0"])
def test_damaged_bytes_are_refused(bad: bytes) -> None:
    with pytest.raises(HistoryCorruptError, match="is damaged"):
        decode(bad)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    content=entries(STRINGS).map(lambda events: merged(None, events, 10)),
    place=st.integers(0, 500),
    new=st.binary(max_size=2),
)
def test_whatever_bytes_there_are_they_are_a_history_or_refused(content: bytes, place: int, new: bytes) -> None:
    place %= len(content)
    damaged = content[:place] + new + content[place + 1 :]
    try:
        history_of(decode(damaged))
    except HistoryCorruptError:
        return
    assert len(damaged) == len(content)


def test_columns_come_back_as_they_went_in() -> None:
    columns = Columns(
        timestamps=np.array([3, 3, 7_000_000_000]),
        items=["a", "🎬", ""],
        names=["like", ""],
        codes=np.array([0, 1, 0], np.uint16),
        digests=np.array([0, 2**64 - 1, 5], np.uint64),
    )
    found = decode(encode(columns))
    assert (found.items, found.names) == (columns.items, columns.names)
    for name in ("timestamps", "codes", "digests"):
        np.testing.assert_array_equal(getattr(found, name), getattr(columns, name))


def test_ids_are_told_apart_and_none_is_none() -> None:
    assert event_digest("") == 0
    assert len({event_digest(f"event-{number}") for number in range(10_000)}) == 10_000
    assert event_digest("event-1") == event_digest("event-1") != 0


def test_fresh_events_take_their_place_and_count_once() -> None:
    stored = StoredHistory(items=np.array([1, 2]), actions=["like", ""], timestamps=np.array([10, 20]))
    fresh = StoredHistory(items=[2, 3, 4], actions=["", "", "like"], timestamps=np.array([20, 20, 30]))
    both = joined(stored, fresh)
    assert list(both.items) == [1, 2, 3, 4]
    assert both.actions == ["like", "", "", "like"]
    assert both.timestamps.tolist() == [10, 20, 20, 30]
    assert joined(None, fresh) == fresh
