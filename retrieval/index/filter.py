"""Conditions on the attributes of items, as values and as text.

A filter says which items may be answered. It is built from tests by `&`, `|` and `~`, or read from text:

    category in ('drama', 'comedy') and published >= 2024-05-01 and not language = 'de'

    filter := all ('or' all)*            all := one ('and' one)*
    one    := 'not' one | '(' filter ')' | test
    test   := name ('=' | '!=' | '<' | '<=' | '>' | '>=') value
            | name ['not'] 'in' '(' value (',' value)* ')'
            | name 'is' ['not'] 'missing'
    name   := letters, digits and _, or anything in "double quotes"
    value  := 'text' | number | true | false | day or moment as in ISO 8601 (UTC where it names no offset)

Quotes are doubled inside quotes. What is missing (null, not-a-number, an empty list) is in no set and on no side of a
bound, and `not` is the complement: `not language = 'de'` holds where the language is missing. An attribute with
several values passes a test if any of its values does.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

from retrieval.errors import FilterError

__all__ = ["And", "Compare", "Filter", "In", "Missing", "Not", "Or", "Value", "filter_from"]

Value = str | int | float | bool | datetime

_OPERATORS: Final = ("<=", ">=", "<", ">")
_WORDS: Final = frozenset(("and", "or", "not", "in", "is", "missing", "true", "false"))
# A request may not make the reader, or what walks its result, recurse without end.
_DEEPEST: Final = 50


class Filter:
    """A condition that each item meets or does not. `str` gives its text, from which `filter_from` reads it back."""

    def __and__(self, other: "Filter") -> "And":
        return And((self, other))

    def __or__(self, other: "Filter") -> "Or":
        return Or((self, other))

    def __invert__(self) -> "Not":
        return Not(self)


@dataclass(frozen=True, slots=True)
class In(Filter):
    """The attribute has one of `values`; at least one of an attribute with several values.

    Raises:
        FilterError: there are no values, or one is no value of a filter.
    """

    attribute: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise FilterError(f"attribute {self.attribute!r}, operator 'in': names no values")
        for value in self.values:
            _check_value(self.attribute, "in", value)

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{_name(self.attribute)} = {literal(self.values[0])}"
        return f"{_name(self.attribute)} in ({', '.join(map(literal, self.values))})"


@dataclass(frozen=True, slots=True)
class Compare(Filter):
    """The attribute lies on one side of a bound: `operator` is one of <, <=, >, >=.

    Raises:
        FilterError: the operator is another, or the bound is no value of a filter.
    """

    attribute: str
    operator: str
    value: Value

    def __post_init__(self) -> None:
        if self.operator not in _OPERATORS:
            raise FilterError(f"attribute {self.attribute!r}: {self.operator!r} is none of {', '.join(_OPERATORS)}")
        _check_value(self.attribute, self.operator, self.value)

    def __str__(self) -> str:
        return f"{_name(self.attribute)} {self.operator} {literal(self.value)}"


@dataclass(frozen=True, slots=True)
class Missing(Filter):
    """The attribute has no value."""

    attribute: str

    def __str__(self) -> str:
        return f"{_name(self.attribute)} is missing"


@dataclass(frozen=True, slots=True)
class And(Filter):
    """All of the parts hold.

    Raises:
        FilterError: there are no parts.
    """

    parts: tuple[Filter, ...]

    def __post_init__(self) -> None:
        _check_parts(self.parts, "and")

    def __str__(self) -> str:
        return _joined(self.parts, "and")


@dataclass(frozen=True, slots=True)
class Or(Filter):
    """At least one of the parts holds.

    Raises:
        FilterError: there are no parts.
    """

    parts: tuple[Filter, ...]

    def __post_init__(self) -> None:
        _check_parts(self.parts, "or")

    def __str__(self) -> str:
        return _joined(self.parts, "or")


@dataclass(frozen=True, slots=True)
class Not(Filter):
    """The part does not hold."""

    part: Filter

    def __str__(self) -> str:
        return f"not {_grouped(self.part)}"


def _check_parts(parts: tuple[Filter, ...], word: str) -> None:
    if not parts:
        raise FilterError(f"filter: {word!r} joins no parts")


def _joined(parts: tuple[Filter, ...], word: str) -> str:
    return f" {word} ".join(map(_grouped, parts))


def _grouped(part: Filter) -> str:
    return f"({part})" if isinstance(part, And | Or) else str(part)


def _name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and name.lower() not in _WORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def _check_value(attribute: str, operator: str, value: Value) -> None:
    if not isinstance(value, str | int | float | datetime) or (isinstance(value, float) and not math.isfinite(value)):
        raise FilterError(
            f"attribute {attribute!r}, operator {operator!r}: {value!r} is neither text, a finite number, "
            "true or false, nor a moment"
        )


def literal(value: Value) -> str:
    """A value as the text of a filter writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return moment.isoformat().replace("+00:00", "Z")
    return repr(value)


_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*') |
        (?P<quoted>"(?:[^"]|"")*") |
        (?P<moment>\d{4}-\d\d-\d\d(?:T\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?)(?![\w.]) |
        (?P<number>-?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?))(?![\w.]) |
        (?P<word>[A-Za-z_]\w*) |
        (?P<sign><=|>=|!=|[=<>(),])
    )""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int


def _tokens(text: str) -> Iterator[_Token]:
    place = 0
    end = len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            place += len(text[place:]) - len(text[place:].lstrip())
            raise FilterError(f"filter: cannot read {text[place : place + 20]!r} at character {place + 1}")
        kind = match.lastgroup
        assert kind is not None
        found = match.group(kind)
        is_keyword = kind == "word" and found.lower() in _WORDS
        yield _Token(found.lower() if is_keyword else kind, found, match.start(kind) + 1)
        place = match.end()
    yield _Token("end", "", end + 1)


def filter_from(text: str) -> Filter:
    """Read a filter.

    Raises:
        FilterError: the text is no filter; the sentence says what is wrong at which character.
    """
    return _Reader(text).whole()


class _Reader:
    """Recursive descent over the tokens; one method per rule of the grammar."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._next = 0
        self._depth = 0

    def whole(self) -> Filter:
        found = self._either()
        if self._token.kind != "end":
            raise self._wrong("'and', 'or' or the end")
        return found

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._token
        self._next += token.kind != "end"
        return token

    def _took(self, what: str) -> bool:
        """Whether the next token is this word or sign; it is taken if so."""
        token = self._token
        if token.kind != what and not (token.kind == "sign" and token.text == what):
            return False
        self._next += 1
        return True

    def _must_take(self, what: str) -> None:
        if not self._took(what):
            raise self._wrong(repr(what))

    def _wrong(self, wanted: str) -> FilterError:
        token = self._token
        found = repr(token.text) if token.text else "its end"
        return FilterError(f"filter: wants {wanted} in place of {found} at character {token.place}")

    def _either(self) -> Filter:
        parts = self._several("or", self._all)
        return parts[0] if len(parts) == 1 else Or(parts)

    def _all(self) -> Filter:
        parts = self._several("and", self._one)
        return parts[0] if len(parts) == 1 else And(parts)

    def _several(self, word: str, read: Callable[[], Filter]) -> tuple[Filter, ...]:
        parts = [read()]
        while self._took(word):
            parts.append(read())
        return tuple(parts)

    def _one(self) -> Filter:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise FilterError(f"filter: is nested deeper than {_DEEPEST} levels at character {self._token.place}")
        if self._took("not"):
            found: Filter = Not(self._one())
        elif self._took("("):
            found = self._either()
            self._must_take(")")
        else:
            found = self._test()
        self._depth -= 1
        return found

    def _test(self) -> Filter:
        if self._token.kind not in ("word", "quoted"):
            raise self._wrong("the name of an attribute")
        token = self._take()
        name = token.text[1:-1].replace('""', '"') if token.kind == "quoted" else token.text
        if self._took("is"):
            negated = self._took("not")
            self._must_take("missing")
            return Not(Missing(name)) if negated else Missing(name)
        if self._token.kind in ("not", "in"):
            negated = self._took("not")
            self._must_take("in")
            self._must_take("(")
            values = [self._value()]
            while self._took(","):
                values.append(self._value())
            self._must_take(")")
            return Not(In(name, tuple(values))) if negated else In(name, tuple(values))
        if self._token.text not in (*_OPERATORS, "=", "!="):
            raise self._wrong("an operator")
        operator = self._take().text
        value = self._value()
        if operator in _OPERATORS:
            return Compare(name, operator, value)
        return In(name, (value,)) if operator == "=" else Not(In(name, (value,)))

    def _value(self) -> Value:
        token = self._token
        value: Value
        if token.kind == "text":
            value = token.text[1:-1].replace("''", "'")
        elif token.kind == "number":
            value = float(token.text) if re.search(r"[.eE]", token.text) else int(token.text)
        elif token.kind in ("true", "false"):
            value = token.kind == "true"
        elif token.kind == "moment":
            value = _moment(token)
        else:
            raise self._wrong("a value ('text' stands in single quotes)")
        self._next += 1
        return value


def _moment(token: _Token) -> datetime:
    try:
        if "T" not in token.text:
            day = date.fromisoformat(token.text)
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        moment = datetime.fromisoformat(token.text)
    except ValueError as error:
        raise FilterError(f"filter: {token.text!r} at character {token.place} is no moment ({error})") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
