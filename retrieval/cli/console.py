"""What commands print: progress on standard error, results on standard output."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["OUT", "Update", "lines", "progress", "say"]

# A pipe has no width of its own; tables should not be cut to a guess.
_PIPE_WIDTH = 140
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
_ERR = Console(stderr=True, highlight=False)
_PLAIN_SECONDS = 5.0

Update = Callable[[float, float, str], None]
"""Reports progress: amount done, amount in all, and a note such as the loss."""


def say(text: str) -> None:
    """Print a line for a person on standard error."""
    _ERR.print(text, markup=False)


@contextmanager
def progress(name: str) -> Iterator[Update]:
    """Show a bar on a terminal; elsewhere a plain line every few seconds and at the end."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_ERR) as bar:

            def show(done: float, total: float, note: str = "") -> None:
                # No bar before there is something to show: work that is refused at once should print one sentence.
                task = bar.task_ids[0] if bar.task_ids else bar.add_task(name, note="")
                bar.update(task, completed=done, total=total, note=note)

            yield show
        return

    yield lines(name)


def lines(name: str) -> Update:
    """Progress in plain lines, one every few seconds and at the end; time counts from the first report."""
    started = last = -1.0

    def line(done: float, total: float, note: str = "") -> None:
        nonlocal started, last
        now = time.monotonic()
        if started < 0:
            started = last = now
        if now - last < _PLAIN_SECONDS and done < total:
            return
        last = now
        elapsed = now - started
        left = elapsed * (total - done) / done if done else 0.0
        say(f"{name}: {done:,.0f} of {total:,.0f}  {note}  {elapsed:.0f} s, {left:.0f} s left")

    return line
