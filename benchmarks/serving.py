"""Speed of the service beside an empty one and a plain one: a table row per catalogue, kind of query, server and load.

    python -m benchmarks.serving [--items 4000 100000 1000000] [--seconds 5] [--rounds 3] [--milvus PYTHON] [--quick]

Three servers, each a process of its own, answer the same messages from a process of its own (`benchmarks.load`):

    ours    `retrieval serve` as it comes
    empty   reads the message and sends a made-up answer of the same size: what Python's gRPC leaves to be reached
    plain   what one writes first: threads that each encode and search one call, with the same encoder and index

With --milvus, embeddings are also asked of milvus-lite by a Python that has it (`benchmarks.serving_milvus`), which
answers in its caller's process: its CPU time is both sides', and it has no open loop.

Queries are embeddings, or histories of 200 events that an encoder of 2 layers of width 50 reads; 100 items are asked
for. Up to 100 thousand items the index is exact, beyond that inverted lists of 8-bit codes, where the plain server
searches Faiss's lists of vectors around the same centres. Every answer of a sample must be that of exact search with
the reference kernels (of inverted lists: hold 90% of it), or nothing is printed. The loads:

    closed  64 callers, each waiting for its answer
    open    70% of the closed loop's rate, whatever is unanswered; latency counts from when a call was due
    single  one caller on an idle server

Rounds alternate between the servers, so that other work of the machine hits them alike; a row is the median round.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import grpc
import numpy as np
import torch

from benchmarks.harness import append_rows, environment
from benchmarks.load import Generator, Load, generator
from benchmarks.serving_world import EVENTS, K, Queries, check, make_queries, publish_world
from retrieval.data.sequences import gather_histories
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.index.lists import load_lists
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.server import SERVICE, ServerConfig, run_server
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.types import EventColumns

_RESULTS = Path(__file__).parent / "results" / "serving.csv"
_METHOD = f"/{SERVICE}/Retrieve"
_CALLERS, _CHECKED, _PLAIN_THREADS = 64, 32, 16
_SHARE_OF_PEAK = 0.7
_SERVERS = ("ours", "empty", "plain")


def _live(path: Path) -> Snapshot:
    registry = Registry(path)
    return open_snapshot(registry.folder(registry.current()))


def _serve_ours(path: Path, ready: Connection) -> None:
    run_server(ServerConfig(registry=path, port=0), on_ready=ready.send)


def _serve_empty(path: Path, ready: Connection) -> None:
    import asyncio

    import uvloop

    answer = pb.RetrieveResponse(snapshot_version="000001-0123456789ab", source=pb.SOURCE_MODEL)
    answer.items.integers.values.extend(range(1_000_000, 1_000_000 + K))
    answer.scores.extend(np.linspace(1, 0, K))

    async def handle(request: pb.RetrieveRequest, context: grpc.aio.ServicerContext) -> pb.RetrieveResponse:
        return answer

    async def serve() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_handlers(handle),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def _serve_plain(path: Path, ready: Connection) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    snapshot = _live(path)
    index = _plain_index(snapshot, path / snapshot.version)
    ids = snapshot.vocabulary.ids.to_numpy()
    row_of = {id_: row for row, id_ in enumerate(ids.tolist())}

    def handle(request: pb.RetrieveRequest, context: grpc.ServicerContext) -> pb.RetrieveResponse:
        if request.WhichOneof("user") == "embedding":
            query = np.array([request.embedding.values], np.float32)
        else:
            rows = np.array([row_of[id_] for id_ in request.history.items.integers.values])
            times = np.array(request.history.timestamps, np.int64)
            events = EventColumns(items=rows, actions=np.zeros(len(rows), np.uint8), timestamps=times)
            begin, end, now = (np.array([value]) for value in (0, len(rows), request.request_time))
            query = embed_users(snapshot.encoder, gather_histories(events, begin, end, now, EVENTS))
        scores, found = index.search(query, request.k)
        answer = pb.RetrieveResponse(snapshot_version=snapshot.version, source=pb.SOURCE_MODEL, scores=scores[0])
        answer.items.integers.values.extend(ids[found[0]].tolist())
        return answer

    server = grpc.server(ThreadPoolExecutor(_PLAIN_THREADS))
    server.add_generic_rpc_handlers((_handlers(handle),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready.send(f"127.0.0.1:{port}")
    server.wait_for_termination()


def _plain_index(snapshot: Snapshot, folder: Path) -> faiss.Index:
    spec, vectors = snapshot.manifest.index, item_vectors(snapshot.encoder)
    if spec.lists is None:
        return faiss.read_index(str(folder / "index.faiss"))
    centres = load_lists(folder / spec.file, spec.lists, vectors).centres
    # The stubs do not tell what kind of index a factory string makes.
    index: Any = faiss.index_factory(vectors.shape[1], f"IVF{len(centres)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(centres)
    index.is_trained = True
    index.add(vectors)
    index.nprobe = int(spec.search["nprobe"])
    return index


def _handlers(handle: Any) -> grpc.GenericRpcHandler:
    method = grpc.unary_unary_rpc_method_handler(
        handle, pb.RetrieveRequest.FromString, pb.RetrieveResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Retrieve": method})


@dataclass(frozen=True, slots=True)
class Running:
    """A server in a process of its own."""

    address: str
    process: int

    @property
    def cpu_seconds(self) -> float:
        """That it has used; Linux only."""
        # The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
        fields = Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _running(name: str, path: Path) -> Iterator[Running]:
    serve = {"ours": _serve_ours, "empty": _serve_empty, "plain": _serve_plain}[name]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(path, there), name=name)
    process.start()
    there.close()
    assert process.pid is not None
    try:
        yield Running(here.recv(), process.pid)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.join()


@dataclass(frozen=True, slots=True)
class Figure:
    """A load and what it cost the server."""

    load: Load
    server_cpu: float
    offered: float

    @property
    def row(self) -> dict[str, object]:
        """Its columns of the table."""
        load = self.load
        answered = max(len(load.latencies), 1)
        p50, p99, p999 = (1000 * load.quantile(share) for share in (0.5, 0.99, 0.999))
        return {
            "offered_per_s": self.offered,
            "calls_per_s": load.rate,
            "p50_ms": p50,
            "p99_ms": p99,
            "p999_ms": p999,
            "failed": load.codes.total(),
            "server_cpu_us": 1e6 * self.server_cpu / answered,
            "client_cpu_us": 1e6 * load.cpu_seconds / answered,
        }


def _measure(running: Running, sender: Generator, queries: Queries, load: str, rate: float, seconds: float) -> Figure:
    before = running.cpu_seconds
    if load == "open":
        result = sender.open(running.address, _METHOD, queries.messages, rate, seconds)
    else:
        callers = _CALLERS if load == "closed" else 1
        result = sender.closed(running.address, _METHOD, queries.messages, callers, seconds)
    return Figure(result, running.cpu_seconds - before, rate if load == "open" else math.nan)


def _median(figures: list[Figure]) -> Figure:
    """The one of the median rate, of open loops of the median 99th percentile."""
    key = (lambda one: one.load.rate) if math.isnan(figures[0].offered) else (lambda one: one.load.quantile(0.99))
    return sorted(figures, key=key)[len(figures) // 2]


def measure(
    snapshot: Snapshot, path: Path, kind: str, sender: Generator, seconds: float, rounds: int
) -> list[dict[str, object]]:
    """Rows of one catalogue and kind of query.

    Raises:
        WrongAnswerError: a server does not answer as exact search does.
    """
    queries = make_queries(snapshot, kind)
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_running(name, path)) for name in _SERVERS}
        for name, running in servers.items():
            answers = sender.answers(running.address, _METHOD, queries.messages[:_CHECKED])
            if name != "empty":
                check(f"{name}, {kind}, {len(snapshot.vocabulary)} items", snapshot, queries, answers)
            sender.closed(running.address, _METHOD, queries.messages, _CALLERS, min(1.0, seconds))
        peak: dict[str, float] = {}
        for load in ("closed", "open", "single"):
            figures: dict[str, list[Figure]] = {name: [] for name in _SERVERS}
            for _ in range(rounds):
                for name, running in servers.items():
                    rate = _SHARE_OF_PEAK * peak.get(name, math.nan)
                    figures[name].append(_measure(running, sender, queries, load, rate, seconds))
            medians = {name: _median(figures[name]) for name in _SERVERS}
            if load == "closed":
                peak = {name: figure.load.rate for name, figure in medians.items()}
            for name, figure in medians.items():
                columns = {"query": kind, "items": len(snapshot.vocabulary), "index": str(snapshot.manifest.index)}
                share = figure.load.rate / medians["empty"].load.rate if load == "closed" else math.nan
                rows.append({**columns, "server": name, "load": load, **figure.row, "share_of_empty": share})
                print(_line(rows[-1]), flush=True)
    return rows


def measure_milvus(
    python: Path, snapshot: Snapshot, queries: Queries, seconds: float, empty: float
) -> list[dict[str, object]]:
    """Rows of milvus-lite under embeddings; `empty` is the empty server's rate in this run.

    Raises:
        WrongAnswerError: it does not answer as exact search does.
        CalledProcessError: it cannot run.
    """
    ids, is_exact = snapshot.vocabulary.ids.to_numpy(), snapshot.manifest.index.factory == "Flat"
    index = "FLAT" if is_exact else "IVF_FLAT"
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "vectors.npy", item_vectors(snapshot.encoder))
        np.save(Path(folder) / "queries.npy", queries.embeddings)
        script = Path(__file__).with_name("serving_milvus.py")
        command = [str(python), str(script), folder, index, str(_CALLERS), str(math.ceil(seconds)), str(K)]
        printed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
    answers = []
    for hits in printed["answers"]:
        rows, scores = zip(*hits, strict=True)
        answer = pb.RetrieveResponse(scores=scores, source=pb.SOURCE_MODEL)
        answer.items.integers.values.extend(ids[list(rows)].tolist())
        answers.append(answer.SerializeToString())
    check(f"milvus-lite, {len(ids)} items", snapshot, queries, answers)
    table: list[dict[str, object]] = []
    for load in ("closed", "single"):
        figures = printed[load]
        row: dict[str, object] = {
            "query": "embedding",
            "items": len(ids),
            "index": index,
            "server": "milvus",
            "load": load,
        }
        row |= {"offered_per_s": math.nan, "calls_per_s": figures["rate"]}
        row |= {f"{name}_ms": 1000 * figures[name] for name in ("p50", "p99", "p999")}
        row |= {"failed": 0, "server_cpu_us": 1e6 * figures["cpu"], "client_cpu_us": math.nan}
        table.append({**row, "share_of_empty": figures["rate"] / empty if load == "closed" else math.nan})
        print(_line(table[-1]), flush=True)
    return table


def _line(row: dict[str, Any]) -> str:
    share = f", {row['share_of_empty']:.0%} of empty" if row["load"] == "closed" else ""
    return (
        f"{row['query']:9} {row['items']:8} {row['server']:6} {row['load']:6} "
        f"{row['calls_per_s']:7.0f} calls/s{share}, "
        f"p50 {row['p50_ms']:.2f} p99 {row['p99_ms']:.2f} p99.9 {row['p999_ms']:.2f} ms, "
        f"CPU {row['server_cpu_us']:.0f} µs a call (client {row['client_cpu_us']:.0f}), {row['failed']} failed"
    )


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[4_000, 100_000, 1_000_000])
    parser.add_argument("--queries", nargs="+", choices=["embedding", "history"], default=["embedding", "history"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--milvus", type=Path, metavar="PYTHON", help="a Python with pymilvus and milvus-lite")
    parser.add_argument("--quick", action="store_true", help="4 000 items, one short round, nothing appended")
    parser.add_argument("--folder", type=Path, help="where catalogues are kept for another run (default: nowhere)")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.items, parsed.seconds, parsed.rounds = [4_000], 1.0, 1
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary, generator() as sender:
        for items in parsed.items:
            path = (parsed.folder or Path(temporary)) / str(items)
            if not path.is_dir():
                publish_world(Registry(path), items)
            snapshot = _live(path)
            for kind in parsed.queries:
                rows += measure(snapshot, path, kind, sender, parsed.seconds, parsed.rounds)
                if kind == "embedding" and parsed.milvus is not None:
                    of_empty = [row for row in rows if row["server"] == "empty" and row["load"] == "closed"]
                    empty = float(str(of_empty[-1]["calls_per_s"]))
                    rows += measure_milvus(parsed.milvus, snapshot, make_queries(snapshot, kind), parsed.seconds, empty)
    if not parsed.quick:
        tail = {"callers": _CALLERS, "k": K, "grpc": grpc.__version__, **environment(torch.device("cpu"))}
        append_rows(_RESULTS, [{**row, **tail, "cores": os.cpu_count(), "note": parsed.note} for row in rows])


if __name__ == "__main__":
    main()
