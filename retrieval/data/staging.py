"""What staged columns mean: ids, times and actions as they came, turned into SQL over one staged table.

Rows are first copied, in the log's order, into a DuckDB table whose `rowid` is then a row's place in the log; values
stay as they came. Only with all of them at hand is it decided, for instance, whether ids in a CSV are integers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from retrieval.data.dataset import ActionValue
from retrieval.data.duck import Engine, literal
from retrieval.data.events import Kind, Part, Source
from retrieval.data.schemas import EventSchema, IdType, TimeUnit
from retrieval.errors import DataError

__all__ = [
    "FOREIGN",
    "IdColumn",
    "TimeColumn",
    "check_order",
    "read_actions",
    "read_ids",
    "read_times",
    "staged_id",
    "staged_order",
    "staged_text",
    "staged_time",
]

Expressions = dict[str, Callable[[Part], str]]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COMPARISON = re.compile(r"(>=|<=|!=|==|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+))")
_COMPARE: Mapping[str, Callable[[Decimal, Decimal], bool]] = {
    ">=": Decimal.__ge__, "<=": Decimal.__le__, ">": Decimal.__gt__, "<": Decimal.__lt__,
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip
# How kinds of columns that cannot be ids are called in messages.
FOREIGN: Mapping[Kind, str] = {
    "float": "floating-point numbers (pandas makes integers with missing values so; write them as Int64)",
    "boolean": "booleans",
    "time": "times",
    "other": "values that are neither text nor numbers",
}
MAX_ACTIONS = 254
# From which size on a number is a time in a unit: 1e11 s is the year 5138, 1e11 ms is March 1973.
_MAGNITUDES: tuple[tuple[Literal["s", "ms", "us"] | None, str, float], ...] = (
    ("s", "seconds", 0),
    ("ms", "milliseconds", 1e11),
    ("us", "microseconds", 1e14),
    (None, "no unit", 1e17),
)
_MICROSECONDS = {"s": 1_000_000, "ms": 1_000, "us": 1}
_YEAR_2200 = 7_258_118_400 * 1_000_000


def staged_text(name: str, kind: Kind) -> Callable[[Part], str]:
    """SQL of a column as text; empty text and not-a-number are missing."""

    def make(part: Part) -> str:
        column = part.column(name)
        if kind == "json":
            return f"nullif({column}->>'$', '')"
        if kind == "float":
            return f"CASE WHEN isfinite(CAST({column} AS DOUBLE)) THEN CAST({column} AS VARCHAR) END"
        return f"nullif(CAST({column} AS VARCHAR), '')"

    return make


def staged_id(alias: str, name: str, kind: Kind) -> Expressions:
    """SQL that stages an id column as `alias`, for JSON with the value's own type as `<alias>_type`."""
    if kind == "json":
        own = {f"{alias}_type": lambda part: f"json_type({part.column(name)})"}
        return {alias: staged_text(name, kind), **own}
    if kind == "integer":
        return {alias: lambda part: part.column(name)}
    return {alias: staged_text(name, kind)}


def staged_time(alias: str, name: str, kind: Kind) -> Expressions:
    """SQL that stages times: microseconds (BIGINT) of typed times, numbers as DOUBLE, anything else as text."""

    def make(part: Part) -> str:
        column = part.column(name)
        if kind == "time":
            # epoch_us rounds nanoseconds to the nearest, which could reach into the next second.
            nanoseconds = part.types[name] == "TIMESTAMP_NS"
            return f"epoch_ns({column}) // 1000" if nanoseconds else f"epoch_us({column})"
        if kind in ("integer", "float"):
            # Exact up to 2^53, which lies beyond the year 2200 in microseconds.
            return f"nullif(CAST({column} AS DOUBLE), 'nan')"
        return staged_text(name, kind)(part)

    return {alias: make}


def staged_order(alias: str, name: str, kind: Kind) -> Expressions:
    """SQL that stages the numbers which order events of equal time, as DOUBLE: null where there is none."""

    def make(part: Part) -> str:
        number = f"TRY_CAST({staged_text(name, kind)(part)} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN {number} END"

    return {alias: make}


def check_order(engine: Engine, source: Source, name: str) -> None:
    """Raise `DataError` if a staged row has no number to be ordered by."""
    missing = engine.rows("SELECT rowid + 1 FROM staged WHERE place IS NULL ORDER BY rowid LIMIT 1")
    if missing:
        raise DataError(f"{source.path}: column {name!r} has no number to order by in row {missing[0][0]:,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdColumn:
    """Ids of a staged table.

    Attributes:
        type: what they are.
        free: whether integers could as well be read as strings (delimited text).
        integers, strings: SQL of the ids read as either.
    """

    type: Literal["integer", "string"]
    free: bool
    integers: str
    strings: str

    def read_as(self, type_: Literal["integer", "string"]) -> str:
        """SQL of the ids as integers (BIGINT) or strings."""
        return self.integers if type_ == "integer" else self.strings


def read_ids(engine: Engine, table: str, alias: str, source: Source, name: str, kind: Kind, wanted: IdType) -> IdColumn:
    """Find whether staged ids are integers or strings.

    Raises:
        DataError: ids are of a type that cannot name things, of mixed types, beyond 64 bits, or not as `wanted`.
    """
    column = f"{source.path}: column {name!r}"
    if kind == "null":
        raise DataError(f"{column} is empty in every row; ids are needed")
    if kind not in ("integer", "text", "csv", "json"):
        raise DataError(f"{column} holds {FOREIGN.get(kind, kind)}; ids must be integers or strings")
    if kind == "json":
        kind = _json_kind(engine, table, alias, column, wanted)
    cast = f"TRY_CAST({alias} AS BIGINT)"
    strings = f"CAST({alias} AS VARCHAR)"
    found = IdColumn(type="string", free=False, integers=cast, strings=strings)
    if wanted == "string" or (kind == "text" and wanted == "auto"):
        return found
    # The round trip through BIGINT also finds integers that do not fit in it.
    bad = f"{alias} IS NOT NULL AND ({cast} IS NULL OR CAST({cast} AS VARCHAR) <> {strings})"
    example = engine.rows(f"SELECT rowid, {strings} FROM {table} WHERE {bad} ORDER BY rowid LIMIT 1")
    if not example:
        return IdColumn(type="integer", free=kind == "csv", integers=cast, strings=strings)
    if kind == "csv" and wanted == "auto":
        return found
    where = source.locate(engine, example[0][0])
    raise DataError(f"{column}: {example[0][1]!r} ({where}) is not a 64-bit integer id")


def _json_kind(engine: Engine, table: str, alias: str, column: str, wanted: IdType) -> Kind:
    found = {kind for (kind,) in engine.rows(f"SELECT DISTINCT {alias}_type FROM {table} WHERE {alias} IS NOT NULL")}
    kinds = {"integer" if kind in ("BIGINT", "UBIGINT") else kind for kind in found}
    foreign = kinds - {"integer", "VARCHAR"}
    if foreign:
        names = {"DOUBLE": FOREIGN["float"], "BOOLEAN": "booleans"}
        holds = names.get(min(foreign), FOREIGN["other"])
        raise DataError(f"{column} holds {holds}; ids must be integers or strings")
    if len(kinds) > 1 and wanted == "auto":
        raise DataError(f"{column} mixes integers and strings; say which they are (user_type, item_type)")
    return "integer" if kinds == {"integer"} else "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeColumn:
    """Times of the staged table: their unit, and SQL of microseconds since 1970 (BIGINT, null where unreadable)."""

    unit: str
    microseconds: str


def read_times(
    engine: Engine, table: str, source: Source, name: str, kind: Kind, unit: TimeUnit = "auto"
) -> TimeColumn:
    """Find the unit of staged times (column `time`) and check that all lie in 1970 to 2200.

    Raises:
        DataError: the column holds no times, mixes magnitudes, or a time lies outside that range.
    """
    column = f"{source.path}: column {name!r}"
    if kind in ("boolean", "other"):
        raise DataError(f"{column} holds {FOREIGN[kind]}, not times")
    if kind == "time":
        if unit not in ("auto", "iso"):
            raise DataError(f"{column} holds typed times; leave time_unit at auto instead of {unit!r}")
        return _in_range(engine, table, source, column, "timestamp", "time")
    numeric = kind in ("integer", "float")
    if unit == "iso" and numeric:
        raise DataError(f"{column} holds numbers, but time_unit is iso; give s, ms or us")
    number = "time" if numeric else "TRY_CAST(time AS DOUBLE)"
    number = f"CASE WHEN isfinite({number}) THEN {number} END"
    iso = "epoch_us(TRY_CAST(time AS TIMESTAMPTZ))"
    if unit == "auto":
        unit = _unit_of(engine, table, source, column, number, "NULL" if numeric else iso)
    if unit == "iso":
        return _in_range(engine, table, source, column, unit, iso)
    return _in_range(engine, table, source, column, unit, f"floor(({number}) * {_MICROSECONDS[unit]})")


def _unit_of(
    engine: Engine, table: str, source: Source, column: str, number: str, iso: str
) -> Literal["s", "ms", "us", "iso"]:
    """Unit of times by what most rows look like; numbers must all have the magnitude of one unit."""
    at_least = ", ".join(f"count(*) FILTER (abs(n) >= {low})" for _, _, low in _MAGNITUDES)
    *reached, texts = engine.row(f"SELECT {at_least}, count({iso}) FROM (SELECT time, {number} AS n FROM {table})")
    if texts > reached[0]:
        return "iso"
    counts = [low - high for low, high in zip(reached, (*reached[1:], 0), strict=True)]
    used = [place for place, count in enumerate(counts) if count]
    unit = _MAGNITUDES[used[0]][0] if used else "s"
    if unit is None:
        raise DataError(f"{column} holds numbers too large for microseconds; give seconds, milli- or microseconds")
    if len(used) > 1:
        rarest = min(used, key=lambda place: counts[place])
        above = f"abs(n) >= {_MAGNITUDES[rarest][2]}"
        below = f"abs(n) < {_MAGNITUDES[rarest + 1][2]}" if rarest + 1 < len(_MAGNITUDES) else "true"
        rowid, example = engine.row(
            f"SELECT rowid, CAST(time AS VARCHAR) FROM (SELECT rowid, time, {number} AS n FROM {table}) "
            f"WHERE {above} AND {below} ORDER BY rowid LIMIT 1"
        )
        seen = ", ".join(f"{counts[place]:,} like {_MAGNITUDES[place][1]}" for place in used)
        where = source.locate(engine, rowid)
        raise DataError(f"{column} mixes magnitudes of time: {seen}, e.g. {example} ({where}); give time_unit")
    return unit


def _in_range(engine: Engine, table: str, source: Source, column: str, unit: str, microseconds: str) -> TimeColumn:
    outside = f"{microseconds} < 0 OR {microseconds} >= {_YEAR_2200}"
    found = engine.rows(f"SELECT rowid, CAST(time AS VARCHAR) FROM {table} WHERE {outside} ORDER BY rowid LIMIT 1")
    if found:
        where = source.locate(engine, found[0][0])
        raise DataError(f"{column}: {found[0][1]} ({where}), read as {unit}, is not a time from 1970 to 2200")
    return TimeColumn(unit=unit, microseconds=f"CAST({microseconds} AS BIGINT)")


def read_actions(engine: Engine, valid: str, column: str, name: str, schema: EventSchema) -> tuple[ActionValue, ...]:
    """Give every action value a code and write table `actions` (value as staged, code).

    Args:
        engine: holds the staged rows.
        valid: SQL of the rows that count; their column `action` is text.
        column: the column with its file, for messages.
        name: the column alone.
        schema: names the positive values.

    Returns:
        Values by code; code 0 is an event without an action.

    Raises:
        DataError: too many values to be actions, or a positive value that does not occur.
    """
    distinct = f"SELECT DISTINCT action FROM ({valid}) WHERE action IS NOT NULL"
    staged = [text for (text,) in engine.rows(f"{distinct} LIMIT {8 * MAX_ACTIONS}")]
    numeric = all(_NUMBER.fullmatch(text) for text in staged)
    shown = {text: _minimal(text) if numeric else text for text in staged}
    values = sorted(set(shown.values()), key=Decimal if numeric else str.encode)
    if len(values) > MAX_ACTIONS:
        (count,) = engine.row(f"SELECT count(*) FROM ({distinct})")
        raise DataError(
            f"{column} has {count:,} distinct values; an action column has at most {MAX_ACTIONS} "
            "(map another column, or none by the name '')"
        )
    positive = _positive(schema.positive, values, numeric, name)
    codes = {value: code for code, value in enumerate(values, 1)}
    engine.rows("CREATE TABLE actions (value VARCHAR, code UTINYINT)")
    if shown:
        pairs = ", ".join(f"({literal(text)}, {codes[value]})" for text, value in shown.items())
        engine.rows(f"INSERT INTO actions VALUES {pairs}")
    none = ActionValue(value="", positive=False)
    return (none, *(ActionValue(value=value, positive=value in positive) for value in values))


def _minimal(text: str) -> str:
    number = Decimal(text)
    return format(number.normalize(), "f") if number else "0"


def _positive(wanted: tuple[str, ...], values: list[str], numeric: bool, name: str) -> set[str]:
    if not wanted:
        return set(values)
    positive: set[str] = set()
    for entry in wanted:
        comparison = _COMPARISON.fullmatch(entry.strip())
        if entry in values:
            positive.add(entry)
        elif numeric and _NUMBER.fullmatch(entry) and _minimal(entry) in values:
            positive.add(_minimal(entry))
        elif comparison and not numeric:
            raise DataError(f"positive: {entry!r} compares numbers, but column {name!r} holds text: {_some(values)}")
        else:
            met = (
                {v for v in values if _COMPARE[comparison[1]](Decimal(v), Decimal(comparison[2]))}
                if comparison
                else set()
            )
            if not met:
                raise DataError(f"positive: no action is {entry!r}; column {name!r} has the values {_some(values)}")
            positive |= met
    return positive


def _some(values: list[str]) -> str:
    return ", ".join(values[:20]) + (f" and {len(values) - 20} more" if len(values) > 20 else "")
