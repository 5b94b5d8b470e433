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
clock       killed at random; the rerun's clock is a day ahead or behind (needs a C compiler)
two         a second rebuild beside it, in the same folder or in a copy of it; one of the two is killed at random

After every death the live version opens, verified; it is the old or the new one. After the rerun, which must succeed,
the new version is live, its encoder, vocabulary and index are byte for byte those of the uninterrupted night, users'
histories hold the same events, and neither registry nor work holds a temporary file. A scenario's row says how many
processes died and were checked; the first one that breaks a rule ends the sweep, its folder stays. Trials that are
done are not done again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import killed
from benchmarks.harness import append_rows, environment
from benchmarks.killed import Fork, clock_library
from benchmarks.kills_surroundings import full, readonly, s3
from benchmarks.kills_world import BrokenRuleError, Sweep, expect

RESULTS = Path(__file__).parent / "results" / "kills_rebuild.csv"


def operations(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    place = sweep.copy("counted")
    seen = place.folder.with_name("counted-operations")

    def record() -> None:
        descriptor = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        killed.operations(place.folder, partial(_note, descriptor))

    expect(place.fork(record), 0)
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
        start: Callable[[], Fork] = place.fork
        again = start
        if kind in ("fresh", "clock"):
            start = again = place.fresh
        if kind == "clock":
            shift = "-86400" if number % 2 else "86400"
            again = partial(place.fresh, LD_PRELOAD=str(clock_library(sweep.root)), CLOCK_SHIFT=shift)
        kills = sweep.random_deaths(rng, place, start)
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
        beside = ("work", "work-2")[number % 2]
        if beside != "work":
            # Another machine that has what the first night had learned: without, its optimiser would start anew.
            shutil.copytree(place.folder / "work", place.folder / beside)
        forks = [place.fork(), place.fork(work=beside)]
        # One of the two is told that another is at it and ends: then it is the other one that is killed.
        died = False
        for fork in rng.sample(forks, 2):
            died = died or fork.kill_after(rng.uniform(0, sweep.seconds)) == -signal.SIGKILL
        for fork in forks:
            if fork.code != -signal.SIGKILL:
                expect(fork, 0, 2)
        sweep.check_live(place)
        expect(place.fork(work=beside), 0)
        sweep.check_end(place)
        sweep.done(place)
        return int(died)

    for number in range(trials):
        yield partial(trial, number)


SCENARIOS: dict[str, Callable[[Sweep, int], Iterator[Callable[[], int]]]] = {
    "operations": operations,
    "stages": stages,
    "random": partial(at_random, kind="random"),
    "fresh": partial(at_random, kind="fresh"),
    "s3": s3,
    "first": partial(at_random, kind="first"),
    "full": full,
    "readonly": readonly,
    "clock": partial(at_random, kind="clock"),
    "two": two,
}


def main() -> None:
    """Run the scenarios that are not finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for nights and trials")
    parser.add_argument("--kills", type=int, default=200, help="about so many in all (default: 200)")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sweep = Sweep(parsed.work.resolve(), parsed.seed)
    some = max(2, parsed.kills // 10)
    trials = {"operations": parsed.kills // 2, "random": 3 * some} | dict.fromkeys(("s3", "full", "two"), some)
    for scenario in parsed.scenarios:
        plan = SCENARIOS[scenario](sweep, trials.get(scenario, some // 2))
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
