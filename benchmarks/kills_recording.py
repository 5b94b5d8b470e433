"""A server is killed at random moments while events are recorded: what was acknowledged is there, and once.

    python -m benchmarks.kills_recording [--kills 100] [--store folder|redis|redis-killed] [--seed 0]

Eight writers record events one by one, each with an id of its own; some users are a writer's own, one is everybody's.
After a random time comes kill -9: of the server, whose store is a folder or a Redis, or (`redis-killed`) of Redis
itself, durable at every write, while the server goes on. Then the server, or Redis, is started again on the same store,
each writer sends its unanswered event again, and the store is read: all that was acknowledged must be there, nothing
twice, nothing of another user. Times nothing.
"""

import argparse
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
import torch

from benchmarks.fault_world import NOW, ids_of, snapshot_writer
from benchmarks.harness import WrongAnswerError, append_rows, environment
from benchmarks.server_process import ServerProcess, free_port, serving_process
from retrieval.errors import RetrievalError
from retrieval.histories.recorded import open_histories
from retrieval.rpc.client import Event, RetrievalClient
from retrieval.snapshot.registry import Registry

_RESULTS = Path(__file__).parent / "results" / "kills_recording.csv"
_ITEMS, _WRITERS = 300, 8


@contextmanager
def running_redis(folder: Path, port: int) -> "Iterator[subprocess.Popen[bytes]]":
    """A Redis that appends to its file at every write, started on what that holds already."""
    binary = shutil.which("redis-server")
    assert binary is not None, "redis-server is not installed"
    durable = ["--save", "", "--dir", str(folder), "--appendonly", "yes", "--appendfsync", "always"]
    command = [binary, "--bind", "127.0.0.1", "--port", str(port), *durable]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, redis.Redis(port=port) as client:
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    break
                except (redis.ConnectionError, redis.BusyLoadingError):
                    assert time.monotonic() < end, "redis-server does not answer"
                    time.sleep(0.01)
            yield process
        finally:
            process.kill()


@dataclass
class Round:
    """What writers did between two kills.

    Attributes:
        sent: by user, the names of events that were sent.
        acknowledged: of these, what was answered.
        unanswered: events to be sent again.
    """

    number: int
    sent: dict[str, set[str]] = field(default_factory=dict)
    acknowledged: dict[str, set[str]] = field(default_factory=dict)
    unanswered: list[Event] = field(default_factory=list)
    dead: threading.Event = field(default_factory=threading.Event)

    def write(self, address: str, writer: int) -> None:
        """Record until a call fails."""
        with RetrievalClient(address, timeout=10) as client:
            for number in range(10**6):
                user, name = f"{self.number}-{writer if number % 2 else 'all'}", f"{writer}-{number}"
                item = int(ids_of(_ITEMS)[number % _ITEMS])
                event = Event(user_id=user, item_id=item, timestamp=NOW + number, action=name, event_id=name)
                self.sent.setdefault(user, set()).add(name)
                try:
                    client.record_events([event])
                except RetrievalError as error:
                    if not self.dead.is_set():
                        raise WrongAnswerError(f"a call failed before the kill: {error}") from None
                    self.unanswered.append(event)
                    return
                self.acknowledged.setdefault(user, set()).add(name)

    def check(self, place: str) -> int:
        """Read what the store holds of this round; gives the number of events.

        Raises:
            WrongAnswerError: something is missing, there twice, or another's.
        """
        total = 0
        with closing(open_histories(place)) as store:
            for user, sent in self.sent.items():
                found = store.read(user)
                names = list(found.actions) if found is not None else []
                missing = self.acknowledged.get(user, set()).difference(names)
                if missing or len(set(names)) != len(names) or not set(names) <= sent:
                    raise WrongAnswerError(f"user {user}: lacks {missing}; holds {names}")
                total += len(names)
        return total


def _kill(round_: Round, server: ServerProcess, kill: Callable[[], object], chance: random.Random) -> None:
    with ThreadPoolExecutor(_WRITERS) as pool:
        writers = [pool.submit(round_.write, server.address, writer) for writer in range(_WRITERS)]
        time.sleep(chance.uniform(0.05, 1.0))
        round_.dead.set()
        kill()
        for writer in writers:
            writer.result()


def _again(round_: Round, address: str) -> None:
    """Send what was not answered again, as its writers would."""
    with RetrievalClient(address, timeout=30) as client:
        client.wait_until_serving(60)
        for event in round_.unanswered:
            for attempt in range(100):
                try:
                    client.record_events([event])
                    break
                except RetrievalError:
                    # The server has not found the new Redis yet.
                    if attempt == 99:
                        raise
                    time.sleep(0.1)
            round_.acknowledged.setdefault(str(event.user_id), set()).add(event.action)


def sweep(folder: Path, store: str, kills: int, seed: int) -> dict[str, object]:
    """The row.

    Raises:
        WrongAnswerError: an acknowledged event is not there, or one is there twice.
    """
    chance, port = random.Random(seed), free_port()
    Registry(folder / "registry").publish(snapshot_writer(_ITEMS, 0))
    place = str(folder / "histories") if store == "folder" else f"redis://127.0.0.1:{port}/0"
    (folder / "redis").mkdir()
    acknowledged = events = resent = 0

    with ExitStack() as outer:
        if store == "redis":
            outer.enter_context(running_redis(folder / "redis", port))
        for number in range(kills):
            round_ = Round(number)
            if store == "redis-killed":
                events += _kill_redis(folder, place, port, round_, chance)
            else:
                with serving_process(folder / "registry", folder / "server.log", "--histories", place) as server:
                    _kill(round_, server, server.kill, chance)
                with serving_process(folder / "registry", folder / "server.log", "--histories", place) as server:
                    _again(round_, server.address)
                    events += round_.check(place)
            acknowledged += sum(map(len, round_.acknowledged.values()))
            resent += len(round_.unanswered)
            print(f"{number + 1} kills, {acknowledged} events acknowledged, {events} there", flush=True)
    return {"store": store, "kills": kills, "acknowledged": acknowledged, "there": events, "sent_again": resent}


def _kill_redis(folder: Path, place: str, port: int, round_: Round, chance: random.Random) -> int:
    with ExitStack() as stack:
        process = stack.enter_context(running_redis(folder / "redis", port))
        log = folder / "server.log"
        server = stack.enter_context(serving_process(folder / "registry", log, "--histories", place))
        _kill(round_, server, process.kill, chance)
        process.wait()
        with running_redis(folder / "redis", port):
            _again(round_, server.address)
            return round_.check(place)


def main() -> None:
    """Sweep, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--store", choices=["folder", "redis", "redis-killed"], default="folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="appends nothing")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        row = sweep(Path(temporary), parsed.store, parsed.kills, parsed.seed)
    print(*(f"{name}={value}" for name, value in row.items()))
    if not parsed.quick:
        append_rows(_RESULTS, [row | {"seed": parsed.seed} | environment(torch.device("cpu"))])


if __name__ == "__main__":
    main()
