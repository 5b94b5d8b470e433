"""Calls of one method sent to a server by a process of their own, which loads little else, and how long they took.

Closed loop: so many callers, each sends its next call when the last is answered. It finds what a server can do, and
its latencies say little: a server that stalls is asked less meanwhile. Open loop: calls are due at a fixed rate,
whatever has become of the earlier ones, and a call's latency counts from when it was due, not from when it was sent.
"""

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import grpc

from retrieval.rpc.errors import DeadlineError, OverloadedError
from retrieval.rpc.throttle import Throttle

__all__ = ["Generator", "Load", "generator"]

_Result = TypeVar("_Result")
_Call = Callable[[int, float | None], Awaitable[None]]
"""Sends the message of this number, due at this moment; None is now."""

# Calls that are unanswered for so long have failed, whatever becomes of them.
_TIMEOUT = 10.0
_OPTIONS = [("grpc.max_receive_message_length", 64 * 2**20)]


@dataclass(slots=True)
class Load:
    """What a run of calls gave.

    Attributes:
        seconds: from the first call that was due to the last answer.
        latencies: seconds of each answered call.
        refused: seconds of each call that ended with RESOURCE_EXHAUSTED, from when it was sent or was not.
        unsent: how many of these a throttle refused.
        codes: failed calls by gRPC status.
        cpu_seconds: of the generator.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    unsent: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answered calls per second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Latency in seconds that this share of the answered calls did not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Generator:
    """A process that sends calls. Made by `generator`."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def answers(self, address: str, method: str, messages: Sequence[bytes]) -> list[bytes]:
        """The answer to each message, sent one after the other.

        Raises:
            grpc.RpcError: a call failed.
        """
        return self._pool.submit(_answers, address, method, messages).result()

    def closed(self, address: str, method: str, messages: Sequence[bytes], callers: int, seconds: float) -> Load:
        """So many callers for so long."""
        return self._pool.submit(_closed, address, method, messages, callers, seconds).result()

    def open(
        self,
        address: str,
        method: str,
        messages: Sequence[bytes],
        rate: float,
        seconds: float,
        timeout: float = _TIMEOUT,
        *,
        throttled: bool = False,
    ) -> Load:
        """`rate` calls per second for so long, each with this deadline; throttled as our client library does it."""
        return self._pool.submit(_open, address, method, messages, rate, seconds, timeout, throttled).result()


@contextmanager
def generator() -> Iterator[Generator]:
    """A generator for the block."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield Generator(pool)


def _run(work: Callable[[], Awaitable[_Result]]) -> _Result:
    import uvloop

    async def run() -> _Result:
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def _answers(address: str, method: str, messages: Sequence[bytes]) -> list[bytes]:
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        call = channel.unary_unary(method)
        return [call(message, timeout=_TIMEOUT) for message in messages]


async def _measured(
    address: str,
    method: str,
    messages: Sequence[bytes],
    send: Callable[[_Call, float], Awaitable[None]],
    timeout: float = _TIMEOUT,
    throttle: Throttle | None = None,
) -> Load:
    load = Load()
    counted = throttle.call if throttle is not None else nullcontext
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        ask = channel.unary_unary(method)
        await channel.channel_ready()

        async def answer(message: bytes) -> None:
            try:
                await ask(message, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise OverloadedError(error.details() or "") from None
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise DeadlineError(error.details() or "") from None
                raise

        async def call(number: int, due: float | None) -> None:
            sent = time.perf_counter()
            try:
                with counted():
                    await answer(messages[number % len(messages)])
            except OverloadedError as error:
                load.codes[grpc.StatusCode.RESOURCE_EXHAUSTED.name] += 1
                load.unsent += error.by_client
                load.refused.append(time.perf_counter() - sent)
            except DeadlineError:
                load.codes[grpc.StatusCode.DEADLINE_EXCEEDED.name] += 1
            except grpc.aio.AioRpcError as error:
                load.codes[error.code().name] += 1
            else:
                load.latencies.append(time.perf_counter() - (sent if due is None else due))

        begun, cpu = time.perf_counter(), time.process_time()
        await send(call, begun)
        load.seconds, load.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    return load


def _closed(address: str, method: str, messages: Sequence[bytes], callers: int, seconds: float) -> Load:
    async def send(call: _Call, begun: float) -> None:
        async def caller(number: int) -> None:
            while time.perf_counter() - begun < seconds:
                await call(number, None)
                number += callers

        await asyncio.gather(*(caller(number) for number in range(callers)))

    return _run(lambda: _measured(address, method, messages, send))


def _open(
    address: str,
    method: str,
    messages: Sequence[bytes],
    rate: float,
    seconds: float,
    timeout: float,
    throttled: bool,
) -> Load:
    async def send(call: _Call, begun: float) -> None:
        calls: set[asyncio.Task[None]] = set()
        number = 0
        while number < rate * seconds:
            # All that have become due, and late ones with the time at which they were due.
            while (due := begun + number / rate) <= time.perf_counter() and number < rate * seconds:
                task = asyncio.ensure_future(call(number, due))
                calls.add(task)
                task.add_done_callback(calls.discard)
                number += 1
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await asyncio.gather(*calls)

    return _run(lambda: _measured(address, method, messages, send, timeout, Throttle() if throttled else None))
