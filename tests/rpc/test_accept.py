"""Calls are taken ahead of the event loop, and none that was taken is lost when the server stops."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from retrieval.rpc.loop import new_event_loop
from retrieval.rpc.port import Port

METHOD = "/test.Service/Answer"


@contextmanager
def serving(answer: Callable[[Port, bytes], Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """A port on a thread; gives its address, and what begins to stop it."""
    loop, started, stop = new_event_loop(), threading.Event(), asyncio.Event()
    addresses: list[str] = []

    async def serve() -> None:
        port = Port("127.0.0.1", 0, None)

        async def call(content: bytes, context: object) -> bytes:
            await answer(port, content)
            return content

        method = grpc.unary_unary_rpc_method_handler(call)
        port.offer("test.Service", grpc.method_handlers_generic_handler("test.Service", {"Answer": method}))
        await port.start()
        addresses.append(port.address)
        started.set()
        await stop.wait()
        await port.stop(10.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    started.wait()
    try:
        yield addresses[0], lambda: loop.call_soon_threadsafe(stop.set)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def ask(address: str, calls: int) -> Counter[str]:
    """How so many calls at once end."""
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(METHOD)

        async def one(number: int) -> str:
            try:
                answer = await method(b"%d" % number, timeout=10)
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "right" if answer == b"%d" % number else "wrong"

        return Counter(await asyncio.gather(*map(one, range(calls))))


def test_while_the_loop_works_calls_are_taken() -> None:
    taken: list[int] = []

    async def answer(port: Port, content: bytes) -> None:
        if taken:
            return
        # The loop does nothing else meanwhile.
        time.sleep(0.5)
        for _ in range(30):
            taken.append(port._server._server._kinds[None].waiting)
            await asyncio.sleep(0)

    with serving(answer) as (address, _):
        assert asyncio.run(ask(address, 64)) == {"right": 64}
    assert max(taken) >= 8, "of 63 calls that waited, so many were the server's when the loop came to them"


def test_calls_that_were_taken_are_answered_by_a_server_that_stops() -> None:
    begun: list[bytes] = []

    async def answer(port: Port, content: bytes) -> None:
        if not begun:
            begun.append(content)
            time.sleep(0.3)
            stop()
            return
        begun.append(content)
        await asyncio.sleep(0.1)

    with serving(answer) as (address, stop):
        ended = asyncio.run(ask(address, 12))
    assert ended["right"] == len(begun) >= 8, ended
    # What the server had not taken is refused by gRPC itself.
    assert set(ended) <= {"right", "UNAVAILABLE", "CANCELLED"}
