"""Callers in a process of their own that keep what they were answered, for an oracle to judge."""

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import grpc
import numpy as np

__all__ = ["PATIENCE", "Callers", "Heard", "calling"]

PATIENCE = 900.0
"""Seconds after which something has failed: the machine may stop all of a benchmark's processes for minutes."""


@dataclass(slots=True)
class Heard:
    """What callers got since they were last asked.

    Attributes:
        answers: how often the message of this number was answered with these bytes.
        seconds: latency of each answered call.
        failures: failed calls by gRPC status and sentence.
    """

    answers: Counter[tuple[int, bytes]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Heard") -> None:
        """Count another's, too."""
        self.answers.update(other.answers)
        self.seconds += other.seconds
        self.failures.update(other.failures)

    def milliseconds(self, share: float) -> float:
        """Latency that this share of the answered calls did not exceed."""
        return 1000 * float(np.quantile(self.seconds, share)) if self.seconds else float("nan")


class Callers:
    """A process of callers that each ask, pause and ask again. Made by `calling`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def heard(self) -> Heard:
        """What came since the last time."""
        self._pipe.send("report")
        heard: Heard = self._pipe.recv()
        return heard

    def stop(self) -> Heard:
        """End, once the calls in hand are answered; what came since the last time."""
        self._pipe.send("stop")
        heard: Heard = self._pipe.recv()
        return heard


@contextmanager
def calling(address: str, method: str, messages: Sequence[bytes], callers: int, pause: float) -> Iterator[Callers]:
    """So many callers while the block runs; call n asks with message n, modulo their number."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, address, method, messages, callers, pause))
    process.start()
    there.close()
    try:
        yield Callers(here)
    finally:
        process.terminate()
        process.join()


def _run(pipe: Connection, address: str, method: str, messages: Sequence[bytes], callers: int, pause: float) -> None:
    asyncio.run(_call(pipe, address, method, messages, callers, pause))


async def _call(
    pipe: Connection, address: str, method: str, messages: Sequence[bytes], callers: int, pause: float
) -> None:
    loop, heard, going = asyncio.get_running_loop(), Heard(), True
    async with grpc.aio.insecure_channel(address) as channel:
        ask = channel.unary_unary(method)

        async def caller(number: int) -> None:
            while going:
                begun = time.perf_counter()
                try:
                    content = await ask(messages[number % len(messages)], timeout=PATIENCE)
                except grpc.aio.AioRpcError as error:
                    heard.failures[f"{error.code().name}: {error.details()}"] += 1
                else:
                    heard.seconds.append(time.perf_counter() - begun)
                    heard.answers[number % len(messages), content] += 1
                number += callers
                await asyncio.sleep(pause)

        tasks = [asyncio.ensure_future(caller(number)) for number in range(callers)]
        while going:
            command = await loop.run_in_executor(None, pipe.recv)
            if command == "stop":
                going = False
                await asyncio.gather(*tasks)
            pipe.send(heard)
            heard = Heard()
