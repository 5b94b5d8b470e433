"""Whether a second process, or fewer and larger calls, let two cores answer more queries: a table row per arrangement.

    python -m benchmarks.front_ends [--items 100000] [--seconds 4] [--rounds 3] [--quick] [--note TEXT]

Server processes and callers share the machine's cores. Queries are ready embeddings, for which decoding and answering
weigh most; 100 items are asked for; the index is exact up to 100 thousand items.

    one     a server and 64 callers of Retrieve
    two     two whole servers, 32 callers of each: more than front ends before one worker could gain, which would have
            to hand every query on besides
    batch   a server and 4 callers of BatchRetrieve with 32 requests in each call

Answers are compared with exact search first. Rounds alternate between the arrangements; a row is the median round.
"""

import argparse
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.harness import append_rows, environment
from benchmarks.load import Generator, generator
from benchmarks.serving_world import check, make_queries, publish_world
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.server import SERVICE, ServerConfig, run_server
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

_RESULTS = Path(__file__).parent / "results" / "front_ends.csv"
_ONE, _MANY = f"/{SERVICE}/Retrieve", f"/{SERVICE}/BatchRetrieve"
_CALLERS, _BATCH_CALLERS, _BATCH, _CHECKED = 64, 4, 32, 32


def _serve(path: Path, ready: Connection) -> None:
    run_server(ServerConfig(registry=path, port=0), on_ready=ready.send)


@contextmanager
def _server(path: Path) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(path, there))
    process.start()
    there.close()
    assert process.pid is not None
    try:
        yield here.recv(), process.pid
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.join()


def _cpu_seconds(process: int) -> float:
    # The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _together(messages: list[bytes]) -> list[bytes]:
    """The same requests, 32 to a call."""
    calls = []
    for start in range(0, len(messages), _BATCH):
        call = pb.BatchRetrieveRequest()
        for message in messages[start : start + _BATCH]:
            call.requests.add().MergeFromString(message)
        calls.append(call.SerializeToString())
    return calls


def _asked(
    senders: list[Generator], addresses: list[str], method: str, messages: list[bytes], callers: int, seconds: float
) -> tuple[float, float, float]:
    """Queries per second, median milliseconds of a call, and failed calls, over all addresses at once."""
    with ThreadPoolExecutor(len(addresses)) as pool:
        loads = list(
            pool.map(
                lambda pair: pair[0].closed(pair[1], method, messages, callers // len(addresses), seconds),
                zip(senders, addresses, strict=False),
            )
        )
    queries = _BATCH if method == _MANY else 1
    rate = sum(load.rate for load in loads) * queries
    return rate, 1000 * loads[0].quantile(0.5), float(sum(load.codes.total() for load in loads))


def measure(path: Path, items: int, seconds: float, rounds: int) -> list[dict[str, object]]:
    """Rows of one catalogue.

    Raises:
        WrongAnswerError: a server does not answer as exact search does.
    """
    registry = Registry(path)
    snapshot = open_snapshot(registry.folder(registry.current()))
    queries = make_queries(snapshot, "embedding")
    together = _together(queries.messages)
    with ExitStack() as stack:
        servers = [stack.enter_context(_server(path)) for _ in range(2)]
        senders = [stack.enter_context(generator()) for _ in range(2)]
        for address, _ in servers:
            check(address, snapshot, queries, senders[0].answers(address, _ONE, queries.messages[:_CHECKED]))
        (batch,) = senders[0].answers(servers[0][0], _MANY, together[:1])
        answers = [one.response.SerializeToString() for one in pb.BatchRetrieveResponse.FromString(batch).results]
        check("batch", snapshot, queries, answers)
        arrangements = {
            "one": (servers[:1], _ONE, queries.messages, _CALLERS),
            "two": (servers, _ONE, queries.messages, _CALLERS),
            "batch": (servers[:1], _MANY, together, _BATCH_CALLERS),
        }
        found: dict[str, list[dict[str, object]]] = {name: [] for name in arrangements}
        for _ in range(rounds):
            for name, (used, method, messages, callers) in arrangements.items():
                before = sum(_cpu_seconds(process) for _, process in used)
                addresses = [address for address, _ in used]
                rate, p50, failed = _asked(senders, addresses, method, messages, callers, seconds)
                cpu = sum(_cpu_seconds(process) for _, process in used) - before
                figures = {"queries_per_s": rate, "call_p50_ms": p50, "server_cpu_us": 1e6 * cpu / (rate * seconds)}
                found[name].append({"items": items, "arrangement": name, **figures, "failed": failed})
    rows = []
    for several in found.values():
        row = sorted(several, key=lambda row: float(str(row["queries_per_s"])))[len(several) // 2]
        print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[4_000, 100_000])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 000 items, one short round, nothing appended")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.items, parsed.seconds, parsed.rounds = [4_000], 1.0, 1
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for items in parsed.items:
            path = Path(temporary) / str(items)
            publish_world(Registry(path), items)
            rows += measure(path, items, parsed.seconds, parsed.rounds)
    if not parsed.quick:
        tail = {**environment(torch.device("cpu")), "cores": os.cpu_count(), "note": parsed.note}
        append_rows(_RESULTS, [{**row, **tail} for row in rows])


if __name__ == "__main__":
    main()
