"""Filters as text and as values."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.errors import FilterError
from retrieval.index.filter import And, Compare, Filter, In, Missing, Not, Or, filter_from

DRAMA, RECENT = In("category", ("drama",)), Compare("year", ">=", 1990)

moments = st.datetimes(datetime(1700, 1, 1), datetime(2300, 1, 1), timezones=st.just(UTC))
values = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), moments)
names = st.one_of(st.sampled_from(["year", "and", "In", "a b", 'x"y', "é"]), st.text(min_size=1))
tests = st.one_of(
    st.builds(In, names, st.lists(values, min_size=1, max_size=3).map(tuple)),
    st.builds(Compare, names, st.sampled_from(["<", "<=", ">", ">="]), values),
    st.builds(Missing, names),
)
filters = st.recursive(
    tests,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: Or(tuple(parts))),
    ),
    max_leaves=6,
)


@given(filter_=filters)
def test_the_text_of_a_filter_reads_back_as_that_filter(filter_: Filter) -> None:
    again = filter_from(str(filter_))
    assert again == filter_
    assert str(again) == str(filter_)


@pytest.mark.parametrize(
    ("text", "filter_"),
    [
        ("category = 'drama'", DRAMA),
        (" category='drama'and year>=1990 ", DRAMA & RECENT),
        ("not category = 'drama' or year >= 1990", ~DRAMA | RECENT),
        ("not (category = 'drama' OR year >= 1990)", ~(DRAMA | RECENT)),
        ("category != 'drama'", ~DRAMA),
        ("category not in ('it''s', 'b')", ~In("category", ("it's", "b"))),
        ('"release date" is not missing', ~Missing("release date")),
        ("kids = true and score > -1.5e2", In("kids", (True,)) & Compare("score", ">", -150.0)),
        ("t < 2024-05-01", Compare("t", "<", datetime(2024, 5, 1, tzinfo=UTC))),
        ("t < 2024-05-01T12:30", Compare("t", "<", datetime(2024, 5, 1, 12, 30, tzinfo=UTC))),
        (
            "t < 2024-05-01T12:30:01.5+02:00",
            Compare("t", "<", datetime(2024, 5, 1, 12, 30, 1, 500000, timezone(timedelta(hours=2)))),
        ),
    ],
)
def test_text_means_what_it_says(text: str, filter_: Filter) -> None:
    assert filter_from(text) == filter_


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "wants the name of an attribute in place of its end at character 1"),
        ("year", "wants an operator in place of its end at character 5"),
        ("year >= drama", r"wants a value \('text' stands in single quotes\) in place of 'drama' at character 9"),
        ("year >= 1990 1991", "wants 'and', 'or' or the end in place of '1991' at character 14"),
        ("(year >= 1990", r"wants '\)' in place of its end at character 14"),
        ("year in 1990", r"wants '\(' in place of '1990' at character 9"),
        ("year ~ 1990", "cannot read '~ 1990' at character 6"),
        ("t < 2024-02-30", "'2024-02-30' at character 5 is no moment"),
        ("(" * 60 + "a = 1" + ")" * 60, "nested deeper than 50 levels"),
        ("not " * 5000 + "a = 1", "nested deeper than 50 levels"),
        ("a > 1e999", "attribute 'a', operator '>': inf is neither text"),
    ],
)
def test_what_is_no_filter_is_told_where(text: str, sentence: str) -> None:
    with pytest.raises(FilterError, match=sentence):
        filter_from(text)


def test_a_filter_must_test_something() -> None:
    for make in (lambda: In("a", ()), lambda: And(()), lambda: Or(()), lambda: Compare("a", "~", 1)):
        with pytest.raises(FilterError):
            make()
