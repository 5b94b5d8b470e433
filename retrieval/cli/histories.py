"""`retrieval histories`: fill a store of users' events from a dataset, look at one user, record events."""

import argparse
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from retrieval.cli.console import OUT, progress, say
from retrieval.cli.options import add_connection_options, add_json_option, connected, opened_histories
from retrieval.errors import InputError, UnknownUserError

if TYPE_CHECKING:
    from retrieval.histories.event import Event

__all__ = ["add_parser"]

# Events of one call.
_TOGETHER = 500
_STORE = "a folder, or redis://HOST:PORT/DATABASE"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its own sub-commands."""
    parser = commands.add_parser("histories", help="fill, look at or add to users' stored events", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "add a dataset's events to a store, which is made if it is missing"
    action = actions.add_parser("fill", help=text, description=f"{text[0].upper()}{text[1:]}. May be repeated.")
    action.add_argument("dataset", type=Path, metavar="DATASET", help="folder of `retrieval ingest`")
    action.add_argument("store", metavar="STORE", help=_STORE)
    action.add_argument("--max-events", type=int, metavar="N", help="per user, in a new store (default: 1000)")
    action.set_defaults(run=_fill)
    text = "a user's events"
    action = actions.add_parser("show", help=text, description=f"{text[0].upper()}{text[1:]}.")
    action.add_argument("store", metavar="STORE", help=_STORE)
    action.add_argument("user", metavar="ID", help="the user")
    add_json_option(action)
    action.set_defaults(run=_show)
    text = "send events to a running server"
    action = actions.add_parser("record", help=text, description=f"{text[0].upper()}{text[1:]}. May be repeated.")
    action.add_argument(
        "events",
        type=Path,
        metavar="FILE",
        help='JSON lines: {"user": ID, "item": ID, "timestamp": SECONDS}, maybe "action": NAME, "event_id": TEXT, '
        '"context" and "auxiliary": {NAME: VALUE}, with which "item" may be missing',
    )
    add_connection_options(action)
    action.set_defaults(run=_record)


def _fill(parsed: argparse.Namespace) -> None:
    from retrieval.data.dataset import Dataset
    from retrieval.histories.fill import fill_histories

    dataset = Dataset(parsed.dataset)
    with opened_histories(parsed.store, parsed.max_events) as store, progress("fill") as update:
        assert store is not None
        fill_histories(dataset, store, lambda done, users: update(done, users, "users"))


def _show(parsed: argparse.Namespace) -> None:
    with opened_histories(parsed.store) as store:
        assert store is not None
        # A command line cannot tell the id 7 from the id "7": the integer comes first, as in `retrieval query`.
        integer = parsed.user.removeprefix("-").isdecimal() and str(int(parsed.user)) == parsed.user
        history = store.read(int(parsed.user)) if integer else None
        history = history if history is not None else store.read(parsed.user)
    if history is None:
        raise UnknownUserError(f"{parsed.store}: has no history of user {parsed.user!r}")
    rows = list(zip(history.timestamps.tolist(), list(history.items), history.actions, strict=True))
    series = {name: list(zip(*one.lists(), strict=True)) for name, one in history.auxiliary.items()}
    if parsed.json:
        events = [{"item": _plain(item), "timestamp": time, "action": action} for time, item, action in rows]
        beside = {"context": dict(history.context), "auxiliary": series}
        print(json.dumps({"user": parsed.user, "events": events, **beside}))
        return
    table = Table("time (UTC)", "item", "action")
    for time, item, action in rows:
        table.add_row(_shown(time), str(item), action)
    OUT.print(table)
    for name, value in history.context.items():
        OUT.print(f"{name}: {value}")
    for name, points in series.items():
        OUT.print(f"{name}: " + ", ".join(f"{value or '(other)'} from {_shown(time)}" for time, value in points))


def _shown(time: int) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


def _plain(item: object) -> int | str:
    return item if isinstance(item, str) else int(item)  # type: ignore[call-overload]


def _record(parsed: argparse.Namespace) -> None:

    events, recorded, unknown = _read(parsed.events), 0, 0
    with connected(parsed) as client:
        while part := list(itertools.islice(events, _TOGETHER)):
            unknown += client.record_events(part).unknown_items
            recorded += len(part)
    OUT.print(f"{recorded:,} events are recorded")
    if unknown:
        say(f"{unknown:,} of them are of items that the catalogue does not have")


def _texts(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _read(path: Path) -> "Iterator[Event]":
    from retrieval.histories.event import Event

    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    yield Event(
                        user_id=values["user"],
                        item_id=values.get("item"),
                        timestamp=int(values["timestamp"]),
                        action=str(values.get("action", "")),
                        event_id=str(values.get("event_id", "")),
                        context=_texts(values.get("context", {})),
                        auxiliary=_texts(values.get("auxiliary", {})),
                    )
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(
                        f"{path}: line {number} is not a JSON object with user and timestamp, and item, context or "
                        "auxiliary"
                    ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
