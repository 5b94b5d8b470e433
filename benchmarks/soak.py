"""Twenty minutes of everything at once: load, swaps, rebuilds, recorded events, bad clients; no answer may be wrong.

    python -m benchmarks.soak [--minutes 20] [--seed 0] [--note TEXT]

`retrieval rebuild` makes night after night of a log that grows by a day each time; between two nights versions are
gone back to and a damaged one is published. Meanwhile callers ask for what an oracle knows of each version; a writer
records events and asks for the same user at once, stored and inline; bad clients send hostile messages and rubbish on
sockets, hang, and give calls up. The server's memory, handles and threads are noted all the time: the series goes to a
CSV file, their slopes with 95% intervals to a row. There is a row only if no call failed and no answer was wrong.
"""

import argparse
import asyncio
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmarks.callers import PATIENCE, Heard, calling
from benchmarks.fault_world import METHOD, NOW, Oracle, make_requests
from benchmarks.fuzz import cancel_storm, honest_calls, hostile_requests, send_all
from benchmarks.harness import WrongAnswerError, append_rows, environment
from benchmarks.server_process import Series, ServerProcess, serving_process
from benchmarks.swaps import judge
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Event, History, RetrievalClient, StoredUser
from retrieval.snapshot.manifest import MANIFEST
from retrieval.snapshot.registry import Registry
from tests.rpc import http2

_RESULTS = Path(__file__).parent / "results"
_USERS, _ITEMS, _DAY, _FIRST_DAYS, _REQUESTS, _WIDTH = 200, 200, 86_400, 4, 36, 48
_NIGHT = ["--preset", "demo", "--epochs", "6", "--warm-epochs", "1", "--learning-rate", "0.01", "--batch-size", "16"]
_NIGHT += ["--negatives", "full", "--keep", "1000"]
_REFUSED = 3
_SERVICE = pb.DESCRIPTOR.services_by_name["RetrievalService"]


class Nights:
    """Rebuilds of one registry."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._days = folder, 0
        (folder / "log").mkdir()
        (folder / "gates.json").write_text(json.dumps({"k": 5, "min_queries": 20}), encoding="utf-8")
        self.outcomes: Counter[str] = Counter()

    def next(self) -> None:
        """A day more, and its night.

        Raises:
            WrongAnswerError: the rebuild failed.
        """
        for _ in range(1 if self._days else _FIRST_DAYS):
            self._write_day()
        places = ["--registry", str(self._folder / "registry"), "--work", str(self._folder / "work")]
        command = [sys.executable, "-m", "retrieval.cli.main", "rebuild", str(self._folder / "log"), *places, *_NIGHT]
        done = subprocess.run(
            [*command, "--gates", str(self._folder / "gates.json")], capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, _REFUSED):
            raise WrongAnswerError(f"a rebuild ended with {done.returncode}: {done.stderr[-2000:]}")
        self.outcomes["published" if done.returncode == 0 else "refused"] += 1

    def _write_day(self) -> None:
        """Item i is followed by i + 1."""
        lines = ["user_id,item_id,timestamp"]
        for user, step in itertools.product(range(_USERS), range(6)):
            item = (7 * user + 6 * self._days + step) % _ITEMS
            lines.append(f"{user},{item},{NOW - 100 * _DAY + self._days * _DAY + 600 * step + user}")
        path = self._folder / "log" / f"day-{self._days:03d}.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._days += 1


class Writer:
    """Records events of one user after another, and asks whether they count."""

    def __init__(self, address: str) -> None:
        self._client, self._user = RetrievalClient(address, timeout=PATIENCE), 0
        self.events = 0

    def write(self, chance: random.Random) -> None:
        """A new user's events, one call each.

        Raises:
            WrongAnswerError: the stored history is not what was recorded.
        """
        self._user += 1
        items = [chance.randrange(_ITEMS) for _ in range(5)]
        times = [NOW - 5_000 + 600 * place for place in range(5)]
        for place, (item, time_) in enumerate(zip(items, times, strict=True)):
            event = Event(user_id=f"soak-{self._user}", item_id=item, timestamp=time_, event_id=str(place))
            # The second one is a repeat.
            for _ in range(2):
                self._client.record_events([event])
            self.events += 1
            so_far = History(items[: place + 1], times[: place + 1])
            users: list[StoredUser | History] = [StoredUser(f"soak-{self._user}"), so_far]
            embedded = self._client.embed_users(users, request_time=NOW)
            stored, inline = (np.array(embedded.embedding(number)) for number in range(2))
            if embedded.events_read != [place + 1] * 2 or np.abs(stored - inline).max() > 1e-4:
                raise WrongAnswerError(f"soak-{self._user}: {embedded.events_read} events, {stored} but {inline}")

    def close(self) -> None:
        """End."""
        self._client.close()


class BadClients(threading.Thread):
    """Mistreat a server until told to stop; what they find wrong is raised by `end`."""

    def __init__(self, server: ServerProcess, messages: list[bytes], seed: int) -> None:
        super().__init__(name="bad clients")
        self._server, self._messages, self._seed = server, messages, seed
        self._done = threading.Event()
        self._error: Exception | None = None
        self.sent: Counter[str] = Counter()

    def run(self) -> None:
        """Until the end."""
        try:
            for turn in itertools.count():
                if self._done.wait(1.0):
                    return
                self._mistreat(self._seed + turn)
        except Exception as error:
            self._error = error

    def _mistreat(self, seed: int) -> None:
        chance, near, address = random.Random(seed), list(range(20)), self._server.address
        requests = hostile_requests(honest_calls(near), near, 100, seed)
        self.sent["messages"] += asyncio.run(send_all(address, _SERVICE, requests, 8)).total()
        held = http2.half_open(address, METHOD, self._messages[0], 4)
        held.append(http2.slow_reader(address, METHOD, self._messages[0], 20))
        for name in chance.sample(list(http2.ATTACKS), 5):
            http2.attack(address, http2.ATTACKS[name](chance, METHOD, chance.choice(self._messages)))
        self.sent["cancelled"] += asyncio.run(cancel_storm(address, self._messages[1], 50, seed)).total()
        self.sent["connections"] += 5 + len(held)
        for connection in held:
            connection.close()

    def end(self) -> None:
        """Stop, and tell what went wrong."""
        self._done.set()
        self.join()
        if self._error is not None:
            raise self._error


def _publish_damaged(registry: Registry, chance: random.Random) -> str:
    live = registry.folder(registry.current())

    def write(folder: Path) -> bytes:
        for path in live.iterdir():
            shutil.copy(path, folder / path.name)
        index = folder / "index.faiss"
        content = bytearray(index.read_bytes())
        content[chance.randrange(len(content))] ^= 4
        index.write_bytes(bytes(content))
        return (folder / MANIFEST).read_bytes()

    return registry.publish(write)


def _serves(client: RetrievalClient, version: str) -> None:
    until = time.monotonic() + PATIENCE
    while client.serving_state().snapshot_version != version:
        if time.monotonic() > until:
            raise WrongAnswerError(f"{version} is not served")
        time.sleep(0.02)


class Soak:
    """Everything beside the load, one thing after the other."""

    def __init__(self, folder: Path, server: ServerProcess, oracle: Oracle, nights: Nights, seed: int) -> None:
        self._registry, self._oracle, self._nights = Registry(folder / "registry"), oracle, nights
        self._chance, self._good = random.Random(seed), [self._registry.current()]
        self._client, self._writer = RetrievalClient(server.address, timeout=PATIENCE), Writer(server.address)
        self.swaps = 0

    @property
    def events(self) -> int:
        """That were recorded."""
        return self._writer.events

    def turn(self) -> None:
        """A few swaps, a bad version, a night.

        Raises:
            WrongAnswerError: what should be served is not, or what was recorded does not count.
        """
        for _ in range(6):
            self._activate(self._chance.choice(self._good))
            self._writer.write(self._chance)
        _publish_damaged(self._registry, self._chance)
        self._writer.write(self._chance)
        self._activate(self._good[-1])
        self._nights.next()
        if (version := self._registry.current()) != self._good[-1]:
            _serves(self._client, version)
            self._good.append(version)
            self._oracle.learn(version)
            self.swaps += 1

    def _activate(self, version: str) -> None:
        self._registry.activate(version)
        _serves(self._client, version)
        self.swaps += 1

    def close(self) -> None:
        """End its clients."""
        self._client.close()
        self._writer.close()


def measure(folder: Path, minutes: float, seed: int) -> dict[str, object]:
    """The row.

    Raises:
        WrongAnswerError: something was wrong.
    """
    nights, registry = Nights(folder), Registry(folder / "registry")
    nights.next()
    oracle = Oracle(registry, make_requests(np.arange(_ITEMS), _REQUESTS, width=_WIDTH, least_events=30))
    oracle.learn(registry.current())
    series, heard, done = Series(), Heard(), threading.Event()
    options = ("--histories", str(folder / "histories"), "--poll-seconds", "0.2")
    with (
        serving_process(folder / "registry", folder / "server.log", *options) as server,
        calling(server.address, METHOD, oracle.messages, 6, 0.03) as load,
        closing(Soak(folder, server, oracle, nights, seed)) as soak,
    ):
        bad = BadClients(server, oracle.messages, seed)

        def watch() -> None:
            while not done.wait(2.0):
                series.add(server.resources(), swaps=soak.swaps, nights=nights.outcomes.total())

        watcher = threading.Thread(target=watch)
        begun = time.monotonic()
        try:
            bad.start()
            watcher.start()
            while time.monotonic() - begun < 60 * minutes:
                soak.turn()
                judge(oracle, heard, load.heard())
                took = (time.monotonic() - begun) / 60
                print(
                    f"{took:.1f} min, {soak.swaps} swaps, {len(heard.seconds)} right, {server.resources()}", flush=True
                )
        finally:
            done.set()
            watcher.join()
            # Also of a run that failed.
            series.write(folder / "soak.csv")
            bad.end()
        judge(oracle, heard, load.stop())
        server.wait_until_idle()
    return {
        "swaps": soak.swaps,
        "nights": nights.outcomes["published"],
        "nights_refused": nights.outcomes["refused"],
        "events": soak.events,
        "answers": len(heard.seconds),
        "p50_ms": heard.milliseconds(0.5),
        "p99_ms": heard.milliseconds(0.99),
        **{f"bad_{name}": count for name, count in sorted(bad.sent.items())},
        "seed": seed,
        **series.summary(),
    }


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where log and series stay (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="appends nothing")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        row = measure(folder, parsed.minutes, parsed.seed)
        if not parsed.quick:
            shutil.copy(folder / "soak.csv", _RESULTS / "soak_series.csv")
    print(*(f"{name}={value}" for name, value in row.items()))
    if not parsed.quick:
        append_rows(_RESULTS / "soak.csv", [row | environment(torch.device("cpu")) | {"note": parsed.note}])


if __name__ == "__main__":
    main()
