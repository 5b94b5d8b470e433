"""`retrieval schedule`: the nightly rebuild, night after night."""

import argparse
import signal
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import FrameType

from retrieval.cli.console import say
from retrieval.errors import InputError

__all__ = ["add_parser"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "schedule",
        help="run rebuilds at the times of a crontab line",
        description="Run `retrieval rebuild` with the options after -- at the times of a crontab line, each in a "
        "process of its own and never two at once. A night that fails or is refused is reported and the next one comes "
        "all the same. Ends on SIGTERM or SIGINT; a night in hand is stopped and goes on at its next time.",
        usage="%(prog)s --cron CRON --state FILE [options] -- EVENTS --registry REGISTRY --work DIR [rebuild options]",
    )
    parser.add_argument("--cron", required=True, help='minute, hour, day, month, day of the week: "0 3 * * *"')
    parser.add_argument("--timezone", default="UTC", metavar="NAME", help="of --cron, e.g. Europe/Paris (default: UTC)")
    parser.add_argument("--state", type=Path, required=True, metavar="FILE", help="remembers the last start")
    parser.add_argument(
        "--missed",
        choices=("run", "skip"),
        default="run",
        help="times missed while a night lasted or this did not run: one run at once, or none (default: run)",
    )
    parser.add_argument("rebuild", nargs=argparse.REMAINDER, metavar="-- EVENTS …", help="options of `rebuild`")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Wait and run."""
    from retrieval.cli.main import build_parser
    from retrieval.jobs.schedule import crontab, run_on_schedule

    options = parsed.rebuild[1:] if parsed.rebuild[:1] == ["--"] else parsed.rebuild
    if not options:
        raise InputError("schedule: what to rebuild? Give `rebuild`'s options after --")
    trigger = crontab(parsed.cron, parsed.timezone)
    # A mistake in them is told now, not at night.
    build_parser().parse_args(["rebuild", *options])
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    run_on_schedule(
        [sys.executable, "-m", "retrieval.cli.main", "rebuild", *options],
        trigger,
        parsed.state,
        missed=parsed.missed,
        stop=stop,
        report=lambda line: say(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}"),
    )
