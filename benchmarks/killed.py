"""Processes that are made to die: forks of one that has everything imported, killed where the caller says.

A fork runs the same code as a fresh start, without the seconds of importing torch. It is ended by SIGKILL, so that
nothing of it runs afterwards, and what it wrote stays as the kernel has it.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Fork", "asked", "at_operation", "at_stage", "clock_library", "operations", "started"]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
_CLOCK = Path(__file__).with_name("shifted_clock.c")
_HARMLESS = "jemalloc_bg_thd"


@dataclass(slots=True)
class Fork:
    """A process, its place for output, and its exit code once it has ended (−n: by signal n)."""

    pid: int
    output: Path
    code: int | None = None

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill_after(self, seconds: float) -> int:
        """Kill it that much later, unless it ends before."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                return self.code
            time.sleep(min(0.005, max(0.0, until - time.monotonic())))
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def started(run: Callable[[], int], output: Path) -> Fork:
    """Run something in a fork whose standard output and error go to a file; its result is the exit code."""
    # A thread of this process would be missing in the fork, with whatever lock it holds; jemalloc minds its own.
    threads = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    if sorted(threads, key=lambda name: name == _HARMLESS)[1:] not in ([], [_HARMLESS]):
        raise RuntimeError(f"only a process of one thread can be forked, not {threads}: set OPENBLAS_NUM_THREADS=1")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Fork(pid, output)
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = run()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def asked(question: Callable[[], Any], output: Path) -> Any:
    """What a function returns in a fork, by way of JSON: this process stays as it is."""

    def answer() -> int:
        found = json.dumps(question())
        output.with_suffix(".json").write_text(found)
        return 0

    fork = started(answer, output)
    if fork.wait():
        raise AssertionError(f"exit code {fork.code}: {output.read_text()}")
    return json.loads(output.with_suffix(".json").read_text())


def operations(root: Path, on_operation: Callable[[str], None]) -> None:
    """From now on, call a function before every change that this process makes to files below a folder.

    A change is what Python tells of: a file opened for writing, a rename, a removal, a new folder. Writes of libraries
    into files that they open themselves are between two of them.
    """
    prefix = str(root)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = bool(flags & _WRITING) if mode is None else any(letter in mode for letter in "wax+")
        else:
            path, changes = arguments[0] if arguments else None, event in _CHANGES
        if changes and isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(prefix):
            on_operation(f"{event} {os.fsdecode(path)[len(prefix) + 1 :]}")

    sys.addaudithook(hook)


def at_operation(root: Path, number: int) -> None:
    """Let this process kill itself right before its so many-th change to files below a folder, counted from 0."""
    left = iter(range(number))

    def count(_: str) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    operations(root, count)


def at_stage(number: int) -> None:
    """Let this process kill itself as the so many-th stage of a night begins, counted from 0."""
    rebuild: Any = importlib.import_module("retrieval.cli.rebuild")
    left, say = iter(range(number)), rebuild.say

    def count(text: str) -> None:
        if text.endswith("…") and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        say(text)

    rebuild.say = count


def clock_library(folder: Path) -> Path:
    """What a program must load to see another time of day, compiled into a folder: see `shifted_clock.c`."""
    library = folder / "shifted_clock.so"
    if not library.exists():
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_CLOCK)], check=True)
    return library
