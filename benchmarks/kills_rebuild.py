"""`retrieval rebuild` is killed, starved, locked out and raced: what is live is whole, and a rerun ends the same.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.kills_rebuild --work /tmp/kills [--kills 200] [--scenarios random …]

A night of a small synthetic world, with histories, follows a first one; both are first run without a hitch. Then, each
time from a copy of what the first night left, by scenario:

operations  killed right before a change to a file: all that the night makes, or every n-th, for --kills/2 of them
stages      killed as each stage begins
random      killed at a random moment; a third of the reruns too
fresh       the same with processes started from the shell (the others are forks of one that has torch imported)
s3          the same with a registry in an S3 server of its own; leases of 0.5 s in place of 30
first       the first night, killed at random
full        a disk that is full after so many KiB, then has room again (needs the right to mount)
readonly    the registry, then the folder for work, read-only (needs the right to mount)
clock       killed at random; the rerun's clock is a day ahead or behind (needs libfaketime)
two         a second rebuild beside it, in the same folder or in one of its own; one of the two is killed at random

After every death the live version opens, verified; it is the old or the new one. After the rerun, which must succeed,
the new version is live, its encoder, vocabulary and index are byte for byte those of the uninterrupted night, users'
histories hold the same events, and neither registry nor work holds a temporary file. A scenario's row says how many
processes died and were checked; the first one that breaks a rule ends the sweep, its folder stays. Trials that are
done are not done again.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch._dynamo

import retrieval.cli.main
import retrieval.jobs.rebuild
import retrieval.snapshot.object_storage as object_storage
from benchmarks import killed
from benchmarks.harness import append_rows, environment
from benchmarks.killed import Fork, asked, started
from retrieval.data.synthetic import generate_world, nano
from retrieval.errors import NoSnapshotError
from retrieval.files import sha256_of
from retrieval.histories.recorded import open_histories
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

RESULTS = Path(__file__).parent / "results" / "kills_rebuild.csv"
OPTIONS = "--preset demo --epochs 2 --warm-epochs 1 --batch-size 32 --num-negatives 64 --positive view,like,purchase"
SCENARIOS = ("operations", "stages", "random", "fresh", "s3", "first", "full", "readonly", "clock", "two")
# What a night imports late: forks then have it.
_IMPORTED = (duckdb, lmdb, torch._dynamo, retrieval.jobs.rebuild)
_USERS = [f"u{number:06d}" for number in range(0, 150, 10)]
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


class Place:
    """A folder with a registry, a folder for work and users' histories, and the night that is run on them.

    Args:
        folder: where.
        log: the events.
        registry: URL of the registry; None: in the folder.
    """

    def __init__(self, folder: Path, log: Path, registry: str | None = None) -> None:
        self.folder, self.log, self.registry = folder, log, registry or str(folder / "registry")
        self._outputs = 0

    def command(self, *, work: str = "work") -> list[str]:
        """Arguments of `retrieval`."""
        paths = ["--registry", self.registry, "--work", str(self.folder / work)]
        paths += ["--histories", str(self.folder / "histories"), "--keep", "1"]
        return ["rebuild", str(self.log), *paths, *OPTIONS.split()]

    def output(self) -> Path:
        """A new file for a process's output, beside the folder."""
        self._outputs += 1
        return self.folder.with_name(f"{self.folder.name}-output-{self._outputs}")

    def fork(self, prepare: Callable[[], object] = lambda: None, *, work: str = "work") -> Fork:
        """Start the night in a fork, after something that is done there first."""

        def run() -> int:
            prepare()
            object_storage.ObjectStorage = partial(object_storage.ObjectStorage, lease_seconds=0.5)  # type: ignore
            return retrieval.cli.main.main(self.command(work=work))

        return started(run, self.output())

    def fresh(self, **variables: str) -> Fork:
        """Start the night in a process of its own."""
        output = self.output()
        actions = [(os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT, 0o644)]
        command = [sys.executable, "-m", "retrieval.cli.main", *self.command()]
        return Fork(
            os.posix_spawn(
                sys.executable,
                command,
                os.environ | variables,
                file_actions=[*actions, (os.POSIX_SPAWN_DUP2, 1, 2)],
            ),
            output,
        )

    def live(self) -> dict[str, Any]:
        """The live version, opened and verified by a process that sees the registry for the first time."""
        cache = self.folder.with_name(f"{self.folder.name}-cache")

        def look() -> dict[str, Any]:
            store = None
            if "://" in self.registry:
                store = object_storage.ObjectStorage(self.registry, object_storage.object_store(self.registry), cache)
            registry = Registry(self.registry, store)
            try:
                folder = registry.folder(registry.current())
            except NoSnapshotError:
                return {"version": None}
            open_snapshot(folder)
            # Their contents tell when and where they were made.
            files = sorted(path for path in folder.iterdir() if path.name not in ("manifest.json", "report.json"))
            return {"version": folder.name, "files": {path.name: sha256_of(path) for path in files}}

        found: dict[str, Any] = asked(look, self.output())
        shutil.rmtree(cache, ignore_errors=True)
        return found

    def histories(self) -> Any:
        """Events of some users, as the store has them."""

        def look() -> list[Any]:
            with closing(open_histories(str(self.folder / "histories"))) as store:
                read = [store.read(user) for user in _USERS]
            return [
                None if one is None else [[str(item) for item in one.items], [int(time) for time in one.timestamps]]
                for one in read
            ]

        found = asked(look, self.output())
        assert any(found), "none of these users is known"
        return found

    def left_over(self) -> list[str]:
        """Temporary files and folders, and nights that are neither tonight's nor the live snapshot's."""
        begins = (".tmp-", "staging", "removing-", "spill")
        found = [str(path) for path in self.folder.rglob("*") if path.name.startswith(begins)]
        nights = [str(path) for path in (self.folder / "work").glob("night-*")]
        return found + nights[2:]


class BrokenRuleError(Exception):
    """What must hold after a death does not."""


class Sweep:
    """The two nights, and trials on copies of what the first one leaves."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        if not (root / "logs").exists():
            asked(partial(_write_logs, root), root / "world-output")
        self.first, self.second = root / "logs" / "first", root / "logs" / "second"
        self.start, whole = Place(root / "start", self.first), Place(root / "whole", self.second)
        if not (root / "whole").exists():
            for place in (self.start, whole):
                place.folder.mkdir()
                if place is whole:
                    shutil.rmtree(place.folder)
                    shutil.copytree(self.start.folder, place.folder, symlinks=True)
                begun = time.monotonic()
                _expect(place.fork(), 0)
            (root / "seconds").write_text(str(time.monotonic() - begun))
        self.seconds = float((root / "seconds").read_text())
        self.old, self.whole, self.events = self.start.live(), whole.live(), whole.histories()
        self.first_events = self.start.histories()

    def copy(self, name: str, *, first: bool = False, registry: str | None = None) -> Place:
        """A new folder before the second night, or with nothing in it before the first."""
        folder = self.root / "trials" / name
        for old in folder.parent.glob(f"{name}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if first:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(self.start.folder, folder, symlinks=True)
        return Place(folder, self.first if first else self.second, registry)

    def check_live(self, place: Place) -> bool:
        """The live version is whole, and the old or the new one; whether it is the new one.

        Raises:
            BrokenRuleError: it is not.
        """
        first = place.log == self.first
        live, new = place.live(), self.old if first else self.whole
        is_new = live.get("files") == new["files"]
        if not is_new and live["version"] != (None if first else self.old["version"]):
            raise BrokenRuleError(f"{place.folder}: {live} is live")
        return is_new

    def check_end(self, place: Place, run: Callable[[], Fork] | None = None) -> None:
        """The rerun succeeds, and ends like the night that nothing happened to.

        Raises:
            BrokenRuleError: it does not.
        """
        _expect((run or place.fork)(), 0)
        if not self.check_live(place):
            raise BrokenRuleError(f"{place.folder}: the rerun did not publish what the uninterrupted night does")
        if place.histories() != (self.first_events if place.log == self.first else self.events):
            raise BrokenRuleError(f"{place.folder}: users' histories are others")
        if left := place.left_over():
            raise BrokenRuleError(f"{place.folder}: left over: {left}")

    def done(self, place: Place) -> None:
        """Remove a trial that went well."""
        for path in place.folder.parent.glob(f"{place.folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _expect(fork: Fork, *codes: int) -> int:
    """Wait for a process that must end with one of these codes, and with a sentence where it fails."""
    code, text = fork.wait(), fork.output.read_text()
    if code not in codes or "Traceback" in text:
        raise BrokenRuleError(f"{fork.output}: exit code {code}:\n{text[-3000:]}")
    return code


def _write_logs(root: Path) -> None:
    """The world's events up to some day, and up to a later one, a file for each of the two parts."""
    world = generate_world(nano().model_copy(update={"users": 150, "events_per_user": 30}), root / "world")
    events = pq.read_table(world.events_folder)
    times = events["timestamp"].to_numpy()
    moment = int(np.quantile(times, 0.8))
    parts = [events.filter(pc.less(events["timestamp"], moment)), events.filter(pc.less(pa.scalar(moment - 1), times))]
    for number, name in enumerate(("first", "second")):
        (root / "logs" / name).mkdir(parents=True)
        for part in range(number + 1):
            pq.write_table(parts[part], root / "logs" / name / f"part-{part}.parquet")


def _random_deaths(sweep: Sweep, number: int, rng: random.Random, place: Place, start: Callable[[], Fork]) -> int:
    """Kill a night at random, and a third of the reruns."""
    kills = 0
    for _ in range(2 if rng.random() < 1 / 3 else 1):
        if start().kill_after(rng.uniform(0, sweep.seconds)) == -signal.SIGKILL:
            kills += 1
            sweep.check_live(place)
    return kills


def operations(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    place = sweep.copy("counted")
    seen = place.folder.with_name("counted-operations")

    def record() -> None:
        descriptor = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        killed.operations(place.folder, partial(_note, descriptor))

    _expect(place.fork(record), 0)
    total = len(seen.read_text().splitlines())
    sweep.done(place)
    print(f"operations: a night makes {total} changes to files", flush=True)

    def trial(number: int) -> int:
        place = sweep.copy(f"operations-{number}")
        code = place.fork(lambda: killed.at_operation(place.folder, number)).wait()
        if code != -signal.SIGKILL:
            raise BrokenRuleError(f"{place.folder}: ended with {code} before change {number}")
        sweep.check_live(place)
        sweep.check_end(place)
        sweep.done(place)
        return 1

    for number in range(0, total, max(1, total // trials)):
        yield partial(trial, number)


def _note(descriptor: int, what: str) -> None:
    os.write(descriptor, f"{what}\n".encode())


def stages(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""

    def trial(number: int) -> int:
        place = sweep.copy(f"stages-{number}")
        code = place.fork(lambda: killed.at_stage(number)).wait()
        sweep.check_live(place)
        sweep.check_end(place)
        sweep.done(place)
        return int(code == -signal.SIGKILL)

    for number in range(12):
        yield partial(trial, number)


def at_random(sweep: Sweep, trials: int, kind: str) -> Iterator[Callable[[], int]]:
    """See the module: random, fresh, first, clock."""

    def trial(number: int) -> int:
        rng = random.Random(f"{sweep.seed}-{kind}-{number}")
        place = sweep.copy(f"{kind}-{number}", first=kind == "first")
        # Files keep their times: a clock that is wrong does not change those of the log.
        shift = {"LD_PRELOAD": str(_FAKETIME), "NO_FAKE_STAT": "1", "FAKETIME": f"{'+-'[number % 2]}1d"}
        shift["DONT_FAKE_MONOTONIC"] = "1"
        start: Callable[[], Fork] = place.fork
        again = start
        if kind in ("fresh", "clock"):
            start = again = place.fresh
        if kind == "clock":
            again = partial(place.fresh, **shift)
        kills = _random_deaths(sweep, number, rng, place, start)
        sweep.check_end(place, again)
        sweep.done(place)
        return kills

    for number in range(trials):
        yield partial(trial, number)


def two(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""

    def trial(number: int) -> int:
        rng = random.Random(f"{sweep.seed}-two-{number}")
        place = sweep.copy(f"two-{number}")
        forks = [place.fork(), place.fork(work=("work", "work-2")[number % 2])]
        doomed, other = rng.sample(forks, 2)
        kills = doomed.kill_after(rng.uniform(0, sweep.seconds)) == -signal.SIGKILL
        # It did the night, or was told that another is at it.
        _expect(other, 0, 2)
        sweep.check_live(place)
        sweep.check_end(place)
        sweep.done(place)
        return int(kills)

    for number in range(trials):
        yield partial(trial, number)


def s3(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    from tests.s3 import make_bucket, settings

    port_file = sweep.root / "s3-port"
    port_file.unlink(missing_ok=True)

    def serve() -> int:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port_file.with_suffix(".new").write_text(str(server.get_host_and_port()[1]))
        port_file.with_suffix(".new").rename(port_file)
        while os.getppid() == parent:
            time.sleep(0.5)
        return 0

    parent = os.getpid()
    server = started(serve, sweep.root / "s3-output")
    while not port_file.exists():
        time.sleep(0.1)
    endpoint = f"http://127.0.0.1:{port_file.read_text()}"
    os.environ |= settings(endpoint) | {"XDG_CACHE_HOME": str(sweep.root / "s3-caches")}
    bucket = make_bucket(endpoint).rsplit("/", 1)[0]

    def upload(url: str) -> int:
        import obstore

        store, folder = object_storage.object_store(url), sweep.start.folder / "registry"
        version = sweep.old["version"]
        for path in sorted((folder / version).iterdir(), key=lambda path: path.name == "manifest.json"):
            obstore.put(store, f"{version}/{path.name}", path.read_bytes())
        obstore.put(store, "CURRENT", (folder / "CURRENT").read_bytes())
        return 0

    def trial(number: int) -> int:
        url = f"{bucket}/trial-{number}"
        place = sweep.copy(f"s3-{number}", registry=url)
        _expect(started(partial(upload, url), place.output()), 0)
        rng = random.Random(f"{sweep.seed}-s3-{number}")
        kills = _random_deaths(sweep, number, rng, place, place.fork)
        sweep.check_end(place)
        sweep.done(place)
        return kills

    try:
        for number in range(trials):
            yield partial(trial, number)
    finally:
        server.kill_after(0)


def full(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    grown = _kib(sweep.root / "whole") - _kib(sweep.root / "start")

    def trial(number: int) -> int:
        place = sweep.copy(f"full-{number}")
        room = _kib(place.folder) + int((number + 0.5) * 1.5 * max(grown, 1000) / trials)
        shutil.move(place.folder, place.folder.with_name(f"{place.folder.name}-kept"))
        place.folder.mkdir()
        with _mounted("tmpfs", "tmpfs", place.folder, f"size={room}k"):
            shutil.copytree(
                place.folder.with_name(f"{place.folder.name}-kept"), place.folder, symlinks=True, dirs_exist_ok=True
            )
            code = _expect(place.fork(), 0, 1, 2)
            sweep.check_live(place)
            subprocess.run(["mount", "-o", "remount,size=4g", str(place.folder)], check=True)
            sweep.check_end(place)
        sweep.done(place)
        return int(code != 0)

    for number in range(trials):
        yield partial(trial, number)


def readonly(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""

    def trial(name: str) -> int:
        place = sweep.copy(f"readonly-{name}")
        folder = place.folder / name
        with _mounted("none", str(folder), folder, "bind"):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            code = _expect(place.fork(), 1, 2)
            sweep.check_live(place)
        sweep.check_end(place)
        sweep.done(place)
        return int(code != 0)

    for name in ("registry", "work", "histories"):
        yield partial(trial, name)


@contextlib.contextmanager
def _mounted(kind: str, what: str, where: Path, options: str) -> Iterator[None]:
    command = ["mount", *(["-t", kind] if kind != "none" else []), "-o", options, what, str(where)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def _kib(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file()) // 2


def main() -> None:
    """Run the scenarios that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for nights and trials")
    parser.add_argument("--kills", type=int, default=200, help="about so many in all (default: 200)")
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sweep = Sweep(parsed.work.resolve(), parsed.seed)
    some = max(2, parsed.kills // 10)
    trials = {"operations": parsed.kills // 2, "random": 3 * some, "fresh": some // 2, "s3": some, "full": some}
    for scenario in parsed.scenarios:
        count = trials.get(scenario, some // 2)
        if scenario in ("random", "fresh", "first", "clock"):
            plan = at_random(sweep, count, scenario)
        else:
            plan = globals()[scenario](sweep, count)
        _run(sweep, scenario, plan, parsed.out)


def _run(sweep: Sweep, scenario: str, plan: Iterator[Callable[[], int]], out: Path) -> None:
    file, finished = (sweep.root / f"{name}-{scenario}.json" for name in ("done", "finished"))
    if finished.exists():
        return
    done: list[int] = json.loads(file.read_text()) if file.exists() else []
    for number, trial in enumerate(plan):
        if number < len(done):
            continue
        begun = time.monotonic()
        done.append(trial())
        file.write_text(json.dumps(done))
        print(f"{scenario} {number}: {done[-1]} died, {time.monotonic() - begun:.1f} s", flush=True)
    row: dict[str, object] = {"scenario": scenario, "nights": len(done), "died": sum(done), "broken_rules": 0}
    print(row, flush=True)
    append_rows(out, [row | environment(torch.device("cpu"))])
    finished.write_text(json.dumps(row))


if __name__ == "__main__":
    main()
