"""`retrieval serve` as a process of its own, and what it uses: for the benchmarks that treat it badly."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.callers import PATIENCE
from benchmarks.harness import WrongAnswerError
from retrieval.cli.serve import READY

__all__ = ["Resources", "Series", "ServerProcess", "Slope", "free_port", "serving_process"]

_METRICS_LINE = re.compile(r"metrics at (http://\S+)")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds at a moment: MiB of memory (in all, and that which no file stands for), handles, threads."""

    rss_mib: float
    anonymous_mib: float
    handles: int
    threads: int


class ServerProcess:
    """A running server. Linux only.

    Attributes:
        address: HOST:PORT of the service.
        log: file of its log.
        pid: its process.
    """

    def __init__(self, process: "subprocess.Popen[str]", address: str, log: Path) -> None:
        self._process, self.address, self.log, self.pid = process, address, log, process.pid
        # The log may begin with earlier servers.
        self._metrics = _METRICS_LINE.findall(log.read_text(encoding="utf-8"))[-1]

    def metrics(self) -> dict[str, float]:
        """Each sample's value by its name and labels, as Prometheus writes them."""
        with urllib.request.urlopen(self._metrics, timeout=PATIENCE) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def resources(self) -> Resources:
        """What it holds now."""
        status = dict(line.split(":", 1) for line in self._proc("status").read_text(encoding="utf-8").splitlines())
        kib = {name: int(status[name].split()[0]) for name in ("VmRSS", "RssAnon", "Threads")}
        handles = len(os.listdir(self._proc("fd")))
        return Resources(kib["VmRSS"] / 1024, kib["RssAnon"] / 1024, handles, kib["Threads"])

    @property
    def cpu_seconds(self) -> float:
        """That it has used."""
        # The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
        fields = self._proc("stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.pid}/{name}")

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait()

    def wait_until_idle(self, seconds: float = PATIENCE) -> None:
        """Wait until no call is in hand any more.

        Raises:
            WrongAnswerError: some still are after that time: a slot was lost.
        """
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            held = {name: metrics[name] for name in ("retrieval_calls_in_hand", "retrieval_waiting_calls")}
            if not any(held.values()):
                return
            if time.monotonic() > end:
                raise WrongAnswerError(f"slots are still taken after {seconds} s: {held}")
            time.sleep(0.1)

    def check_log(self) -> None:
        """Look for what no caller may bring about.

        Raises:
            WrongAnswerError: the process has ended, or its log holds a traceback.
        """
        if self._process.poll() is not None:
            raise WrongAnswerError(f"the server ended with {self._process.returncode}; see {self.log}")
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in text:
            raise WrongAnswerError(f"a traceback in {self.log}: {text[text.index('Traceback') :][:2000]}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def serving_process(
    registry: Path, log: Path, *options: str, port: int = 0, cores: Sequence[int] = ()
) -> Iterator[ServerProcess]:
    """Run `retrieval serve REGISTRY` while the block runs; it must then end in order.

    Args:
        registry: what it serves.
        log: file for its log, appended to.
        options: further ones of the command.
        port: 0 takes a free one.
        cores: it may use these only; empty is any.

    Raises:
        WrongAnswerError: it did not end with 0 on SIGTERM, or logged a traceback.
    """
    command = [sys.executable, "-m", "retrieval.cli.main", "serve", str(registry), "--port", str(port)]
    command += ["--metrics-port", "0", *options]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    with (
        log.open("a", encoding="utf-8") as errors,
        # A crash says where.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"PYTHONFAULTHANDLER": "1"}
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                raise WrongAnswerError(f"the server did not start; see {log}")
            server = ServerProcess(process, line.removeprefix(READY).strip(), log)
            yield server
            if process.poll() != -signal.SIGKILL:
                server.check_log()
                process.terminate()
                if process.wait(PATIENCE) != 0:
                    raise WrongAnswerError(f"the server ended with {process.returncode}; see {log}")
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Slope:
    """Change per minute with its 95% interval."""

    per_minute: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.per_minute:+.3f} [{self.low:+.3f}, {self.high:+.3f}] per minute"


class Series:
    """A process's resources over time, with whatever else is counted beside them."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._rows: list[dict[str, float]] = []

    def add(self, resources: Resources, **counted: float) -> None:
        """Note a moment."""
        seconds = time.monotonic() - self._begun
        names = ("rss_mib", "anonymous_mib", "handles", "threads")
        self._rows.append({"seconds": seconds, **{name: getattr(resources, name) for name in names}, **counted})

    def column(self, name: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """One of the figures at each moment."""
        return np.array([row[name] for row in self._rows])

    def slope(self, name: str, blocks: int = 15) -> Slope:
        """How a figure grew, after a first fifth of the time in which caches fill.

        The line is drawn through means of consecutive blocks: neighbouring moments are too alike to count as many.
        """
        minutes, values = self.column("seconds") / 60, self.column(name)
        settled = minutes >= minutes[0] + (minutes[-1] - minutes[0]) / 5
        x, y = (
            np.array([block.mean() for block in np.array_split(one[settled], blocks) if len(block)])
            for one in (minutes, values)
        )
        fit = stats.linregress(x, y)
        half = float(stats.t.ppf(0.975, len(x) - 2)) * fit.stderr
        return Slope(fit.slope, fit.slope - half, fit.slope + half)

    def summary(self) -> dict[str, object]:
        """Columns of a table: where memory and handles began (after the first fifth) and ended, and their slopes."""
        found: dict[str, object] = {"minutes": float(self.column("seconds")[-1] / 60)}
        for name in ("anonymous_mib", "handles"):
            values, slope = self.column(name), self.slope(name)
            tenth = max(len(values) // 10, 1)
            settled = len(values) // 5
            found |= {
                f"{name}_settled": float(np.median(values[settled : settled + tenth])),
                f"{name}_end": float(np.median(values[-tenth:])),
                f"{name}_per_minute": slope.per_minute,
                f"{name}_low": slope.low,
                f"{name}_high": slope.high,
            }
        return found

    def write(self, path: Path) -> None:
        """As a CSV file."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self._rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self._rows)
