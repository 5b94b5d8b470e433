"""From an event log to a dataset folder, out of core.

    files ─ stage ─▶ DuckDB table in the log's order ─ decide ids, times, actions ─▶ codes
        ─ one sort of narrow integers by (user, time, place in the log) ─ sweep ─▶ Arrow columns

Equal times keep the order of the log (files by name, then rows as they stand) or take that of a column named for it.
Times are compared as they were written, to the microsecond; what is stored are whole seconds.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval.data.catalogue import Catalogue, read_attributes, stage_catalogue
from retrieval.data.dataset import DATASET_FORMAT, ActionValue, Dataset, DatasetInfo, fingerprint_of
from retrieval.data.duck import Engine, Progress
from retrieval.data.events import Source, open_source
from retrieval.data.features import FeatureSchema
from retrieval.data.meaning import Meaning, common_type
from retrieval.data.schemas import Dialect, EventSchema, ItemSchema, SeriesSchema, UserSchema
from retrieval.data.side import (
    People,
    Points,
    read_kinds,
    series_points,
    spill_auxiliary,
    stage_people,
    stage_points,
    staged_values,
    write_side,
)
from retrieval.data.spill import Spill
from retrieval.data.staging import (
    FOREIGN,
    check_order,
    read_actions,
    read_ids,
    read_times,
    staged_id,
    staged_order,
    staged_text,
    staged_time,
)
from retrieval.data.statistics import statistics_of
from retrieval.data.sweep import Rows, Sweep
from retrieval.errors import ConfigError, DataError, RetrievalError
from retrieval.files import new_folder
from retrieval.types import TokenKind

__all__ = ["Dialect", "EventSchema", "ItemSchema", "SeriesSchema", "UserSchema", "ingest"]

_MAX_ITEMS = 2**31 - 1


def ingest(
    sources: Path,
    out: Path,
    *,
    schema: EventSchema | None = None,
    items: Path | None = None,
    item_schema: ItemSchema | None = None,
    users: Path | None = None,
    user_schema: UserSchema | None = None,
    series: Path | None = None,
    series_schema: SeriesSchema | None = None,
    features: FeatureSchema | None = None,
    known: pa.Array | None = None,
    memory: str = "2GB",
    replace: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Turn an event log into a dataset folder.

    Args:
        sources: a Parquet, delimited-text or JSON-lines file, or a folder of files of one format.
        out: the folder to write; it appears whole or not at all.
        schema: columns of the log.
        items: item metadata, in any of the formats.
        item_schema: columns of the metadata.
        users: static attributes of users, in any of the formats.
        user_schema: columns of that file.
        series: a log of auxiliary series, in any of the formats; of users that the event log names.
        series_schema: columns of that log.
        features: which columns are carried beside the main series; those of items are carried anyway.
        known: ids of items that have rows already, in the order of these: they keep them, whether the log still has
            events of them or not, and new items come after. Where items are read too, the vocabulary then tells in a
            column `listed` which of all they name.
        memory: limit of DuckDB's buffers; the process takes some hundred MB more, whatever the log's length.
        replace: whether a dataset folder at `out` may be replaced.
        progress: called with a stage (`read`, `items`, `users`, `check`, `codes`, `sort`, `series`, `write`)
            and the share of it that is done, 0 to 1, in part from a helper thread.

    Returns:
        The dataset, opened. `info.repairs` counts what was mended, `info.statistics` describes the events.

    Raises:
        DataError: the log or the metadata cannot be used; the sentence names file, column and, where it can, row.
        ConfigError: `memory` is no size, or not enough; or `features` names context without a users' file, or none
            or no series for a file that is given.
        RetrievalError: a file cannot be read or written, or the disk is full.
    """
    _refuse_existing(out, replace)
    features = features or FeatureSchema()
    if features.context and users is None:
        raise ConfigError(f"context: {', '.join(features.context)} must come from a users' file, and none is given")
    if users is not None and not features.context:
        raise ConfigError(f"{users}: the features declare no context to be read from a users' file")
    if series is not None and not features.auxiliary:
        raise ConfigError(f"{series}: the features declare no auxiliary series to be read from a log of their own")
    try:
        with new_folder(out, replace=replace) as folder, _scratch(folder) as scratch:
            run = _Ingest(folder, scratch, sources, schema or EventSchema(), features, memory, progress, known)
            people = None if users is None else (users, user_schema or UserSchema())
            points = None if series is None else (series, series_schema or SeriesSchema())
            run.run(items, item_schema or ItemSchema(), people, points)
    except OSError as error:
        raise RetrievalError(f"{error.filename or out}: {error.strerror or error}") from error
    return Dataset(out)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / "scratch"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _refuse_existing(out: Path, replace: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not replace:
        raise DataError(f"{out}: exists already; name another folder, or ask for it to be replaced")
    try:
        known = isinstance(json.loads((out / "dataset.json").read_text(encoding="utf-8"))["format"], int)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(f"{out}: is not a dataset folder, so it is not replaced")


class _Ingest:
    """One run: holds what its steps share."""

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        sources: Path,
        schema: EventSchema,
        features: FeatureSchema,
        memory: str,
        progress: Progress | None,
        known: pa.Array | None,
    ) -> None:
        self.known = known
        self.folder, self.scratch, self.sources, self.schema = folder, scratch, sources, schema
        self.features = features
        self.engine = Engine(scratch, memory, progress)
        self.spill = Spill(scratch)
        self.repairs: dict[str, int] = {}

    def run(
        self,
        items: Path | None,
        item_schema: ItemSchema,
        users: tuple[Path, UserSchema] | None,
        series: tuple[Path, SeriesSchema] | None,
    ) -> None:
        """All steps, in order."""
        with contextlib.closing(self.engine):
            source, action, columns = self._stage(of_their_own=series is not None)
            meaning, catalogue = self._decide(source, action, columns, items, item_schema)
            people = points = None
            if users is not None:
                people = stage_people(self.engine, *users, self.features, meaning.users.type)
            if series is not None:
                points = self._points(*series, meaning)
            rows = self._count_repairs(meaning)
            meaning = self._bounded(meaning, catalogue)
            actions = self._actions(meaning)
            item_count = self._codes(meaning, catalogue)
            sweep = self._sort(meaning, rows, item_count)
            user_ids, item_ids, attributes = self._ids(meaning, catalogue)
            statistics = statistics_of(self.spill, meaning, sweep, rows, actions)
            kinds = self._side(meaning, people, points, len(user_ids))
        self._write(user_ids, item_ids, attributes)
        self.engine.report("write", 0.9)
        info = DatasetInfo(
            format=DATASET_FORMAT,
            users=len(user_ids),
            items=len(item_ids),
            events=sweep.events,
            actions=actions,
            kinds=kinds,
            tie_order=f"column {meaning.order}" if meaning.order else "file order",
            statistics=statistics,
            repairs=self.repairs,
            sources=tuple(
                str(path) for read in (source, catalogue, people, points) if read for path in _files_of(read)
            ),
            fingerprint=fingerprint_of(self.folder),
        )
        (self.folder / "dataset.json").write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        self.engine.report("write", 1.0)

    def _stage(self, *, of_their_own: bool) -> tuple[Source, str | None, dict[str, str]]:
        """Copy the mapped columns into table `staged`, row for row in the log's order.

        Series that may have a log of their own need not be columns of this one.

        Returns:
            The log, its column of actions, and staged columns of series by name.
        """
        schema = self.schema
        named = (schema.user, schema.item, schema.time, *(name for name in (schema.action, schema.order) if name))
        series = tuple(self.features.auxiliary)
        guess = (*(("action",) if schema.action is None else ()), *(series if of_their_own else ()))
        wanted = named if of_their_own else named + series
        source = open_source(self.engine, self.sources, schema, wanted=wanted, optional=guess)
        action = schema.action if schema.action is not None else "action" if "action" in source.columns else None
        expressions = {
            **staged_id("user", schema.user, source.kind(schema.user, "user ids")),
            **staged_id("item", schema.item, source.kind(schema.item, "item ids")),
            **staged_time("time", schema.time, source.kind(schema.time, "times")),
        }
        if action:
            kind = source.kind(action, "actions")
            if kind in ("time", "other"):
                raise DataError(f"{self.sources}: column {action!r} holds {FOREIGN[kind]}, which cannot be actions")
            expressions["action"] = staged_text(action, kind)
        elif schema.positive:
            raise DataError(f"{self.sources}: positive values are named, but the log has no action column")
        if schema.order:
            expressions |= staged_order("place", schema.order, source.kind(schema.order, "places in an order"))
        if of_their_own:
            series = tuple(name for name in series if name in source.columns)
        values = staged_values(source, series)
        expressions |= values
        self.engine.rows(f"CREATE TABLE staged AS {source.select(expressions)}", stage="read")
        if source.empty_files:
            self.repairs["empty_files"] = source.empty_files
        (rows,) = self.engine.row("SELECT count(*) FROM staged")
        if not rows:
            raise DataError(f"{self.sources}: has no events (columns {', '.join(source.columns)}, no rows)")
        return source, action or None, dict(zip(series, values, strict=True))

    def _decide(
        self,
        source: Source,
        action: str | None,
        series: dict[str, str],
        items: Path | None,
        item_schema: ItemSchema,
    ) -> tuple[Meaning, Catalogue | None]:
        """Find the types of ids and the unit of times, and read the item metadata."""
        schema, engine = self.schema, self.engine
        self.engine.report("check", 0.0)
        kinds = [source.kind(name, "") for name in (schema.user, schema.item, schema.time)]
        user_ids = read_ids(engine, "staged", "user", source, schema.user, kinds[0], schema.user_type)
        item_ids = read_ids(engine, "staged", "item", source, schema.item, kinds[1], schema.item_type)
        if schema.order:
            check_order(engine, source, schema.order)
        self.engine.report("check", 0.5)
        times = read_times(engine, "staged", source, schema.time, kinds[2], schema.time_unit)
        catalogue = None
        item_type = item_ids.type
        if items is not None:
            catalogue = stage_catalogue(engine, items, item_schema, schema.item_type)
            item_type = common_type(f"{source.path}: column {schema.item!r}", item_ids, catalogue)
        self.engine.report("check", 1.0)
        if self.known is not None and len(self.known):
            before = "integer" if pa.types.is_integer(self.known.type) else "string"
            if item_type != before:
                raise DataError(
                    f"{source.path}: column {schema.item!r} holds {item_type}s, but the items known before have "
                    f"{before}s as ids; the log must keep to what it was, or the vocabulary be started anew"
                )
        meaning = Meaning(
            source=source,
            users=user_ids,
            items=item_ids,
            times=times,
            action=action,
            order=schema.order,
            series=series,
            item_type=item_type,
        )
        return meaning, catalogue

    def _count_repairs(self, meaning: Meaning) -> int:
        """Count rows that cannot become events, each under its first fault; returns all rows of the log."""
        has_action = meaning.action is not None
        faults = {
            "missing_user": "user IS NULL",
            "missing_item": "user IS NOT NULL AND item IS NULL",
            "missing_time": "user IS NOT NULL AND item IS NOT NULL AND time IS NULL",
            "unparsable_time": "user IS NOT NULL AND item IS NOT NULL AND time IS NOT NULL AND micros IS NULL",
        }
        unlabelled = "user IS NOT NULL AND item IS NOT NULL AND micros IS NOT NULL AND action IS NULL"
        counts = ", ".join(f"count(*) FILTER ({test})" for test in (*faults.values(), unlabelled))
        rows, *found = self.engine.row(f"SELECT count(*), {counts} FROM (SELECT time, {meaning.fields} FROM staged)")
        dropped = dict(zip(faults, found, strict=False))
        if 2 * sum(dropped.values()) > rows:
            why = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in dropped.items() if count)
            raise DataError(
                f"{self.sources}: {sum(dropped.values()):,} of {rows:,} rows have no usable user, item or time "
                f"({why}); are the right columns mapped?"
            )
        self.repairs |= dropped | ({"missing_action": found[-1]} if has_action else {})
        return int(rows)

    def _bounded(self, meaning: Meaning, catalogue: Catalogue | None) -> Meaning:
        """Where there are more items than the features allow, write those that stay into table `kept`."""
        most, engine = self.features.max_items, self.engine
        if most is None:
            return meaning
        known = self._known_items(meaning, catalogue)
        found, events = engine.row(f"SELECT count(DISTINCT id), count(met) FROM ({known})")
        if found <= most:
            return meaning
        latest = "ORDER BY max(met) DESC NULLS FIRST, count(met) DESC, id"
        engine.rows(f"CREATE TABLE kept AS SELECT id FROM ({known}) GROUP BY id {latest} LIMIT {most}", "codes")
        meaning = replace(meaning, bounded=True)
        (left,) = engine.row(f"SELECT count(*) FROM ({meaning.valid})")
        if not left:
            raise DataError(f"max_items: the {most:,} items that stay have no events; {found:,} are known")
        self.repairs |= {"items_left_out": found - most, "events_of_items_left_out": events - left}
        return meaning

    def _known_items(self, meaning: Meaning, catalogue: Catalogue | None) -> str:
        """SQL of the items of the log, an event each with its time `met`, and of the catalogue, where that is null."""
        known = f"SELECT item AS id, micros AS met FROM ({meaning.valid})"
        if catalogue is not None:
            item = catalogue.ids.read_as(meaning.item_type)
            known += f" UNION ALL SELECT {item} AS id, NULL AS met FROM catalogue WHERE {item} IS NOT NULL"
        return known

    def _actions(self, meaning: Meaning) -> tuple[ActionValue, ...]:
        if meaning.action is None:
            self.engine.rows("CREATE TABLE actions (value VARCHAR, code UTINYINT)")
            return (ActionValue(value="", positive=True),)
        column = f"{self.sources}: column {meaning.action!r}"
        return read_actions(self.engine, meaning.valid, column, meaning.action, self.schema)

    def _codes(self, meaning: Meaning, catalogue: Catalogue | None) -> int:
        """Write tables `users` and `vocabulary`; `rowid` is the code. Ids ascend, strings by their bytes.

        Items known before keep their rows, and only the new ones ascend.

        Returns:
            The number of items.
        """
        engine = self.engine
        engine.rows(f"CREATE TABLE users AS SELECT DISTINCT user AS id FROM ({meaning.valid}) ORDER BY id", "codes")
        known = "SELECT id FROM kept" if meaning.bounded else self._known_items(meaning, catalogue)
        found, order = f"SELECT DISTINCT id FROM ({known})", "id"
        if self.known is not None and len(self.known):
            engine.keep("before", pa.table({"id": self.known, "place": np.arange(len(self.known))}))
            found, order = f"SELECT id, place FROM ({found}) FULL JOIN before USING (id)", "place NULLS LAST, id"
        engine.rows(f"CREATE TABLE vocabulary AS SELECT id FROM ({found}) ORDER BY {order}", "codes")
        (count,) = engine.row("SELECT count(*) FROM vocabulary")
        if count > _MAX_ITEMS:
            raise DataError(f"{self.sources}: {count:,} items are more than the {_MAX_ITEMS:,} that a dataset can hold")
        return int(count)

    def _sort(self, meaning: Meaning, rows: int, item_count: int) -> Sweep:
        """Sort events by user, time and place in the log, and sweep them into raw column files."""
        place = "INTEGER" if rows <= _MAX_ITEMS else "BIGINT"
        # Only narrow integers are sorted: ids, however long, stay behind in the tables of codes.
        query = (
            f"SELECT CAST(u.rowid AS {place}) AS user, e.micros AS time, CAST(e.ordinal AS {place}) AS ordinal, "
            "CAST(v.rowid AS INTEGER) AS item, coalesce(a.code, CAST(0 AS UTINYINT)) AS action "
            f"FROM ({meaning.valid}) e JOIN users u ON e.user = u.id JOIN vocabulary v ON e.item = v.id "
            "LEFT JOIN actions a ON e.action = a.value ORDER BY 1, 2, 3"
        )
        with contextlib.closing(Sweep(self.spill, item_count)) as sweep:
            for batch in self.engine.batches(query, stage="sort"):
                sweep.feed(Rows.of(batch))
                self.engine.report("write", 0.8 * sweep.events / rows)
            sweep.finish()
        self.repairs |= {"duplicates": sweep.duplicates, "out_of_order": sweep.out_of_order}
        return sweep

    def _ids(self, meaning: Meaning, catalogue: Catalogue | None) -> tuple[pa.Array, pa.Array, dict[str, pa.Array]]:
        """User ids, item ids and item attributes, in the order of their codes."""
        every = "SELECT id FROM {} ORDER BY rowid"
        user_ids = self.spill.ids("user", self.engine.batches(every.format("users")))
        item_ids = self.spill.ids("item_id", self.engine.batches(every.format("vocabulary")))
        if catalogue is None:
            return user_ids, item_ids, {}
        item = catalogue.ids.read_as(meaning.item_type)
        attributes, repairs = read_attributes(self.engine, catalogue, item)
        if self.known is not None:
            named = f"v.id IN (SELECT {item} FROM catalogue WHERE {item} IS NOT NULL)"
            listed = self.engine.table(f"SELECT {named} AS listed FROM vocabulary v ORDER BY v.rowid")
            attributes["listed"] = listed.column("listed").combine_chunks()
        self.repairs |= repairs
        return user_ids, item_ids, attributes

    def _points(self, path: Path, schema: SeriesSchema, meaning: Meaning) -> Points:
        """Read a log of auxiliary series; each that is declared must be in it or a column of the event log."""
        points = stage_points(self.engine, path, schema, self.features, meaning.users)
        for name in self.features.auxiliary:
            if name not in points.names and name not in meaning.series:
                raise DataError(f"{path}: has no usable row of series {name!r}, which is no column of the log either")
        self.repairs["series_rows_passed_over"] = points.passed_over
        return points

    def _side(
        self, meaning: Meaning, people: People | None, points: Points | None, users: int
    ) -> tuple[TokenKind, ...]:
        """Write what is read beside the main series, if anything is; return its kinds."""
        series = series_points(meaning.valid, meaning.series, points, self.features)
        kinds = read_kinds(self.engine, series, people, meaning.users, self.features)
        if kinds:
            spill_auxiliary(self.engine, series, kinds, users, self.spill)
            write_side(self.engine, kinds, self.spill, self.folder)
        return kinds

    def _write(self, user_ids: pa.Array, item_ids: pa.Array, attributes: dict[str, pa.Array]) -> None:
        """Turn the raw column files into the folder's Arrow files."""
        ends = self.spill.column("end", pa.int64())
        assert len(ends) == len(user_ids), "every user has at least one event"
        self.spill.write(self.folder / "users.arrow", {"id": user_ids, "end": ends})
        self.spill.write(self.folder / "vocabulary.arrow", {"id": item_ids, **attributes})
        events = {"item": pa.int32(), "action": pa.uint8(), "timestamp": pa.int64()}
        columns = {name: self.spill.column(name, type_) for name, type_ in events.items()}
        self.spill.write(self.folder / "events.arrow", columns)


def _files_of(read: Source | Catalogue | People | Points) -> tuple[Path, ...]:
    return read.files if isinstance(read, Source) else read.source.files
