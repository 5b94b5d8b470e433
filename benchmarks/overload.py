"""Three times as many calls as the server can answer, for a minute: what it still answers, and how it refuses the rest.

    python -m benchmarks.overload [--seconds 60] [--times 3] [--queries history] [--items 100000] [--note TEXT]

Several client processes on cores of their own, the server on the others, so that the overload is the server's and not
the machine's. Peak: callers who wait for their answers, many. Then an open loop at a multiple of that, with a deadline
for every call; then 70% of the peak at once. Goodput counts answers within their deadline; refusals are timed by the
client from when the call was sent, and by the server from when its bytes were there. Answers are checked against exact
search before anything is printed.
"""

import argparse
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import torch

from benchmarks.harness import append_rows, environment
from benchmarks.load import Generator, Load, generator
from benchmarks.server_process import Series, ServerProcess, serving_process
from benchmarks.serving_world import Queries, check, make_queries, publish_world
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

_RESULTS = Path(__file__).parent / "results" / "overload.csv"
_METHOD = "/retrieval.v1.RetrievalService/Retrieve"
_CLIENTS, _CALLERS, _CHECKED = 3, 96, 32
_DEADLINE = 1.0
_SHARE_AFTER = 0.7
_REFUSED = 'retrieval_call_seconds_bucket{code="RESOURCE_EXHAUSTED",le="%s",method="Retrieve"}'


def _together(loads: Sequence[Load]) -> Load:
    """What several clients saw in the same time."""
    return Load(
        seconds=max(load.seconds for load in loads),
        latencies=[seconds for load in loads for seconds in load.latencies],
        refused=[seconds for load in loads for seconds in load.refused],
        unsent=sum(load.unsent for load in loads),
        codes=sum((load.codes for load in loads), Counter()),
        cpu_seconds=sum(load.cpu_seconds for load in loads),
    )


class Clients:
    """Several generators at once."""

    def __init__(self, senders: Sequence[Generator], server: ServerProcess, queries: Queries) -> None:
        self._senders, self._server, self._queries = senders, server, queries
        self._threads = ThreadPoolExecutor(len(senders))

    def _all(self, send: Callable[[Generator], Load]) -> Load:
        return _together(list(self._threads.map(send, self._senders)))

    def peak(self, seconds: float) -> Load:
        """Callers who each wait for their answer."""
        callers, (address, messages) = _CALLERS // len(self._senders), (self._server.address, self._queries.messages)
        return self._all(lambda sender: sender.closed(address, _METHOD, messages, callers, seconds))

    def open(self, rate: float, seconds: float, *, throttled: bool) -> Load:
        """So many calls per second in all, whatever becomes of them."""
        share, (address, messages) = rate / len(self._senders), (self._server.address, self._queries.messages)
        return self._all(
            lambda sender: sender.open(address, _METHOD, messages, share, seconds, _DEADLINE, throttled=throttled)
        )


def _server_quantile(before: dict[str, float], after: dict[str, float], share: float) -> float:
    """Upper bound in seconds of what this share of the refusals took the server: of the histogram's bucket."""
    prefix, suffix = _REFUSED.split("%s")
    bounds = {
        float(name.removeprefix(prefix).removesuffix(suffix)): value - before.get(name, 0.0)
        for name, value in after.items()
        if name.startswith(prefix)
    }
    total = bounds.get(math.inf, 0.0)
    return min((bound for bound, count in bounds.items() if total and count >= share * total), default=math.nan)


def _row(load: Load, peak: float) -> dict[str, object]:
    refused = np.array(load.refused or [math.nan]) * 1000
    good = sum(seconds <= _DEADLINE for seconds in load.latencies) / load.seconds
    other = load.codes.total() - len(load.refused)
    return {
        "goodput_per_s": good,
        "share_of_peak": good / peak,
        "p50_ms": 1000 * load.quantile(0.5),
        "p99_ms": 1000 * load.quantile(0.99),
        "refused_per_s": len(load.refused) / load.seconds,
        "unsent_per_s": load.unsent / load.seconds,
        "failed_otherwise": other,
        "refusal_p50_ms": float(np.quantile(refused, 0.5)),
        "refusal_p99_ms": float(np.quantile(refused, 0.99)),
    }


def measure(
    folder: Path, items: int, kind: str, times: float, seconds: float, *, throttled: bool
) -> list[dict[str, object]]:
    """Rows of peak, overload and what follows.

    Raises:
        WrongAnswerError: an answer is not exact search's, or a slot stayed taken.
    """
    registry = Registry(folder / "registry")
    publish_world(registry, items)
    queries = make_queries(snapshot := open_snapshot(registry.folder(registry.current())), kind)
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = cores[: len(cores) // 2] or cores, cores[len(cores) // 2 :]
    series, done = Series(), threading.Event()
    with ExitStack() as stack:
        server = stack.enter_context(serving_process(folder / "registry", folder / "server.log", cores=ours))
        os.sched_setaffinity(0, theirs)
        senders = [stack.enter_context(generator()) for _ in range(_CLIENTS)]
        check(kind, snapshot, queries, senders[0].answers(server.address, _METHOD, queries.messages[:_CHECKED]))
        clients = Clients(senders, server, queries)
        clients.peak(min(2.0, seconds))

        def watch() -> None:
            while not done.wait(0.5):
                series.add(server.resources())

        stack.callback(done.set)
        threading.Thread(target=watch).start()
        first = clients.peak(min(10.0, seconds))
        peak, before, cpu = first.rate, server.metrics(), server.cpu_seconds
        over = clients.open(times * peak, seconds, throttled=throttled)
        busy, after = (server.cpu_seconds - cpu) / over.seconds, server.metrics()
        begun = time.monotonic()
        later = clients.open(_SHARE_AFTER * peak, min(10.0, seconds), throttled=throttled)
        assert time.monotonic() - begun < 2 * min(10.0, seconds) + 5
        server.wait_until_idle()
        done.set()
    series.write(folder / "overload.csv")
    at_server = {"server_refusal_p99_ms": 1000 * _server_quantile(before, after, 0.99), "server_cores_busy": busy}
    nothing = dict.fromkeys(at_server, math.nan)
    head = {"query": kind, "items": items, "clients": _CLIENTS, "throttled": throttled, "times": times}
    head["seconds"] = seconds
    return [
        head | {"load": name, **_row(load, peak), **(at_server if load is over else nothing), **series.summary()}
        for name, load in (("peak", first), ("overload", over), ("after", later))
    ]


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    parser.add_argument("--times", type=float, default=3.0, help="of the peak")
    parser.add_argument("--queries", choices=["history", "embedding"], default="history")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--bare", action="store_true", help="clients without our library's throttle")
    parser.add_argument("--folder", type=Path, help="where log and series stay (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="appends nothing")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, parsed.items, parsed.queries, parsed.times, parsed.seconds, throttled=not parsed.bare)
    for row in rows:
        print(
            *(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items())
        )
    if not parsed.quick:
        where = {"grpc": grpc.__version__, **environment(torch.device("cpu")), "cores": os.cpu_count()}
        append_rows(_RESULTS, [row | where | {"note": parsed.note} for row in rows])


if __name__ == "__main__":
    main()
