"""Running a command at the times of a crontab line, one run at a time, whatever happened in between."""

import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Protocol
from zoneinfo import ZoneInfo

from apscheduler.triggers.cron import CronTrigger

from retrieval.config import Config
from retrieval.errors import ConfigError, InputError
from retrieval.files import locked, write_atomically

__all__ = ["Missed", "Trigger", "crontab", "run_on_schedule"]

Missed = Literal["run", "skip"]

# The clock is read again so often: it may be set, and the machine may sleep.
_LOOK_AGAIN_SECONDS = 30.0
_LATE = timedelta(minutes=1)
_NUMBERED_DAY = re.compile(r"\d")


class Trigger(Protocol):
    """When to run."""

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The first time from `now` on; None if there is none."""


class _State(Config):
    """Contents of the state file: when the last run began."""

    last_start: datetime


def crontab(line: str, timezone: str) -> Trigger:
    """Times of a crontab line of five fields, days of the week by name.

    Raises:
        ConfigError: it is none, or there is no such time zone.
    """
    fields = line.split()
    if len(fields) == 5 and _NUMBERED_DAY.search(fields[4].split("/")[0]):
        # Cron's 0 is Sunday, the library's is Monday.
        raise ConfigError(f"--cron {line!r}: name the days of the week (mon-fri, sun)")
    try:
        trigger: Trigger = CronTrigger.from_crontab(line, timezone=ZoneInfo(timezone))
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"--cron {line!r}, --timezone {timezone}: {error}") from None
    return trigger


def run_on_schedule(
    command: Sequence[str],
    trigger: Trigger,
    state: Path,
    *,
    missed: Missed = "run",
    stop: threading.Event,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Run a command in a process of its own at each time of a trigger, until told to stop.

    A run that fails, or is killed, is reported and takes nothing else down. Times that pass while a run lasts, or while
    nobody waited for them, count as missed.

    Args:
        command: program and arguments.
        trigger: when.
        state: file that remembers the last start, so that a restart knows what it missed; beside it lies a lock.
        missed: "run" makes up for any number of missed times by one run at once; "skip" waits for the next time.
        stop: ends the waiting; a run in hand gets SIGTERM and is waited for.
        report: told when runs begin and end.

    Raises:
        InputError: another scheduler uses the state file, or it holds something else.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(state.with_name(f"{state.name}.lock"), wait=False):
            _run(command, trigger, state, missed, stop, report)
    except BlockingIOError:
        raise InputError(f"{state}: another scheduler is at work with it") from None


def _run(
    command: Sequence[str],
    trigger: Trigger,
    state: Path,
    missed: Missed,
    stop: threading.Event,
    report: Callable[[str], None],
) -> None:
    after = _last_start(state) if missed == "run" else None
    after = after if after is not None else datetime.now(UTC)
    while not stop.is_set():
        due = trigger.get_next_fire_time(None, after + timedelta(microseconds=1))
        if due is None:
            report("there is no later time: done")
            return
        if due > datetime.now(UTC):
            report(f"next run at {due.isoformat(timespec='seconds')}")
        while (left := (due - datetime.now(UTC)).total_seconds()) > 0:
            if stop.wait(min(left, _LOOK_AGAIN_SECONDS)):
                return
        after = datetime.now(UTC)
        if missed == "skip" and after - due > _LATE:
            report(f"the run at {due.isoformat(timespec='seconds')} was missed: skipped")
            continue
        write_atomically(state, _State(last_start=after).model_dump_json().encode())
        report(f"began: {shlex.join(command)}")
        begun = time.monotonic()
        code = _child(command, stop)
        report(f"ended with exit code {code} after {time.monotonic() - begun:.0f} s")
        if missed == "skip":
            after = datetime.now(UTC)


def _last_start(state: Path) -> datetime | None:
    if not state.exists():
        return None
    try:
        return _State.model_validate_json(state.read_bytes()).last_start
    except ValueError:
        raise InputError(f"{state}: is not the state of a scheduler") from None


def _child(command: Sequence[str], stop: threading.Event) -> int:
    """Exit code of a run; 128 + n if signal n ended it."""
    with subprocess.Popen(command) as child:
        asked = False
        while child.poll() is None:
            if stop.wait(0.2) and not asked:
                child.send_signal(signal.SIGTERM)
                asked = True
            elif asked:
                child.wait()
        code = child.returncode
    return code if code >= 0 else 128 - code
