"""A hundred thousand malformed and hostile requests, and rubbish below gRPC: refused, while others are served right.

    python -m benchmarks.fuzz [--requests 100000] [--connections 2000] [--seed 0] [--note TEXT]

Every method gets messages that hypothesis makes from its descriptor, good messages with fields and bytes spoilt, plain
noise, and a few monsters. Then come plain sockets: bad prefaces, frames and headers, floods, connections that stop half
way, readers that take nothing, storms of cancelled calls. Throughout, honest callers ask for what an oracle knows,
among it the histories of stored users whose names, events and actions no other answer may ever show.

There is a row only if no call ended with a code that is the server's fault, the oracle found nothing, nothing of the
stored users was seen, and in the end no slot, connection or file handle was still taken.
"""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from benchmarks.callers import PATIENCE, Heard, calling
from benchmarks.fault_world import METHOD, NOW, WIDTH, Oracle, ids_of, make_requests, snapshot_writer
from benchmarks.harness import WrongAnswerError, append_rows, environment
from benchmarks.server_process import Series, ServerProcess, free_port, serving_process
from benchmarks.swaps import judge
from retrieval.histories.event import Event
from retrieval.histories.recorded import open_histories
from retrieval.rpc._generated.retrieval.v1 import admin_pb2
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import History, StoredUser
from retrieval.rpc.convert import retrieve_request_to
from retrieval.rpc.requests import RetrieveRequest
from retrieval.snapshot.registry import Registry
from tests.rpc import hostile, http2

__all__ = ["cancel_storm", "honest_calls", "hostile_requests", "send_all"]

_RESULTS = Path(__file__).parent / "results"
_ITEMS, _REQUESTS, _SECRET_USERS, _CHUNK, _AT_ONCE, _ADMINS = 5_000, 24, 8, 2_000, 24, 4
_SECRET = "canary"
_SERVICE = pb.DESCRIPTOR.services_by_name["RetrievalService"]
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
# What a caller's mistakes may end with; also what is too large or too much.
_THE_CALLERS = frozenset(
    ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "ABORTED")
)
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


Good = Mapping[str, Sequence[Message]]
"""By method, what an honest caller sends."""


def honest_calls(ids: Sequence[int]) -> Good:
    """Messages of the service, to be spoilt."""
    retrieves = [retrieve_request_to(one) for one in make_requests(np.array(ids), 12, seed=3)]
    history = next(one.history for one in retrieves if one.history.timestamps)
    filter_ = {"all": {"filters": [{"compare": {"attribute": "events", "operator": 4, "value": {"integer": 100}}}]}}
    stored: dict[str, Any] = {
        "stored_user": {"integer": 5},
        "fresh_events": history,
        "filter": filter_,
        "include_titles": True,
        "k": 9,
    }
    users: list[Any] = [{"history": history}, {"stored_user": {"string": "5"}, "fresh_events": history}]
    events = [
        {
            "user_id": {"integer": user},
            "item_id": {"integer": item},
            "action": "like",
            "timestamp": NOW,
            "event_id": "e",
        }
        for user, item in zip(range(5), ids, strict=False)
    ]
    retrieves.append(pb.RetrieveRequest(**stored))
    return {
        "Retrieve": retrieves,
        "BatchRetrieve": [pb.BatchRetrieveRequest(requests=retrieves[at : at + 3]) for at in range(0, 12, 3)],
        "EmbedUsers": [pb.EmbedUsersRequest(users=users, request_time=NOW)],
        "RecordEvents": [pb.RecordEventsRequest(events=events)],
        "GetServingState": [pb.GetServingStateRequest()],
    }


def _admin_calls(versions: Sequence[str]) -> Good:
    return {
        "ListSnapshots": [admin_pb2.ListSnapshotsRequest()],
        "ActivateSnapshot": [admin_pb2.ActivateSnapshotRequest(version=version) for version in versions],
        "RollbackSnapshot": [admin_pb2.RollbackSnapshotRequest()],
        "RefreshSnapshot": [admin_pb2.RefreshSnapshotRequest()],
    }


def hostile_requests(good: Good, near: Sequence[int], count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, method and message, about so many; a tenth of them by hypothesis."""
    chance = random.Random(seed)
    # Those without fields have little to be wrong.
    names = [name for name, messages in good.items() for _ in range(4 if messages[0].DESCRIPTOR.fields else 1)]
    for begun in range(0, count, _CHUNK):
        size = min(_CHUNK, count - begun)
        name = names[begun // _CHUNK % len(names)]
        for message in hostile.structured(type(good[name][0]), near, size // 10, seed + begun):
            yield "structured", name, message
        for name in names:
            for message in hostile.spoilt(good[name], near, size * 8 // 10 // len(names), chance.getrandbits(64)):
                # Now and then where it does not belong.
                yield "spoilt", name if chance.random() < 0.95 else chance.choice(names), message
        for _ in range(size // 10):
            yield "noise", chance.choice(names), chance.randbytes(int(chance.expovariate(1 / 40)))


class Judge:
    """Sends what is hostile, and says what is wrong with the answer."""

    def __init__(self, channel: grpc.aio.Channel, service: ServiceDescriptor) -> None:
        self._methods = {name: channel.unary_unary(f"/{service.full_name}/{name}") for name in service.methods_by_name}
        self.codes: Counter[tuple[str, str, str]] = Counter()

    async def send(self, kind: str, method: str, message: bytes) -> None:
        """One request.

        Raises:
            WrongAnswerError: the server is at fault.
        """
        code, told, content = "OK", "", b""
        try:
            content = await self._methods[method](message, timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            told = f"{error.details()} {error.trailing_metadata()} {error.initial_metadata()}"
        self.codes[kind, method, code] += 1
        if code not in _THE_CALLERS:
            raise WrongAnswerError(f"{method} ended with {code} ({told}) for {message[:2000]!r}")
        if _SECRET in told or _SECRET.encode() in content:
            raise WrongAnswerError(f"{method} shows what is another's: {told} {content[:500]!r} for {message[:2000]!r}")
        if code == "OK":
            _check_shape(method, message, content)


def _check_shape(method: str, message: bytes, content: bytes) -> None:
    """An answer to whatever it is must still be one.

    Raises:
        WrongAnswerError: it is not.
    """
    if method == "Retrieve":
        request, answer = pb.RetrieveRequest.FromString(message), pb.RetrieveResponse.FromString(content)
        items = answer.items.integers.values
        excluded = set(request.exclude.integers.values)
        right = (
            len(items) == len(answer.scores) == len(set(items)) == request.k - answer.shortfall
            and all(-1.001 <= score <= 1.001 for score in answer.scores)
            and not excluded.intersection(items)
            and list(answer.scores) == sorted(answer.scores, reverse=True)
        )
    elif method == "EmbedUsers":
        users = len(pb.EmbedUsersRequest.FromString(message).users)
        embedded = pb.EmbedUsersResponse.FromString(content)
        norms = [
            sum(value * value for value in embedded.values[at : at + embedded.width])
            for at in range(0, len(embedded.values), embedded.width)
        ]
        right = len(norms) == users and all(norm == 0 or abs(norm - 1) < 1e-4 for norm in norms)
    else:
        right = True
    if not right:
        raise WrongAnswerError(f"{method} answered {content[:2000]!r} to {message[:2000]!r}")


async def send_all(
    address: str, service: ServiceDescriptor, requests: Iterator[tuple[str, str, bytes]], at_once: int
) -> Counter[tuple[str, str, str]]:
    """Send hostile requests, so many at once; gives how they ended, by kind, method and code.

    Raises:
        WrongAnswerError: the server is at fault.
    """
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        judge_ = Judge(channel, service)

        async def worker() -> None:
            for kind, method, message in requests:
                await judge_.send(kind, method, message)

        await asyncio.gather(*(worker() for _ in range(at_once)))
        return judge_.codes


async def cancel_storm(address: str, message: bytes, calls: int, seed: int) -> Counter[str]:
    """Calls that are given up after 0 to 5 ms."""
    chance, ended = random.Random(seed), Counter[str]()
    async with grpc.aio.insecure_channel(address) as channel:
        ask = channel.unary_unary(METHOD)

        async def one() -> None:
            call = ask(message, timeout=30)
            await asyncio.sleep(chance.uniform(0, 0.005))
            call.cancel()
            try:
                await call
                ended["OK"] += 1
            except asyncio.CancelledError:
                ended["cancelled"] += 1
            except grpc.aio.AioRpcError as error:
                ended[error.code().name] += 1

        for begun in range(0, calls, 200):
            await asyncio.gather(*(one() for _ in range(min(200, calls - begun))))
    return ended


def below_grpc(server: ServerProcess, messages: Sequence[bytes], connections: int, seed: int) -> None:
    """Rubbish on plain sockets; afterwards nothing of it is left.

    Raises:
        WrongAnswerError: a slot or a handle stayed taken.
    """
    before = server.resources().handles
    chance = random.Random(seed)
    for number in range(connections):
        name = list(http2.ATTACKS)[number % len(http2.ATTACKS)]
        http2.attack(server.address, http2.ATTACKS[name](chance, METHOD, chance.choice(messages)))
        if number % 200 == 0:
            server.check_log()
    print(f"{connections} attacks on sockets: {server.resources()}", flush=True)
    large = pb.RetrieveRequest(embedding={"values": [1.0] * WIDTH}, k=_ITEMS, include_titles=True).SerializeToString()
    held = http2.half_open(server.address, METHOD, messages[0], 200)
    held += [http2.slow_reader(server.address, METHOD, large, 100) for _ in range(10)]
    # While they are there, and take nothing.
    server.wait_until_idle()
    print(f"{len(held)} connections hang: {server.resources()}", flush=True)
    for connection in held:
        connection.close()
    ended = asyncio.run(cancel_storm(server.address, messages[1], 5_000, seed))
    print(f"cancelled calls: {dict(ended)}", flush=True)
    server.wait_until_idle()
    end = time.monotonic() + 30
    while server.resources().handles > before + 5:
        if time.monotonic() > end:
            raise WrongAnswerError(f"{server.resources().handles} handles are open, {before} were at first")
        time.sleep(0.2)


def _secrets(folder: Path, ids: Sequence[int]) -> dict[int | str, History]:
    """Stores histories that no answer may show; gives them."""
    chance = random.Random(9)
    held: dict[int | str, History] = {}
    events = []
    for number in range(_SECRET_USERS):
        user, items = f"{_SECRET}-{number}", chance.sample(list(ids), 30)
        times = sorted(NOW - chance.randrange(5_000_000) for _ in items)
        held[user] = History(items, times)
        for at, (item, time_) in enumerate(zip(items, times, strict=True)):
            told = f"{_SECRET}-{at}"
            events.append(Event(user_id=user, item_id=item, action=_SECRET, timestamp=time_, event_id=told))
    with closing(open_histories(str(folder))) as store:
        store.append(events).result()
    return held


def measure(folder: Path, count: int, connections: int, seed: int) -> list[dict[str, object]]:
    """Rows by kind of request and method.

    Raises:
        WrongAnswerError: the server is at fault somewhere.
    """
    registry = Registry(folder / "registry")
    versions = [registry.publish(snapshot_writer(_ITEMS, seed)) for seed in range(3)]
    ids = ids_of(_ITEMS)
    secrets = _secrets(folder / "histories", ids.tolist())
    requests = make_requests(ids, _REQUESTS)
    requests += [RetrieveRequest(user=StoredUser(user), k=20, request_time=NOW) for user in secrets]
    oracle = Oracle(registry, requests, secrets)
    for version in versions:
        oracle.learn(version)
    series, heard = Series(), Heard()
    options = ("--histories", str(folder / "histories"), "--admin-port", str(admin_port := free_port()))
    with (
        serving_process(folder / "registry", folder / "server.log", *options) as server,
        calling(server.address, METHOD, oracle.messages, 2, 0.02) as honest,
    ):
        begun, codes = time.monotonic(), Counter[tuple[str, str, str]]()
        near = ids[:20].tolist()
        monsters = (("monster", method, message) for method, message in hostile.monsters(near, WIDTH))
        source = itertools.chain(monsters, hostile_requests(honest_calls(near), near, count, seed))
        while chunk := list(itertools.islice(source, _CHUNK)):
            codes += asyncio.run(send_all(server.address, _SERVICE, iter(chunk), _AT_ONCE))
            judge(oracle, heard, honest.heard())
            series.add(server.resources(), requests=codes.total())
            print(f"{codes.total()} requests, {server.resources()}", flush=True)
        requests_of_admins = hostile_requests(_admin_calls(versions), near, count // 50, seed)
        codes += asyncio.run(send_all(f"127.0.0.1:{admin_port}", _ADMIN, requests_of_admins, _ADMINS))
        seconds = time.monotonic() - begun
        server.wait_until_idle()
        judge(oracle, heard, honest.heard())
        below_grpc(server, oracle.messages, connections, seed)
        # Readers that take nothing and calls that are given up come by the hundreds at once.
        judge(oracle, heard, honest.stop(), overloaded=True)
        _check_metrics(server)
    series.write(folder / "fuzz.csv")
    print(f"{codes.total()} requests in {seconds:.0f} s; {len(heard.seconds)} honest answers, all right")
    tail: dict[str, Any] = {"honest_answers": len(heard.seconds), "connections": connections, "seed": seed}
    rows = [{"kind": kind, "method": method, "code": code, "calls": n} for (kind, method, code), n in codes.items()]
    return [row | tail for row in sorted(rows, key=lambda row: [str(value) for value in row.values()])]


def _check_metrics(server: ServerProcess) -> None:
    """The server's own view of how calls ended.

    Raises:
        WrongAnswerError: one ended by its own fault.
    """
    for name, value in server.metrics().items():
        if value and ('code="INTERNAL"' in name or 'code="UNKNOWN"' in name or 'reason="INTERNAL"' in name):
            raise WrongAnswerError(f"{name} is {value}")


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--connections", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where log and series stay (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="appends nothing")
    parser.add_argument("--note", default="", help="kept in the table")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, parsed.requests, parsed.connections, parsed.seed)
    for row in rows:
        print(*row.values())
    if not parsed.quick:
        where = environment(torch.device("cpu")) | {"note": parsed.note}
        append_rows(_RESULTS / "fuzz.csv", [row | where for row in rows])


if __name__ == "__main__":
    main()
