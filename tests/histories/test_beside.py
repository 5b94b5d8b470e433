"""Context and auxiliary series in stores of histories, against an oracle that does what the documentation says."""

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.errors import HistoryCorruptError, InputError
from retrieval.histories.beside import MAX_NAMES, Beside, Told, decode_beside, encode_beside, told
from retrieval.histories.codec import decode, encode, filled, history_of, joined, merged
from retrieval.histories.event import Event
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories, open_histories
from retrieval.histories.store import Series, StoredHistory
from retrieval.types import TokenKind
from tests.histories.test_recorded import Held, plain
from tests.support import add_side, write_dataset

TEXTS = st.sampled_from(["", "a", "Zoë", "🎬"])
NEWS = st.lists(st.tuples(st.booleans(), TEXTS, st.integers(0, 6), TEXTS), max_size=25)
Points = dict[str, list[tuple[int, str]]]


def oracle(news: list[Told], bound: int) -> tuple[dict[str, str], Points]:
    context: dict[str, tuple[int, str]] = {}
    series: Points = {}
    for is_context, name, time, value in news:
        if is_context:
            context[name] = max(context.get(name, (-1, "")), (time, value))
        elif (time, value) not in series.get(name, []):
            held = sorted([*series.get(name, []), (time, value)], key=lambda point: point[0])
            if len(held) > bound:
                held.remove([point for point in held if point[0] == held[0][0]][-1])
            series[name] = held
    return {name: value for name, (_, value) in context.items()}, series


def points_of(series: dict[str, Series]) -> Points:
    return {name: list(zip(*one.lists(), strict=True)) for name, one in series.items()}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(news=NEWS, bound=st.integers(1, 6), cuts=st.lists(st.integers(0, 25), max_size=4), repeated=st.integers(0, 30))
def test_what_is_told_is_kept_together_or_in_parts_and_again(
    news: list[Told], bound: int, cuts: list[int], repeated: int
) -> None:
    content = merged(None, [], bound, news)
    found = history_of(decode(content))
    assert (dict(found.context), points_of(dict(found.auxiliary))) == oracle(news, bound)
    parts: bytes | None = None
    for start, end in pairwise([0, *sorted(cuts), len(news)]):
        parts = merged(parts, [], bound, news[start:end])
    assert parts == content
    again = news[repeated % len(news) :] if news else []
    assert merged(content, [], bound, again) == content


@settings(max_examples=100, deadline=None, derandomize=True)
@given(news=NEWS, held=NEWS, bound=st.integers(1, 6))
def test_filling_is_telling_all_of_it(news: list[Told], held: list[Told], bound: int) -> None:
    columns = decode(merged(None, [(1, "", 5, 0)], 100, news))
    before = merged(None, [], bound, held)
    content = filled(before, columns, bound)
    points = [
        (False, name, *point) for name, series in points_of(dict(columns.beside.series)).items() for point in series
    ]
    context = [(True, name, *one) for name, one in columns.beside.context.items()]
    assert content == merged(before, [(1, "", 5, 0)], bound, [*context, *points])
    assert filled(content, columns, bound) == content


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    content=NEWS.map(lambda news: merged(None, [(3, "like", 4, 7)], 10, [(True, "age", 1, "18"), *news])),
    place=st.integers(0, 500),
    new=st.binary(max_size=2),
)
def test_whatever_bytes_there_are_they_are_a_history_or_refused(content: bytes, place: int, new: bytes) -> None:
    place %= len(content)
    damaged = content[:place] + new + content[place + 1 :]
    try:
        found = history_of(decode(damaged))
    except HistoryCorruptError:
        return
    for series in found.auxiliary.values():
        series.lists()


def test_bytes_are_those_that_the_documentation_describes() -> None:
    beside = told(Beside(), [(False, "region", 9, "süd"), (True, "age", 7, "18")], 10)
    expected = (
        b"\1\0\1\0\1\0\0\0\1\0\0\0"  # one of context, one series, one value, one point
        b"\7\0\0\0\0\0\0\0"
        b"\x09\0\0\0\0\0\0\0"
        b"\1\0\0\0"
        b"\0\0\0\0"
        b"\3\0\0\0\2\0\0\0\6\0\0\0\4\0\0\0" + "age18regionsüd".encode()
    )
    assert encode_beside(beside) == expected
    assert encode_beside(decode_beside(b"xx" + expected, 2)) == expected


def test_a_history_without_anything_beside_it_has_the_bytes_that_it_had_in_format_1() -> None:
    content = merged(None, [(3, "like", 4, 0)], 10)
    assert content == (b"\0\0\1\0\1\0\0\0\4\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0\4\0\0\0\0\0like")
    assert encode(decode(content)) == content


def test_names_are_bounded() -> None:
    news = [(is_context, f"{name:03}", 1, "x") for name in range(MAX_NAMES + 5) for is_context in (True, False)]
    found = told(told(Beside(), news[:50], 9), news, 9)
    assert sorted(found.context) == sorted(found.series) == [f"{name:03}" for name in range(MAX_NAMES)]


def test_fresh_context_goes_first_and_fresh_points_take_their_place() -> None:
    stored = history_of(
        decode(merged(None, [], 9, [(True, "age", 5, "18"), (True, "sex", 5, "F"), (False, "r", 5, "n")]))
    )
    fresh = StoredHistory(
        items=[],
        actions=[],
        timestamps=np.empty(0, np.int64),
        context={"age": "25"},
        auxiliary={"r": Series.of([(4, "s"), (5, "n")]), "d": Series.of([(1, "x")])},
    )
    both = joined(stored, fresh)
    assert both.context == {"age": "25", "sex": "F"}
    assert points_of(dict(both.auxiliary)) == {"r": [(4, "s"), (5, "n")], "d": [(1, "x")]}


def test_events_carry_context_and_points_and_may_have_no_item(new_place: Callable[[], str]) -> None:
    place = new_place()
    events = [
        Event(user_id=7, item_id=3, timestamp=10, action="like", context={"age": "18"}, auxiliary={"region": "n"}),
        Event(user_id=7, item_id=None, timestamp=20, context={"age": "25"}, auxiliary={"region": "s", "device": "é"}),
        Event(user_id=8, item_id=None, timestamp=5, context={"age": "50"}),
    ]
    with closing(open_histories(place, 2)) as store:
        for _ in range(2):
            store.append(events).result(20)
            store.append(events[:1]).result(20)
    with closing(open_histories(place)) as store:
        found = store.read(7)
        assert plain(found) == [(3, "like", 10)]
        assert found is not None
        assert found.context == {"age": "25"}
        assert points_of(dict(found.auxiliary)) == {"region": [(10, "n"), (20, "s")], "device": [(20, "é")]}
        assert plain(store.read(8)) == []


KINDS = (
    TokenKind(name="age", context=True, values=("18", "25")),
    TokenKind(name="region", context=False, values=("north", "south")),
)


def test_filling_carries_context_and_series_and_knows_what_was_recorded(
    tmp_path: Path, new_place: Callable[[], str]
) -> None:
    dataset = write_dataset(tmp_path / "d", [[(2, 1, 10), (0, 0, 20)], [(1, 2, 5)], [(1, 1, 7)]], [1, 2, 3])
    dataset = add_side(dataset, KINDS, [[2], [0], [1]], [[(2, 1, 10), (2, 0, 15), (2, 1, 20)], [], [(2, 2, 7)]])
    with closing(open_histories(new_place())) as store:
        recorded = Event(user_id=0, item_id=3, timestamp=10, action="like", auxiliary={"region": "north"})
        later = Event(user_id=2, item_id=None, timestamp=21, context={"age": "50"})
        store.append([recorded, later]).result(20)
        for _ in range(2):
            fill_histories(dataset, store)
            histories = [store.read(user) for user in range(3)]
            assert [plain(one) for one in histories] == [
                [(3, "like", 10), (1, "", 20)],
                [(2, "skip", 5)],
                [(2, "like", 7)],
            ]
            found = [(dict(one.context), points_of(dict(one.auxiliary))) for one in histories if one]
            # A value without a row is "", which ends the run before it; what was told later than the log stays.
            assert found == [
                ({"age": "25"}, {"region": [(10, "north"), (15, ""), (20, "north")]}),
                ({}, {}),
                ({"age": "50"}, {"region": [(7, "south")]}),
            ]


def test_a_store_of_format_1_is_read_and_becomes_one_that_older_versions_refuse() -> None:
    blobs = Held()
    blobs.contents[b"\0settings"] = b'{"format": 1, "max_events": 5}'
    blobs.contents[b"s7"] = merged(None, [(3, "like", 4, 0)], 5)
    with closing(RecordedHistories(blobs)) as store:
        assert plain(store.read("7")) == [(3, "like", 4)]
        assert store.max_events == 5
    assert blobs.contents[b"\0settings"] == b'{"format": 2, "max_events": 5}'


def test_a_store_of_a_later_format_is_refused_and_left_alone() -> None:
    blobs = Held()
    settings = b'{"format": 3, "max_events": 5}'
    blobs.contents[b"\0settings"] = settings
    with pytest.raises(InputError, match="has format 3; this version reads 2"):
        RecordedHistories(blobs)
    assert blobs.contents[b"\0settings"] == settings
