"""Item metadata: an item file staged, and its columns turned into attributes of the vocabulary."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from retrieval.data.duck import Engine, identifier
from retrieval.data.events import Part, Source, open_source
from retrieval.data.schemas import IdType, ItemSchema
from retrieval.data.staging import IdColumn, read_ids, staged_id
from retrieval.data.vocabulary import RESERVED

__all__ = ["Catalogue", "read_attributes", "stage_catalogue"]

_LIST_TYPE = re.compile(r"(VARCHAR|BOOLEAN|U?(TINY|SMALL|BIG)INT|U?INTEGER|FLOAT|DOUBLE)\[\]")
# Arrow's string arrays address 2 GiB; larger columns need 64-bit offsets.
_STRING_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Item metadata in table `catalogue`, one row per row of the file.

    Attributes:
        source: the item file.
        column: the column of ids with its file, for messages.
        ids: its item ids.
        attributes: name of each attribute and the table's column that holds it.
    """

    source: Source
    column: str
    ids: IdColumn
    attributes: dict[str, str]


def stage_catalogue(engine: Engine, path: Path, schema: ItemSchema, wanted: IdType) -> Catalogue:
    """Read an item file into table `catalogue`.

    Args:
        engine: where the table goes.
        path: file or folder, found and read like a log.
        schema: its columns.
        wanted: the type that item ids are to have.

    Raises:
        DataError: the file cannot be read, lacks a column, or has ids of another type.
    """
    source = open_source(engine, path, schema, wanted=(schema.item,), every=True)
    kind = source.kind(schema.item, "item ids")
    if schema.title is not None:
        source.kind(schema.title, "titles")
    title = schema.title or "title"
    expressions = staged_id("item", schema.item, kind)
    attributes: dict[str, str] = {}
    # The title's column comes first, so that it has the say over its name.
    names = sorted((name for name in source.columns if name != schema.item), key=lambda name: name != title)
    for place, name in enumerate(names):
        shown = "title" if name == title else name
        while shown in RESERVED or shown in attributes:
            shown += "_"
        attributes[shown] = f"a{place}"
        expressions[f"a{place}"] = _attribute(name)
    engine.rows(f"CREATE TABLE catalogue AS {source.select(expressions)}", stage="items")
    if source.format == "text":
        for shown, column in attributes.items():
            if shown != "title":
                _give_type(engine, column)
    ids = read_ids(engine, "catalogue", "item", source, schema.item, kind, wanted)
    return Catalogue(source=source, column=f"{path}: column {schema.item!r}", ids=ids, attributes=attributes)


def _attribute(name: str) -> Callable[[Part], str]:
    def make(part: Part) -> str:
        if name not in part.kinds:
            return "NULL"
        column, kind, type_ = part.column(name), part.kinds[name], part.types[name]
        if kind in ("integer", "float", "boolean", "time") or _LIST_TYPE.fullmatch(type_):
            return column
        if kind in ("text", "csv") or type_ == "JSON":
            return f"nullif(CAST({column} AS VARCHAR), '')"
        return column if kind == "json" else f"CAST(to_json({column}) AS VARCHAR)"

    return make


def _give_type(engine: Engine, column: str) -> None:
    """Make a text column integers or floats where every value of it is written as such."""
    integer = f"CAST(TRY_CAST({column} AS BIGINT) AS VARCHAR) IS DISTINCT FROM {column}"
    number = rf"NOT regexp_full_match({column}, '-?(0|[1-9]\d*)(\.\d+)?')"
    present, no_integers, no_numbers = engine.row(
        f"SELECT count({column}), count(*) FILTER ({column} IS NOT NULL AND {integer}), "
        f"count(*) FILTER ({column} IS NOT NULL AND {number}) FROM catalogue"
    )
    if present and not (no_integers and no_numbers):
        type_ = "DOUBLE" if no_integers else "BIGINT"
        engine.rows(f"ALTER TABLE catalogue ALTER {column} TYPE {type_}")


def read_attributes(engine: Engine, catalogue: Catalogue, item: str) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """Attributes aligned with table `vocabulary`, null where an item has none, and what was mended.

    Args:
        engine: holds tables `vocabulary` (column `id`, rows in order) and `catalogue`.
        catalogue: names the attributes.
        item: SQL of the catalogue's item ids.
    """
    columns = ", ".join(catalogue.attributes.values())
    rows, named, distinct = engine.row(f"SELECT count(*), count({item}), count(DISTINCT {item}) FROM catalogue")
    repairs = {"items_without_id": rows - named, "duplicate_items": named - distinct}
    if not columns:
        return {}, repairs
    first = f"QUALIFY row_number() OVER (PARTITION BY {item} ORDER BY rowid) = 1"
    described = f"SELECT {item} AS id, {columns} FROM catalogue WHERE {item} IS NOT NULL {first}"
    shown = ", ".join(f"d.{column} AS {identifier(name)}" for name, column in catalogue.attributes.items())
    table = engine.table(f"SELECT {shown} FROM vocabulary v LEFT JOIN ({described}) d ON v.id = d.id ORDER BY v.rowid")
    return {name: _whole(table.column(name)) for name in table.column_names}, repairs


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_string(column.type) and column.nbytes > _STRING_BYTES:
        column = column.cast(pa.large_string())
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
