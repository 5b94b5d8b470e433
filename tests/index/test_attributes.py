"""Filters compiled over Arrow columns, against hand-made tables and a slow oracle."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.errors import FilterError
from retrieval.index.attributes import Attributes, Eligible, in_bitmap
from retrieval.index.filter import And, Compare, Filter, In, Missing, Not, Or, filter_from

UTC = dt.UTC
COLUMNS = {
    "language": pa.array(["de", "en", None, "en", "Ö"]),
    "category": pa.array(["a", "b", "a", None, "c"]).dictionary_encode(),
    "year": pa.array([1990, 2000, None, 2**62 + 1, -5], pa.int64()),
    "small": pa.array([0, 255, 7, None, 7], pa.uint8()),
    "score": pa.array([0.5, float("nan"), None, -1.0, 0.5], pa.float32()),
    "kids": pa.array([True, False, None, True, False]),
    "day": pa.array([dt.date(2024, 1, 1), dt.date(2024, 1, 2), None, dt.date(1960, 1, 1), dt.date(2024, 1, 1)]),
    "time": pa.array([dt.datetime(2024, 1, 1, 12), None, dt.datetime(1960, 1, 1), None, None], pa.timestamp("s")),
    "nanos": pa.array([1, 1999, 2000, None, -1], pa.timestamp("ns", "UTC")),
    "tags": pa.array([["x", "y"], [], None, ["y", None], ["z", "z"]]),
    "marks": pa.array([[1, 9], [5], None, [], [None]], pa.large_list(pa.int32())),
    "blob": pa.array([b"", None, None, b"x", b""]),
}


def rows_of(attributes: Attributes, text: str) -> list[int]:
    found = attributes.compile(filter_from(text))
    rows: list[int] = found.rows.tolist()
    assert found.count == len(rows)
    return rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("language = 'en'", [1, 3]),
        ("language in ('de', 'Ö', 'xx')", [0, 4]),
        ("language > 'de'", [1, 3, 4]),
        ("not language = 'en'", [0, 2, 4]),
        ("language is missing", [2]),
        ("category in ('a', 'c')", [0, 2, 4]),
        ("category is missing", [3]),
        ("year >= 1990", [0, 1, 3]),
        ("year > 4611686018427387904", [3]),
        ("year = 4611686018427387905", [3]),
        ("year < 99999999999999999999999", [0, 1, 3, 4]),
        ("small in (7, 300)", [2, 4]),
        ("small > -1", [0, 1, 2, 4]),
        ("score >= 0.5", [0, 4]),
        ("score < 1", [0, 3, 4]),
        ("score is missing", [1, 2]),
        ("kids = true", [0, 3]),
        ("kids != true", [1, 2, 4]),
        ("day = 2024-01-01", [0, 4]),
        ("day < 2024-01-02", [0, 3, 4]),
        ("time > 2024-01-01", [0]),
        ("time <= 2024-01-01T13:00+01:00", [0, 2]),
        ("nanos >= 1970-01-01T00:00:00.000001Z", [1, 2]),
        ("tags = 'y'", [0, 3]),
        ("tags = 'z' or tags = 'x'", [0, 4]),
        ("tags is missing", [1, 2]),
        ("marks > 4", [0, 1]),
        ("marks < 2 and marks > 8", [0]),
        ("marks is missing", [2, 3, 4]),
        ("blob is missing", [1, 2]),
    ],
)
def test_filters_select_by_hand_computed_rows(text: str, rows: list[int]) -> None:
    assert rows_of(Attributes(COLUMNS, 5), text) == rows


def test_slices_of_longer_columns_are_their_own_rows() -> None:
    sliced = {name: column.slice(1, 3) for name, column in COLUMNS.items()}
    attributes = Attributes(sliced, 3)
    assert rows_of(attributes, "language = 'en'") == [0, 2]
    assert rows_of(attributes, "category = 'a'") == [1]
    assert rows_of(attributes, "tags = 'y'") == [2]
    assert rows_of(attributes, "kids = true") == [2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("colour = 'red'", "attribute 'colour' is not known; the catalogue has 'language', 'category'"),
        ("colour is missing", "attribute 'colour' is not known"),
        ("language = 5", "attribute 'language', operator 'in', value 5: the attribute holds text"),
        ("year > 1990.5", "attribute 'year', operator '>', value 1990.5: the attribute holds integers"),
        ("year = true", "value true: the attribute holds integers"),
        ("tags = 5", "attribute 'tags', operator 'in', value 5: the attribute holds text"),
        ("kids > false", "true and false have no order"),
        ("day = '2024-01-01'", "the attribute holds moments"),
        ("score > 1" + "0" * 400, "the attribute holds numbers"),
        ("blob = 'x'", "filters cannot compare values of type binary"),
        ("language = 'en' or not (year = 1 and colour = 'red')", "attribute 'colour' is not known"),
    ],
)
def test_a_filter_that_does_not_fit_is_refused(text: str, sentence: str) -> None:
    attributes = Attributes(COLUMNS, 5)
    for ask in (attributes.check, attributes.compile):
        with pytest.raises(FilterError, match=sentence):
            ask(filter_from(text))


def test_equal_values_of_unequal_kinds_do_not_share_a_compiled_filter() -> None:
    attributes = Attributes(COLUMNS, 5)
    attributes.compile(In("kids", (True,)))
    with pytest.raises(FilterError):
        attributes.compile(In("kids", (1,)))


def test_compiled_filters_are_kept_within_their_bytes() -> None:
    attributes = Attributes({"n": pa.array(range(800))}, 800, cache_bytes=350)
    first = attributes.compile(Compare("n", "<", 400))
    assert attributes.compile(Compare("n", "<", 400)) is first
    attributes.compile(Compare("n", "<", 401))
    attributes.compile(Compare("n", "<", 400))
    attributes.compile(Compare("n", "<", 402))
    attributes.compile(Compare("n", "<", 403))
    assert attributes.nbytes <= 350
    assert attributes.compile(Compare("n", "<", 400)) is first  # used more lately than those that went


filters = st.recursive(
    st.one_of(
        st.builds(In, st.just("n"), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)),
        st.builds(In, st.just("many"), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)),
        st.builds(
            Compare, st.sampled_from(["n", "many"]), st.sampled_from(["<", "<=", ">", ">="]), st.integers(-1, 10)
        ),
        st.builds(Missing, st.sampled_from(["n", "many"])),
    ),
    lambda inner: st.one_of(
        st.builds(Not, inner), st.builds(And, st.tuples(inner, inner)), st.builds(Or, st.tuples(inner, inner))
    ),
    max_leaves=6,
)


def holds(filter_: Filter, item: dict[str, list[int]]) -> bool:
    """The definition, item by item."""
    if isinstance(filter_, Not):
        return not holds(filter_.part, item)
    if isinstance(filter_, And):
        return all(holds(part, item) for part in filter_.parts)
    if isinstance(filter_, Or):
        return any(holds(part, item) for part in filter_.parts)
    if isinstance(filter_, Missing):
        return not item[filter_.attribute]
    if isinstance(filter_, In):
        return any(value in filter_.values for value in item[filter_.attribute])
    assert isinstance(filter_, Compare)
    return any(eval(f"{value} {filter_.operator} {filter_.value}") for value in item[filter_.attribute])


@settings(max_examples=150, deadline=None)
@given(
    filter_=filters,
    items=st.lists(st.tuples(st.none() | st.integers(0, 9), st.lists(st.integers(0, 9), max_size=3)), max_size=40),
)
def test_a_compiled_filter_holds_where_its_definition_does(
    filter_: Filter, items: list[tuple[int | None, list[int]]]
) -> None:
    columns = {
        "n": pa.array([n for n, _ in items], pa.int16()),
        "many": pa.array([many for _, many in items], pa.list_(pa.int64())),
    }
    tables = [{"n": [] if n is None else [n], "many": many} for n, many in items]
    expected = [row for row, item in enumerate(tables) if holds(filter_, item)]
    assert Attributes(columns, len(items)).compile(filter_).rows.tolist() == expected


@given(mask=st.lists(st.booleans(), max_size=200), thin=st.booleans())
def test_a_bitmap_holds_the_rows_of_its_mask(mask: list[bool], thin: bool) -> None:
    wanted = np.array(mask, bool)
    if thin:
        wanted[1:] = False
    found = Eligible.of(wanted)
    assert found.rows.tolist() == np.flatnonzero(wanted).tolist()
    assert found.count == wanted.sum()
    every = np.arange(len(wanted))
    assert in_bitmap(found.bitmap, every).tolist() == wanted.tolist()
