"""Snapshots replace each other a thousand times under load, bad ones among them: no call fails, no answer is mixed.

    python -m benchmarks.swaps [--swaps 1000] [--items 20000] [--callers 8] [--pause 0.01] [--note TEXT]

By chance (seeded) each step publishes a good snapshot, goes back to an earlier one, publishes one with a damaged file,
publishes one with a file missing, or begins to copy one in by hand and leaves it. Old versions are pruned meanwhile, so
the one that serves often has no files any more. Every answer is compared with the oracle of the version that it
names: there is a row only if none failed and none was wrong. It has the swaps, latencies, and how memory and file
handles grew.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.callers import PATIENCE, Heard, calling
from benchmarks.fault_world import METHOD, Oracle, ids_of, make_requests, snapshot_writer
from benchmarks.harness import WrongAnswerError, append_rows, environment
from benchmarks.server_process import Series, ServerProcess, serving_process
from retrieval.rpc.client import RetrievalClient
from retrieval.snapshot.manifest import MANIFEST, version_number
from retrieval.snapshot.registry import Registry

__all__ = ["Swapper", "half_uploaded"]

_RESULTS = Path(__file__).parent / "results"
_POLL_SECONDS, _REQUESTS, _KEPT, _PRUNED_EVERY = 0.05, 48, 6, 10
_STEPS = {"good": 6, "back": 2, "damaged": 1, "incomplete": 1, "half-uploaded": 1}


def half_uploaded(registry: Registry, chance: random.Random) -> Path:
    """A version that somebody copies in by hand, file by file, and does not finish; gives its folder."""
    last = registry.versions()[-1]
    folder = registry.folder(last).parent / f"{version_number(last) + 1:06d}-{chance.getrandbits(48):012x}"
    folder.mkdir()
    names = ["encoder.json", "encoder.safetensors", "vocabulary.arrow", "index.faiss"]
    for name in names[: chance.randrange(1, len(names))]:
        (folder / name).write_bytes(chance.randbytes(10_000))
        time.sleep(2 * _POLL_SECONDS)
    return folder


class Swapper:
    """Changes what a server serves.

    Args:
        registry: that it follows.
        server: the server.
        oracle: learns of every version.
        items: of each catalogue.
        seed: of what happens.

    Attributes:
        steps: how often each kind of step was made.
        seconds: from each change of CURRENT to the first answer of the new version.
    """

    def __init__(self, registry: Registry, server: ServerProcess, oracle: Oracle, items: int, seed: int = 0) -> None:
        self._registry, self._server, self._oracle, self._items = registry, server, oracle, items
        self._chance, self._seed = random.Random(seed), seed * 1_000_000
        self._client = RetrievalClient(server.address, timeout=PATIENCE)
        # The last one serves, whether or not it has files any more.
        self._good = [registry.current()]
        self._oldest = 0
        self.steps: Counter[str] = Counter()
        self.seconds: list[float] = []

    def close(self) -> None:
        """End its own client."""
        self._client.close()

    @property
    def swaps(self) -> int:
        """How often another version took over."""
        return self.steps["good"] + self.steps["back"]

    def step(self) -> None:
        """Make one change, or an attempt at one, and wait for what comes of it.

        Raises:
            WrongAnswerError: a bad version was served, or a good one was not.
        """
        kind = self._chance.choices(list(_STEPS), list(_STEPS.values()))[0]
        if kind == "back" and not self._earlier():
            kind = "good"
        self.steps[kind] += 1
        if kind == "good":
            self._goes_live(lambda: self._registry.publish(self._writer()))
        elif kind == "back":
            self._goes_live(self._back)
        elif kind == "half-uploaded":
            shutil.rmtree(half_uploaded(self._registry, self._chance))
            self._expect_live()
        else:
            self._is_refused(self._damage if kind == "damaged" else self._remove)
        if self.steps.total() % _PRUNED_EVERY == 0:
            self._registry.prune(_KEPT)
            self._oldest = version_number(self._registry.versions()[-_KEPT:][0])

    def _writer(self, spoil: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], bytes]:
        self._seed += 1
        return snapshot_writer(self._items, self._seed, spoil)

    def _earlier(self) -> list[str]:
        """Versions that one can go back to."""
        recent = [version for version in self._good[-_KEPT:-1] if version != self._good[-1]]
        return [version for version in recent if version_number(version) >= self._oldest]

    def _back(self) -> str:
        version = self._chance.choice(self._earlier())
        self._registry.activate(version)
        return version

    def _goes_live(self, change: Callable[[], str]) -> None:
        version = change()
        begun = time.monotonic()
        self._good.append(version)
        while self._client.serving_state().snapshot_version != version:
            if time.monotonic() - begun > PATIENCE:
                raise WrongAnswerError(f"{version} is not served; see {self._server.log}")
            time.sleep(0.01)
        self.seconds.append(time.monotonic() - begun)
        self._oracle.learn(version)

    def _is_refused(self, spoil: Callable[[Path], object]) -> None:
        name = 'retrieval_snapshot_loads_total{result="refused"}'
        before, begun = self._server.metrics()[name], time.monotonic()
        self._registry.publish(self._writer(spoil))
        while self._server.metrics()[name] == before:
            if time.monotonic() - begun > PATIENCE:
                raise WrongAnswerError(f"a bad version was not refused; see {self._server.log}")
            time.sleep(0.02)
        self._expect_live()

    def _expect_live(self) -> None:
        live = self._client.serving_state().snapshot_version
        if live != self._good[-1]:
            raise WrongAnswerError(f"{live} is served in place of {self._good[-1]}")

    def _damage(self, folder: Path) -> None:
        path = self._file(folder)
        content = bytearray(path.read_bytes())
        content[self._chance.randrange(len(content))] ^= 1 << self._chance.randrange(8)
        path.write_bytes(bytes(content[: self._chance.choice([len(content), len(content) // 2])]))

    def _remove(self, folder: Path) -> None:
        self._file(folder).unlink()

    def _file(self, folder: Path) -> Path:
        """One that the manifest names."""
        return self._chance.choice(sorted(path for path in folder.iterdir() if path.name != MANIFEST))


def measure(folder: Path, swaps: int, items: int, callers: int, pause: float) -> dict[str, object]:
    """The row.

    Raises:
        WrongAnswerError: a call failed, an answer is not its version's, or a bad version was served.
    """
    registry = Registry(folder / "registry")
    registry.publish(snapshot_writer(items, 0))
    oracle = Oracle(registry, make_requests(ids_of(items), _REQUESTS))
    oracle.learn(registry.current())
    series, heard = Series(), Heard()
    poll = ("--poll-seconds", str(_POLL_SECONDS))
    with (
        serving_process(folder / "registry", folder / "server.log", *poll) as server,
        calling(server.address, METHOD, oracle.messages, callers, pause) as load,
    ):
        swapper = Swapper(registry, server, oracle, items)
        while swapper.swaps < swaps:
            swapper.step()
            series.add(server.resources(), swaps=swapper.swaps)
            if swapper.steps.total() % 50 == 0:
                judge(oracle, heard, load.heard())
                print(f"{swapper.swaps} swaps, {len(heard.seconds)} answers right, {server.resources()}", flush=True)
        judge(oracle, heard, load.stop())
        server.wait_until_idle()
        swapper.close()
    series.write(folder / "swaps.csv")
    taken = sorted(swapper.seconds)
    return {
        "swaps": swapper.swaps,
        "refused": swapper.steps["damaged"] + swapper.steps["incomplete"],
        "half_uploaded": swapper.steps["half-uploaded"],
        "versions": len(oracle.versions),
        "items": items,
        "callers": callers,
        "answers": len(heard.seconds),
        "p50_ms": heard.milliseconds(0.5),
        "p99_ms": heard.milliseconds(0.99),
        "longest_ms": heard.milliseconds(1.0),
        "swap_p50_ms": 1000 * taken[len(taken) // 2],
        "swap_p99_ms": 1000 * taken[int(0.99 * len(taken))],
        **series.summary(),
    }


def judge(oracle: Oracle, heard: Heard, more: Heard, *, overloaded: bool = False) -> None:
    """Check what callers got, and keep the latencies.

    Args:
        oracle: that knows every version.
        heard: what was checked before; added to.
        more: what is to be checked.
        overloaded: whether the server had more calls than it takes, so that some may have been refused.

    Raises:
        WrongAnswerError: a call failed, or an answer is not its version's.
    """
    if any(not (overloaded and told.startswith("RESOURCE_EXHAUSTED")) for told in more.failures):
        raise WrongAnswerError(f"calls failed: {dict(more.failures)}")
    for number, content in more.answers:
        oracle.check(number, content)
    # Answers are many, and checked.
    more.answers.clear()
    heard.add(more)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between a caller's calls")
    parser.add_argument("--folder", type=Path, help="where log and series stay (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="appends nothing")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        row = measure(folder, parsed.swaps, parsed.items, parsed.callers, parsed.pause)
    print(*(f"{name}={value}" for name, value in row.items()))
    if not parsed.quick:
        append_rows(_RESULTS / "swaps.csv", [row | environment(torch.device("cpu")) | {"note": parsed.note}])


if __name__ == "__main__":
    main()
