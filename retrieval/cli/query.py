"""`retrieval query`: ask a running server for candidates."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.table import Table

from retrieval.cli.console import OUT, say
from retrieval.cli.options import add_connection_options, add_json_option, connected
from retrieval.errors import InputError, UnknownUserError

if TYPE_CHECKING:
    from retrieval.rpc.client import History, Retrieved, StoredUser

__all__ = ["add_parser", "candidate_table"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "query",
        help="ask a running server for candidates",
        description="Ask a running server for the best items of a stored user or of a history.",
    )
    parser.add_argument("--user", metavar="ID", help="a user of the server's stored histories")
    parser.add_argument(
        "--history",
        metavar="FILE",
        help='events, oldest first, as JSON lines: {"item": ID, "timestamp": SECONDS, "action": NAME}, or of auxiliary '
        'series {"series": NAME, "timestamp": SECONDS, "value": VALUE}; - for stdin; with --user they are added to the '
        "stored ones for this call",
    )
    parser.add_argument(
        "--context", action="append", default=[], metavar="NAME=VALUE", help="static attribute of the user"
    )
    parser.add_argument("--action", default="", help="items that are likely to be met with this action (default: any)")
    parser.add_argument("-k", type=int, default=20, help="how many items (default: 20)")
    parser.add_argument("--request-time", type=int, metavar="SECONDS", help="moment of the request, UTC (default: now)")
    parser.add_argument("--exclude", default="", metavar="IDS", help="items to leave out, by comma")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out every item of the history")
    parser.add_argument("--filter", metavar="TEXT", help='condition on attributes: "year >= 1990 and kids = true"')
    parser.add_argument("--exact", action="store_true", help="score every eligible item instead of asking the index")
    parser.add_argument("--debug", action="store_true", help="also tell how the answer came about")
    add_connection_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Ask and print."""
    from retrieval.rpc.client import History

    context = _context(parsed.context)
    if parsed.user is None and parsed.history is None and not context:
        raise InputError("query: for whom? Give --user, --history or both")
    with connected(parsed) as client:
        excluded = [text for text in parsed.exclude.split(",") if text]
        exclude = excluded if client.serving_state().string_ids else [_integer("--exclude", text) for text in excluded]

        def ask(user: "History | StoredUser") -> "Retrieved":
            return client.retrieve(
                user,
                k=parsed.k,
                request_time=parsed.request_time,
                exclude=exclude,
                exclude_seen=parsed.exclude_seen,
                include_titles=True,
                filter=parsed.filter,
                action=parsed.action,
                exact=parsed.exact,
                debug=parsed.debug,
            )

        history = _read_history(parsed.history) if parsed.history is not None else History([], []) if context else None
        if history is not None:
            history = replace(history, context=context)
        if parsed.user is not None:
            answer = _ask_for_user(ask, parsed.user, history)
        else:
            assert history is not None
            answer = ask(history)
    if parsed.json:
        print(json.dumps(asdict(answer) | {"source": answer.source.value, "debug": _debug(answer)}))
        return
    OUT.print(candidate_table(answer))
    say(f"snapshot {answer.snapshot_version}, source {answer.source.name.lower()}")
    if answer.shortfall:
        say(f"{answer.shortfall} fewer than asked for: no more items are eligible")
    if answer.cold_items:
        say(f"{len(answer.cold_items)} of the items had no event yet")
    if answer.unknown_items:
        say(f"{answer.unknown_items} events of the history are of items that the catalogue does not have")

    if debug := _debug(answer):
        say(", ".join(f"{name} {value}" for name, value in debug.items()))


def _debug(answer: "Retrieved") -> dict[str, str | int] | None:
    """How an answer came about, for people and as JSON; None if it does not tell."""
    if answer.debug is None:
        return None
    told = asdict(answer.debug) | {"plan": answer.debug.plan.value if answer.debug.plan is not None else "popular"}
    return {
        name.replace("_seconds", "_ms"): round(1000 * value, 3) if name.endswith("_seconds") else value
        for name, value in told.items()
    }


def candidate_table(answer: "Retrieved", title_width: int | None = None) -> Table:
    """Candidates, best first; titles are cut to `title_width` columns if that is given."""
    table = Table("rank", "item", "score")
    for column in table.columns:
        column.no_wrap = True
    if answer.titles:
        table.add_column("title", no_wrap=True, max_width=title_width)
    for place, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True)):
        table.add_row(str(place + 1), str(item), f"{score:.4f}", *answer.titles[place : place + 1])
    return table


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not an integer, but the catalogue's item ids are") from None


def _ask_for_user(
    ask: "Callable[[History | StoredUser], Retrieved]", text: str, fresh: "History | None"
) -> "Retrieved":
    """A command line cannot tell the id 7 from the id "7": try both kinds."""
    from retrieval.rpc.client import StoredUser

    integer = text.removeprefix("-").isdecimal() and str(int(text)) == text
    ids: list[int | str] = [int(text), text] if integer else [text]
    for user in ids:
        try:
            answer = ask(StoredUser(user))
        except UnknownUserError:
            continue
        return answer if fresh is None else ask(StoredUser(user, fresh))
    return ask(StoredUser(ids[-1], fresh))


def _read_history(name: str) -> "History":
    from retrieval.rpc.client import History

    try:
        if name == "-":
            return _parse_history(sys.stdin, "standard input", History)
        with Path(name).open(encoding="utf-8") as file:
            return _parse_history(file, name, History)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot be read ({error})") from None


def _context(texts: list[str]) -> dict[str, str]:
    context = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--context {text}: is not NAME=VALUE")
        context[name] = value
    return context


def _parse_history(lines: TextIO, name: str, history: "type[History]") -> "History":
    items, actions, timestamps = [], [], []
    auxiliary: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if "series" in event:
                auxiliary.setdefault(event["series"], []).append((int(event["timestamp"]), str(event["value"])))
                continue
            items.append(event["item"])
            timestamps.append(int(event["timestamp"]))
            actions.append(str(event.get("action", "")))
        except (ValueError, KeyError, TypeError, AttributeError):
            message = f"{name}: line {number} is not a JSON object with item, or series and value, and timestamp"
            raise InputError(message) from None
    actions = actions if any(actions) else []
    return history(items=items, timestamps=timestamps, actions=actions, auxiliary=auxiliary)
