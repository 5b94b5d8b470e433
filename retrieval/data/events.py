"""Event logs and item metadata as users have them: files, and DuckDB relations over them.

Files become a `Source`: parts (consecutive files with the same columns) in the log's order, which is the files'
order by name and then each file's own row order. `Source.select` gives SQL that keeps this order.
"""

import codecs
import csv
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from retrieval.data.duck import Engine, identifier, literal
from retrieval.data.schemas import Dialect
from retrieval.errors import DataError

__all__ = ["Kind", "Part", "Source", "open_source"]

Format = Literal["parquet", "text", "json"]
# What a column holds: `csv` is text whose type is yet to be found, `json` a value that carries its own type.
Kind = Literal["integer", "float", "boolean", "time", "text", "csv", "json", "null", "other"]

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet", ".pq": "parquet",
    ".csv": "text", ".tsv": "text", ".dat": "text", ".txt": "text",
    ".jsonl": "json", ".ndjson": "json", ".json": "json",
}  # fmt: skip
_DELIMITERS = ("::", "\t", ",", ";", "|")
_INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")} | {
    "INTEGER",
    "UINTEGER",
}
_TIMES = {"DATE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS", "TIMESTAMP WITH TIME ZONE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive files with the same columns.

    Attributes:
        files: the files in order.
        kinds: what each column holds, by name, in the files' order.
        types: DuckDB's type of each column, by name.
        relation: gives SQL of a table function over some of `files`.
        sql_names: what that table function calls each column, by name.
    """

    files: tuple[Path, ...]
    kinds: Mapping[str, Kind]
    types: Mapping[str, str]
    relation: Callable[[Iterable[Path]], str]
    sql_names: Mapping[str, str]

    def column(self, name: str) -> str:
        """SQL of a column."""
        return identifier(self.sql_names[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A log or an item file, opened: what is in it and how to read it in order.

    Attributes:
        path: the file or folder that the user named.
        parts: its files, in the log's order.
        empty_files: files without a byte, which were passed over.
    """

    path: Path
    format: Format
    parts: tuple[Part, ...]
    empty_files: int

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read, in order."""
        return tuple(file for part in self.parts for file in part.files)

    @property
    def columns(self) -> list[str]:
        """Names of all columns, as first met."""
        return list(dict.fromkeys(name for part in self.parts for name in part.kinds))

    def kind(self, name: str, role: str) -> Kind:
        """What a column holds in all files.

        Args:
            name: the column.
            role: what it is wanted for, for the message.

        Raises:
            DataError: a file lacks the column, or files disagree on its type.
        """
        first: dict[Kind, Path] = {}
        for part in self.parts:
            if name not in part.kinds:
                near = difflib.get_close_matches(name, part.kinds, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                known = ", ".join(part.kinds)
                raise DataError(f"{part.files[0]}: has no column {name!r} for {role}; it has {known}{hint}")
            first.setdefault(part.kinds[name], part.files[0])
        if len(first) > 1:
            first.pop("null", None)
        if len(first) > 1:
            (one, file), (other, where) = list(first.items())[:2]
            raise DataError(f"{self.path}: column {name!r} holds {one} values in {file} but {other} values in {where}")
        return next(iter(first))

    def select(self, expressions: Mapping[str, Callable[[Part], str]]) -> str:
        """SQL that reads all files in order; `expressions` gives each output column's SQL in a part."""
        return " UNION ALL ".join(
            "SELECT "
            + ", ".join(f"{make(part)} AS {identifier(name)}" for name, make in expressions.items())
            + f" FROM {part.relation(part.files)}"
            for part in self.parts
        )

    def locate(self, engine: Engine, ordinal: int) -> str:
        """File and row, counted from 1 without a header, of the `ordinal`-th row of the log (from 0)."""
        for part in self.parts:
            for file in part.files:
                (rows,) = engine.row(f"SELECT count(*) FROM {part.relation([file])}")
                if ordinal < rows:
                    return f"{file}, row {ordinal + 1}"
                ordinal -= rows
        raise AssertionError("a row beyond the log's end")


def open_source(
    engine: Engine,
    path: Path,
    dialect: Dialect,
    *,
    wanted: Sequence[str],
    optional: Sequence[str] = (),
    every: bool = False,
) -> Source:
    """Find a log's files and their columns.

    Args:
        engine: reads the files' schemas.
        path: a file, or a folder whose files of one format are read recursively in order of their names; names
            that start with a dot or an underscore are passed over.
        dialect: how delimited text is written.
        wanted: columns that must be there. JSON is sampled for its keys, and read in full where one is missing.
        optional: columns that are read where they are.
        every: whether all columns will be read; JSON values beside `wanted` then get the types that fit all of
            a column, instead of carrying their own.

    Raises:
        DataError: nothing to read, formats mixed, or a file that is damaged or not in its encoding.
    """
    found, format_ = _find_files(path)
    files = [file for file in found if file.stat().st_size]
    if not files:
        raise DataError(f"{path}: is empty" if path.is_file() else f"{path}: all {len(found)} files are empty")
    if format_ != "text" and (dialect.columns or dialect.delimiter):
        raise DataError(f"{path}: delimiter and columns are for delimited text, not for {format_} files")
    if format_ == "json":
        parts = [_json_part(engine, tuple(files), every, wanted)]
    else:
        one = _text_part if format_ == "text" else _parquet_part
        used = None if every else (*wanted, *optional)
        parts = _merged((one(engine, file, dialect) for file in files), used)
    return Source(path=path, format=format_, parts=tuple(parts), empty_files=len(found) - len(files))


def _format_of(path: Path) -> Format | None:
    name = path.name.lower()
    compressed = name.endswith(".gz")
    format_ = _FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    return None if compressed and format_ == "parquet" else format_


def _find_files(path: Path) -> tuple[list[Path], Format]:
    endings = ", ".join(_FORMATS)
    if path.is_file():
        format_ = _format_of(path)
        if format_ is None:
            raise DataError(f"{path}: its name ends in none of {endings} (text also with .gz)")
        return [path], format_
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder")
    inside = sorted(
        relative
        for relative in (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        if not any(name.startswith((".", "_")) for name in relative.parts)
    )
    formats: dict[Format, Path] = {}
    for file in inside:
        if (known := _format_of(file)) is not None:
            formats.setdefault(known, file)
    if not formats:
        seen = ", ".join(str(file) for file in inside[:5]) or "no files"
        raise DataError(f"{path}: no file in the folder ends in {endings}; found {seen}")
    if len(formats) > 1:
        seen = ", ".join(f"{name} ({file})" for name, file in formats.items())
        raise DataError(f"{path}: the folder mixes formats: {seen}; name one file, or a folder of one format")
    (format_,) = formats
    return [path / file for file in inside if _format_of(file) == format_], format_


def _merged(parts: Iterable[Part], used: Sequence[str] | None) -> list[Part]:
    """Join neighbours that read alike as far as `used` columns go (None: all)."""
    # One table function over many files reads them in parallel; a long UNION of single files is slow to plan.
    merged: list[Part] = []
    last: object = None
    for part in parts:
        names = tuple(part.types) if used is None else used
        signature = part.relation([]), [(name, part.types.get(name), part.sql_names.get(name)) for name in names]
        if signature == last:
            merged[-1] = replace(merged[-1], files=merged[-1].files + part.files)
        else:
            merged.append(part)
        last = signature
    return merged


def _listed(files: Iterable[Path]) -> str:
    return "[" + ", ".join(literal(_unglobbed(str(file))) for file in files) + "]"


def _unglobbed(path: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", path)


def _kind_of(type_: str) -> Kind:
    if type_ in _INTEGERS:
        return "integer"
    if type_ in ("FLOAT", "DOUBLE") or type_.startswith("DECIMAL"):
        return "float"
    if type_ in _TIMES:
        return "time"
    if type_ in ("VARCHAR", "UUID", "JSON") or type_.startswith("ENUM"):
        return "text"
    return {"BOOLEAN": "boolean", '"NULL"': "null"}.get(type_, "other")  # type: ignore[return-value]


def _parquet_part(engine: Engine, file: Path, _: Dialect) -> Part:
    def relation(files: Iterable[Path]) -> str:
        return f"read_parquet({_listed(files)}, hive_partitioning=false, binary_as_string=true)"

    try:
        described = engine.rows(f"DESCRIBE SELECT * FROM {relation([file])}")
    except DataError as error:
        raise DataError(f"{file}: is not a readable Parquet file ({error})") from None
    types = {name: str(type_) for name, type_, *_ in described}
    kinds = {name: _kind_of(type_) for name, type_ in types.items()}
    return Part(files=(file,), kinds=kinds, types=types, relation=relation, sql_names={name: name for name in types})


def _text_part(engine: Engine, file: Path, dialect: Dialect) -> Part:
    first = _first_line(file, dialect.encoding)
    delimiter = dialect.delimiter or max(_DELIMITERS, key=lambda mark: (first.count(mark), mark == ","))
    if dialect.columns is None and not first.strip():
        raise DataError(f"{file}: line 1 is blank; it should name the columns")
    quote = dialect.quote if dialect.quote is not None else '"' * (len(delimiter) == 1)
    names = dialect.columns or _split(first, delimiter, quote)
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(f"{file}: its header names column {min(repeated)!r} more than once")
    # Columns go by position: a header may hold names that differ in case only, or none.
    columns = ", ".join(f"'c{place}': 'VARCHAR'" for place in range(len(names)))
    options = (
        f"auto_detect=false, hive_partitioning=false, header={str(dialect.columns is None).lower()}, "
        f"delim={literal(delimiter)}, quote={literal(quote)}, escape={literal(quote)}, "
        f"encoding={literal(dialect.encoding)}, columns={{{columns}}}"
    )
    return Part(
        files=(file,),
        kinds=dict.fromkeys(names, "csv"),
        types=dict.fromkeys(names, "VARCHAR"),
        relation=lambda files: f"read_csv({_listed(files)}, {options})",
        sql_names={name: f"c{place}" for place, name in enumerate(names)},
    )


def _first_bytes(file: Path) -> bytes:
    """The first line, or as much of it as may be a header."""
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as opened:
            return opened.readline(1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: is not a whole gzip file ({error})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _first_line(file: Path, encoding: str) -> str:
    line = _first_bytes(file)
    try:
        return line.decode("utf-8-sig" if encoding == "utf-8" else encoding).rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{file}: line 1 is not UTF-8; if the file is Latin-1, give encoding latin-1") from None


def _split(line: str, delimiter: str, quote: str) -> tuple[str, ...]:
    if len(delimiter) > 1 or not quote:
        return tuple(line.split(delimiter))
    return tuple(next(csv.reader(io.StringIO(line), delimiter=delimiter, quotechar=quote), []))


def _json_part(engine: Engine, files: tuple[Path, ...], every: bool, wanted: Sequence[str]) -> Part:
    for file in files:
        # DuckDB notices one only when it reads with several threads.
        if _first_bytes(file).startswith(codecs.BOM_UTF8):
            raise DataError(f"{file}: starts with a byte order mark; save it as UTF-8 without one")
    lines = all(".json" not in file.suffixes for file in files)
    options = f"format='{'newline_delimited' if lines else 'auto'}', hive_partitioning=false"
    many = f"union_by_name=true, maximum_sample_files={len(files)}"
    types: dict[str, str] = {}
    for sample in ("sample_size=-1",) if every else ("sample_size=20480", "sample_size=-1"):
        described = engine.rows(f"DESCRIBE SELECT * FROM read_json({_listed(files)}, {sample}, {many}, {options})")
        types = {name: _json_type(str(type_)) if every else "JSON" for name, type_, *_ in described}
        if set(wanted) <= set(types):
            break
    if list(types) == ["json"] and "json" not in wanted:  # DuckDB's name for values that are no objects
        raise DataError(f"{files[0]}: holds no JSON objects with keys, one per line")
    types |= {name: "JSON" for name in wanted if name in types}
    # Spelling the types out keeps DuckDB from turning text into dates or numbers, and rows may lack any key.
    columns = ", ".join(f"{literal(name)}: {literal(type_)}" for name, type_ in types.items())
    return Part(
        files=files,
        kinds=dict.fromkeys(types, "json"),
        types=types,
        relation=lambda some: f"read_json({_listed(some)}, {options}, columns={{{columns}}})",
        sql_names={name: name for name in types},
    )


def _json_type(type_: str) -> str:
    if _kind_of(type_) in ("integer", "float", "boolean") or re.fullmatch(r"(VARCHAR|BIGINT|DOUBLE)\[\]", type_):
        return type_
    return "VARCHAR" if _kind_of(type_) in ("text", "time") and type_ != "JSON" else "JSON"
