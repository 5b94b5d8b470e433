"""Two nights of a small synthetic world, and what must hold whatever happens to the second: see `kills_rebuild`."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
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
import torch._dynamo

import retrieval.cli.main
import retrieval.jobs.rebuild
import retrieval.snapshot.object_storage as object_storage
from benchmarks.killed import Fork, asked, started
from retrieval.data.synthetic import generate_world, nano
from retrieval.errors import NoSnapshotError
from retrieval.files import sha256_of
from retrieval.histories.recorded import open_histories
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

__all__ = ["BrokenRuleError", "Place", "Sweep", "expect"]

OPTIONS = "--preset demo --epochs 2 --warm-epochs 1 --batch-size 32 --num-negatives 64 --positive view,like,purchase"
# What a night imports late: forks then have it.
_IMPORTED = (duckdb, lmdb, torch._dynamo, retrieval.jobs.rebuild)
_USERS = [f"u{number:06d}" for number in range(0, 150, 10)]


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
                expect(place.fork(), 0)
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
        expect((run or place.fork)(), 0)
        if not self.check_live(place):
            raise BrokenRuleError(f"{place.folder}: the rerun did not publish what the uninterrupted night does")
        if place.histories() != (self.first_events if place.log == self.first else self.events):
            raise BrokenRuleError(f"{place.folder}: users' histories are others")
        if left := place.left_over():
            raise BrokenRuleError(f"{place.folder}: left over: {left}")

    def random_deaths(self, rng: random.Random, place: Place, start: Callable[[], Fork]) -> int:
        """Kill a night at random, and of every third one its rerun too; how many died.

        Raises:
            BrokenRuleError: what is live after a death is not whole.
        """
        kills = 0
        for _ in range(2 if rng.random() < 1 / 3 else 1):
            if start().kill_after(rng.uniform(0, self.seconds)) == -signal.SIGKILL:
                kills += 1
                self.check_live(place)
        return kills

    def done(self, place: Place) -> None:
        """Remove a trial that went well."""
        for path in place.folder.parent.glob(f"{place.folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def expect(fork: Fork, *codes: int) -> int:
    """Wait for a process that must end with one of these codes, and with a sentence where it fails.

    Raises:
        BrokenRuleError: it does not.
    """
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
