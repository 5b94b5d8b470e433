"""`retrieval ingest`: an event log becomes a dataset."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from retrieval.cli.console import OUT, progress
from retrieval.cli.options import add_features_option, add_json_option, existing_path

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.data.dataset import Dataset

__all__ = ["add_event_options", "add_parser", "ingest_with_progress"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ingest",
        help="turn event logs into a dataset",
        description="Read Parquet, CSV or JSON lines (a file or a folder of them) out of core and write a dataset: "
        "vocabulary, users, events by user and time. Those of equal time keep the log's order or take that of --order.",
    )
    parser.add_argument("events", type=Path, metavar="EVENTS", help="file, or folder of files of one format")
    parser.add_argument("--out", type=Path, required=True, metavar="DATASET", help="folder to write")
    parser.add_argument("--replace", action="store_true", help="replace an existing dataset")
    parser.add_argument("--memory", default="2GB", help="memory that reading and sorting may use (default: 2GB)")
    add_event_options(parser)
    add_features_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def add_event_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how events, the metadata of items and users, and auxiliary series are written."""
    # Defaults live in EventSchema and ItemSchema alone: an option that is not given is not passed on.
    columns = parser.add_argument_group("columns of the event log")
    columns.add_argument("--user", metavar="COLUMN", help="user ids (default: user_id)")
    columns.add_argument("--item", metavar="COLUMN", help="item ids (default: item_id)")
    columns.add_argument("--time", metavar="COLUMN", help="times (default: timestamp)")
    columns.add_argument("--action", metavar="COLUMN", help="actions or ratings (default: `action` where there is one)")
    columns.add_argument(
        "--positive", metavar="VALUES", help="positive actions: like,purchase or, of numbers, '>=4' (default: all)"
    )
    columns.add_argument(
        "--order", metavar="COLUMN", help="numbers that order events of equal time (default: their place in the log)"
    )
    columns.add_argument("--time-unit", choices=("auto", "s", "ms", "us", "iso"), help="unit of times (default: auto)")
    columns.add_argument("--columns", metavar="NAMES", help="names, by comma, for text files without a header line")
    columns.add_argument("--delimiter", help="of text files (default: found in the first line)")
    columns.add_argument("--encoding", choices=("utf-8", "latin-1"), help="of text files (default: utf-8)")
    items = parser.add_argument_group("item metadata")
    items.add_argument("--items", type=Path, metavar="FILE", help="titles and other attributes of items")
    items.add_argument("--items-id", metavar="COLUMN", help="item ids there (default: item_id)")
    items.add_argument("--items-title", metavar="COLUMN", help="titles there (default: `title` where there is one)")
    _add_dialect(items, "items", "the metadata")
    users = parser.add_argument_group("context of users, as --features names it")
    users.add_argument("--users", type=existing_path, metavar="FILE", help="static attributes of users")
    users.add_argument("--users-id", metavar="COLUMN", help="user ids there (default: user_id)")
    _add_dialect(users, "users", "the users' file")
    series = parser.add_argument_group(
        "auxiliary series, as --features names them, that are no columns of the event log"
    )
    series.add_argument("--series", type=existing_path, metavar="FILE", help="a log of them, of a row per value")
    series.add_argument("--series-user", metavar="COLUMN", help="user ids there (default: user_id)")
    series.add_argument("--series-name", metavar="COLUMN", help="names of series (default: series)")
    series.add_argument("--series-value", metavar="COLUMN", help="values (default: value)")
    series.add_argument("--series-time", metavar="COLUMN", help="times from which on they hold (default: timestamp)")
    _add_dialect(series, "series", "that log")


def _add_dialect(group: "argparse._ActionsContainer", file: str, what: str) -> None:
    """Add how a file beside the event log is written."""
    group.add_argument(f"--{file}-columns", metavar="NAMES", help=f"as --columns, for {what}")
    group.add_argument(f"--{file}-delimiter", help=f"as --delimiter, for {what}")
    group.add_argument(f"--{file}-encoding", choices=("utf-8", "latin-1"), help=f"as --encoding, for {what}")


def _schema(parsed: argparse.Namespace, file: str, **columns: str) -> dict[str, Any]:
    """What was given of a file's schema; `columns` are its fields by the options that name them."""
    named = columns | {"columns": "columns", "delimiter": "delimiter", "encoding": "encoding"}
    given = {field: getattr(parsed, f"{file}_{option}") for field, option in named.items()}
    if given["columns"] is not None:
        given["columns"] = tuple(given["columns"].split(","))
    return {field: value for field, value in given.items() if value is not None}


def run(parsed: argparse.Namespace) -> None:
    """Ingest."""
    dataset = ingest_with_progress(parsed, parsed.events, parsed.out, memory=parsed.memory, replace=parsed.replace)
    if parsed.json:
        print(dataset.info.model_dump_json())
    else:
        OUT.print(_summary(dataset))


def ingest_with_progress(
    parsed: argparse.Namespace,
    events: Path,
    out: Path,
    *,
    items: Path | None = None,
    known: "pa.Array | None" = None,
    memory: str = "2GB",
    replace: bool = False,
    **schema: Any,
) -> "Dataset":
    """Ingest by the options of `add_event_options`; `items` and `schema` are what holds where they say nothing.

    `known` is as for `ingest`.
    """
    from retrieval.data.features import FeatureSchema
    from retrieval.data.ingest import EventSchema, ItemSchema, SeriesSchema, UserSchema, ingest

    names = ("user", "item", "time", "action", "order", "time_unit", "delimiter", "encoding")
    schema |= {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    if parsed.positive is not None:
        schema["positive"] = tuple(parsed.positive.split(","))
    if parsed.columns is not None:
        schema["columns"] = tuple(parsed.columns.split(","))
    metadata = _schema(parsed, "items", item="id", title="title")
    people = _schema(parsed, "users", user="id")
    points = _schema(parsed, "series", user="user", series="name", value="value", time="time")
    with progress("ingest") as update:
        return ingest(
            events,
            out,
            schema=EventSchema.parse(schema, "command line"),
            items=parsed.items or items,
            item_schema=ItemSchema.parse(metadata, "command line"),
            users=parsed.users,
            user_schema=UserSchema.parse(people, "command line"),
            series=parsed.series,
            series_schema=SeriesSchema.parse(points, "command line"),
            features=FeatureSchema.load(parsed.features) if parsed.features is not None else None,
            known=known,
            memory=memory,
            replace=replace,
            # Each stage counts to 1; only the last one ends the bar.
            progress=lambda stage, share: update(
                100 * min(share, 1.0 if stage == "write" else 0.99), 100, f"% {stage}"
            ),
        )


def _summary(dataset: "Dataset") -> Table:
    info = dataset.info
    table = Table(title=str(dataset.path), title_justify="left", show_header=False)
    rows: dict[str, Any] = {"events": info.events, "users": info.users, "items": info.items}
    positive = ", ".join(action.value or "(none)" for action in info.actions if action.positive)
    rows |= {"positive actions": positive}
    rows |= {f"repaired: {name.replace('_', ' ')}": count for name, count in info.repairs.items() if count}
    rows |= {"equal times by": info.tie_order}
    rows |= {name.replace("_", " "): value for name, value in info.statistics.items()}
    for name, value in rows.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key or '(none)'} {_figure(part)}" for key, part in value.items())
        else:
            text = _figure(value)
        table.add_row(name, text)
    return table


def _figure(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
