"""Ingest of what is read beside the main series: context from a users' file, auxiliary series from logs.

Values are taken as text. Each column becomes a kind of tokens with a table `kind<k>` of its values, the most frequent
first; a row of the kind's table is a value's place there, counted from 1, and 0 for a value that has none.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.data.columns import write_columns
from retrieval.data.duck import Engine, literal
from retrieval.data.events import Part, Source, open_source
from retrieval.data.features import FeatureSchema, SideColumn
from retrieval.data.schemas import SeriesSchema, UserSchema
from retrieval.data.spill import Spill
from retrieval.data.staging import FOREIGN, IdColumn, read_ids, read_times, staged_id, staged_text, staged_time
from retrieval.errors import DataError
from retrieval.types import TokenKind

__all__ = [
    "People",
    "Points",
    "read_kinds",
    "series_points",
    "spill_auxiliary",
    "stage_people",
    "stage_points",
    "staged_values",
    "write_side",
]

_CONTEXT, _AUXILIARY = "c", "s"
# Places of points with a log of their own come after those of events, whose places are numbers of rows.
_AFTER_EVENTS = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class People:
    """A users' file in table `people`, one row per row of the file: its source and user ids."""

    source: Source
    ids: IdColumn


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """A log of auxiliary series, opened, and SQL of its rows that are points: user, series, value, micros, ordinal.

    Attributes:
        names: of the series that it has points of.
        passed_over: rows without a user, a value or a time, and those of other series.
    """

    source: Source
    valid: str
    names: frozenset[str]
    passed_over: int


def staged_values(source: Source, names: Iterable[str], prefix: str = _AUXILIARY) -> dict[str, Callable[[Part], str]]:
    """SQL that stages columns as text, named by their places from `s0` on.

    Raises:
        DataError: a column is missing, or holds what is no value.
    """
    expressions = {}
    for place, name in enumerate(names):
        kind = source.kind(name, "a series")
        if kind == "other":
            raise DataError(f"{source.path}: column {name!r} holds {FOREIGN[kind]}, which cannot be a series")
        expressions[f"{prefix}{place}"] = staged_text(name, kind)
    return expressions


def stage_people(
    engine: Engine, path: Path, schema: UserSchema, features: FeatureSchema, user_type: Literal["integer", "string"]
) -> People:
    """Read a users' file into table `people`.

    Args:
        engine: where the table goes.
        path: file or folder, found and read like a log.
        schema: its columns.
        features: names the columns that are read.
        user_type: type of the log's user ids.

    Raises:
        DataError: the file cannot be read, lacks a column, or has ids of another type.
    """
    source = open_source(engine, path, schema, wanted=(schema.user, *features.context))
    kind = source.kind(schema.user, "user ids")
    expressions = staged_id("user", schema.user, kind) | staged_values(source, features.context, _CONTEXT)
    engine.rows(f"CREATE TABLE people AS {source.select(expressions)}", stage="users")
    ids = read_ids(engine, "people", "user", source, schema.user, kind, user_type)
    return People(source=source, ids=ids)


def stage_points(engine: Engine, path: Path, schema: SeriesSchema, features: FeatureSchema, users: IdColumn) -> Points:
    """Read a log of auxiliary series into table `points`.

    Args:
        engine: where the table goes.
        path: file or folder, found and read like a log.
        schema: its columns.
        features: names the series that are read.
        users: the log's user ids.

    Raises:
        DataError: the file cannot be read, lacks a column, or has ids of another type or unusable times.
    """
    source = open_source(engine, path, schema, wanted=(schema.user, schema.series, schema.value, schema.time))
    user, time = source.kind(schema.user, "user ids"), source.kind(schema.time, "times")
    texts = staged_values(source, (schema.series, schema.value), "text")
    expressions = staged_id("user", schema.user, user) | texts | staged_time("time", schema.time, time)
    engine.rows(f"CREATE TABLE points AS {source.select(expressions)}", stage="series")
    ids = read_ids(engine, "points", "user", source, schema.user, user, users.type)
    times = read_times(engine, "points", source, schema.time, time)
    declared = ", ".join(literal(name) for name in features.auxiliary)
    valid = (
        f"SELECT * FROM (SELECT {ids.read_as(users.type)} AS user, text0 AS series, text1 AS value, "
        f"{times.microseconds} AS micros, rowid + {_AFTER_EVENTS} AS ordinal FROM points) WHERE user IS NOT NULL "
        f"AND value IS NOT NULL AND micros IS NOT NULL AND series IN ({declared})"
    )
    (rows,) = engine.row("SELECT count(*) FROM points")
    counts = engine.rows(f"SELECT series, count(*) FROM ({valid}) GROUP BY 1")
    names = frozenset(name for name, _ in counts)
    return Points(source=source, valid=valid, names=names, passed_over=rows - sum(count for _, count in counts))


def series_points(valid: str, columns: Mapping[str, str], points: Points | None, features: FeatureSchema) -> list[str]:
    """SQL of each auxiliary series' points (user, micros, ordinal, value), in the order of the features.

    Args:
        valid: SQL of the events, with staged values.
        columns: staged columns of the event log by series.
        points: series with a log of their own. A series may have both.
        features: names the series.
    """
    found = []
    for name in features.auxiliary:
        parts = []
        if name in columns:
            value = columns[name]
            parts.append(f"SELECT user, micros, ordinal, {value} AS value FROM ({valid}) WHERE {value} IS NOT NULL")
        if points is not None and name in points.names:
            own = f"SELECT user, micros, ordinal, value FROM ({points.valid}) WHERE series = {literal(name)}"
            parts.append(own)
        found.append(" UNION ALL ".join(parts))
    return found


def read_kinds(
    engine: Engine, series: list[str], people: People | None, users: IdColumn, features: FeatureSchema
) -> tuple[TokenKind, ...]:
    """Write tables `kind1`, … (value, code) and `context` (a row per user); return what they hold, context first.

    Args:
        engine: holds tables `users` and, where there is context, `people`.
        series: what `series_points` returned.
        people: the users' file.
        users: the log's user ids.
        features: the columns and their bounds.
    """
    if people is not None:
        # The first row of a user counts, as with items.
        first = "QUALIFY row_number() OVER (PARTITION BY user ORDER BY place) = 1"
        ids = f"SELECT * REPLACE ({people.ids.read_as(users.type)} AS user), rowid AS place FROM people"
        described = f"SELECT * FROM ({ids}) WHERE user IS NOT NULL {first}"
        engine.rows(
            f"CREATE TABLE context AS SELECT u.rowid AS row, p.* FROM users u LEFT JOIN ({described}) p "
            "ON u.id = p.user ORDER BY u.rowid",
            "users",
        )
    columns: list[tuple[str, SideColumn, str, str, bool]] = [
        (name, bounds, f"{_CONTEXT}{place}", "context", True)
        for place, (name, bounds) in enumerate(features.context.items())
    ]
    columns += [
        (name, bounds, "value", f"({points})", False)
        for (name, bounds), points in zip(features.auxiliary.items(), series, strict=True)
    ]
    kinds = []
    for number, (name, bounds, column, table, is_context) in enumerate(columns, 1):
        engine.rows(
            f"CREATE TABLE kind{number} AS SELECT value, row_number() OVER () AS code FROM ("
            f"SELECT {column} AS value, count(*) AS n FROM {table} WHERE {column} IS NOT NULL GROUP BY 1 "
            f"HAVING n >= {bounds.min_count} ORDER BY n DESC, value LIMIT {bounds.max_values})",
            "codes",
        )
        values = engine.rows(f"SELECT value FROM kind{number} ORDER BY code")
        kinds.append(TokenKind(name=name, context=is_context, values=tuple(value for (value,) in values)))
    return tuple(kinds)


def spill_auxiliary(engine: Engine, series: list[str], kinds: tuple[TokenKind, ...], users: int, spill: Spill) -> None:
    """Write the first event of each run of equal values as raw columns.

    Args:
        engine: holds tables `users` and `kind<k>`.
        series: what `series_points` returned.
        kinds: what `read_kinds` returned.
        users: U.
        spill: takes columns `auxiliary_kind`, `auxiliary_value`, `auxiliary_timestamp` and `auxiliary_end`.
    """
    numbers = [number for number, kind in enumerate(kinds, 1) if not kind.context]
    coded = " UNION ALL ".join(
        f"SELECT CAST({number} AS UTINYINT) AS kind, e.user, e.micros, e.ordinal, "
        f"CAST(coalesce(k.code, 0) AS INTEGER) AS value FROM ({points}) e LEFT JOIN kind{number} k ON e.value = k.value"
        for number, points in zip(numbers, series, strict=True)
    )
    before = "lag(value) OVER (PARTITION BY user, kind ORDER BY micros, ordinal)"
    query = (
        "SELECT CAST(u.rowid AS BIGINT) AS user, kind, value, micros // 1000000 AS timestamp "
        f"FROM (SELECT *, {before} AS before FROM ({coded})) e JOIN users u ON e.user = u.id "
        "WHERE value IS DISTINCT FROM before ORDER BY 1, micros, kind, ordinal"
    )
    types = {"kind": np.uint8, "value": np.int32, "timestamp": np.int64}
    files = {name: spill.file(f"auxiliary_{name}") for name in types}
    counts: NDArray[np.int64] = np.zeros(users, np.int64)
    try:
        for batch in engine.batches(query, stage="series") if series else ():
            counts += np.bincount(batch.column("user").to_numpy(), minlength=users)
            for name, type_ in types.items():
                files[name].write(np.ascontiguousarray(batch.column(name).to_numpy(), type_).data)
    finally:
        for file in files.values():
            file.close()
    with spill.file("auxiliary_end") as file:
        file.write(np.cumsum(counts).data)


def write_side(engine: Engine, kinds: tuple[TokenKind, ...], spill: Spill, folder: Path) -> None:
    """Write the dataset's files of context and auxiliary events."""
    context = [(number, kind.name) for number, kind in enumerate(kinds, 1) if kind.context]
    columns: Mapping[str, pa.Array] = {}
    for place, (number, name) in enumerate(context):
        table = engine.table(
            f"SELECT CAST(coalesce(k.code, 0) AS INTEGER) AS value FROM context c LEFT JOIN kind{number} k "
            f"ON c.{_CONTEXT}{place} = k.value ORDER BY c.row"
        )
        columns = {**columns, name: pa.concat_arrays(table.column("value").chunks)}
    if context:
        write_columns(folder / "context.arrow", columns)
    types = {"kind": pa.uint8(), "value": pa.int32(), "timestamp": pa.int64()}
    events = {name: spill.column(f"auxiliary_{name}", type_) for name, type_ in types.items()}
    spill.write(folder / "auxiliary.arrow", events)
    spill.write(folder / "ends.arrow", {"end": spill.column("auxiliary_end", pa.int64())})
