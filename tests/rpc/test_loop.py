"""The server's event loop: what grpcio would lose when calls are given up is not lost, and cancelling still works."""

import asyncio
import ctypes
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from retrieval.rpc.loop import new_event_loop
from tests.rpc import http2

METHOD = "/test.Service/Answer"


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = (
        ("arena", ctypes.c_size_t), ("ordblks", ctypes.c_size_t), ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t), ("hblkhd", ctypes.c_size_t), ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t), ("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )  # fmt: skip


def allocated() -> int:
    """Bytes that C code of this process holds."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    libc.mallinfo2.restype = MallInfo
    return int(libc.mallinfo2().uordblks)


def settled() -> int:
    """What is held once the server has got rid of the calls that it was sent."""
    least, seen = allocated(), time.monotonic()
    while time.monotonic() - seen < 0.4:
        time.sleep(0.05)
        if (now := allocated()) < least - 4096:
            least, seen = now, time.monotonic()
    return least


@contextmanager
def serving() -> Iterator[str]:
    """A server that does nothing, on a loop of ours in a thread."""
    started, loop, stop = threading.Event(), new_event_loop(), asyncio.Event()
    address = ""

    async def answer(content: bytes, context: object) -> bytes:
        return content

    async def serve() -> None:
        nonlocal address
        server = grpc.aio.server()
        handlers = {METHOD.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        started.set()
        await stop.wait()
        await server.stop(None)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(20)
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_calls_that_are_given_up_leave_nothing_behind() -> None:
    def flood(times: int) -> int:
        for _ in range(times):
            http2.attack(address, http2.ATTACKS["rst before the message"](random.Random(0), METHOD, b"x"))
        return settled()

    with serving() as address:
        before = flood(10)
        # 5,000 calls; without the loop's care some half of them would leave 96 bytes each.
        assert flood(10) - before < 100_000


async def _handle_exceptions(steps: list[str], core: asyncio.Future[None], work: asyncio.Future[None]) -> None:
    async def execute_batch() -> None:
        await core
        steps.append("freed")

    await execute_batch()
    try:
        await work
    except asyncio.CancelledError:
        steps.append("cancelled")
        raise


def test_a_cancellation_waits_for_the_core_and_then_arrives() -> None:
    async def run(is_done: bool) -> list[str]:
        loop, steps = asyncio.get_running_loop(), list[str]()
        core, work = loop.create_future(), loop.create_future()
        task = loop.create_task(_handle_exceptions(steps, core, work))
        await asyncio.sleep(0)
        if is_done:
            core.set_result(None)
        assert task.cancel()
        await asyncio.sleep(0.01)
        assert steps == ([] if not is_done else ["freed", "cancelled"])
        if not is_done:
            core.set_result(None)
        with pytest.raises(asyncio.CancelledError):
            await task
        return steps

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for is_done in (False, True):
            assert runner.run(run(is_done)) == ["freed", "cancelled"]


def test_other_tasks_and_errors_are_as_everywhere() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        future.set_exception(ValueError("as it is"))
        with pytest.raises(ValueError, match="as it is"):
            await future
        task = asyncio.create_task(asyncio.sleep(20))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())
