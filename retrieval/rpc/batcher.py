"""Calls gathered into batches: whatever waits when the worker is free is worked on together.

No delay is added: an idle worker starts at once, and batches grow only while it is busy.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from retrieval.rpc.errors import DeadlineError, OverloadedError

__all__ = ["Batcher"]

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[_Job]):
    job: _Job
    deadline: float | None
    since: float


class Batcher(Generic[_Job, _Answer]):
    """Runs jobs of one event loop in batches on one thread of its own.

    Calls that are cancelled, or whose deadline passes, before their batch starts are never run.

    Args:
        run: turns a batch of jobs into as many answers; called on the worker thread.
        max_batch: jobs per run.
        capacity: calls in hand at once, waiting and running together.
        prepare_thread: called on the worker thread before its first run.
        on_batch: called on the event loop when a batch begins, with the seconds that each of its jobs waited.
    """

    def __init__(
        self,
        run: Callable[[list[_Job]], Sequence[_Answer]],
        *,
        max_batch: int,
        capacity: int,
        prepare_thread: Callable[[], None] | None = None,
        on_batch: Callable[[Sequence[float]], None] | None = None,
    ) -> None:
        self._on_batch = on_batch
        self._run, self._max_batch, self._capacity = run, max_batch, capacity
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="encode-and-search", initializer=prepare_thread)
        # A dict is a queue from which a cancelled call can leave at once, wherever it stands.
        self._waiting: dict[asyncio.Future[_Answer], _Waiting[_Job]] = {}
        self._in_hand = 0
        self._busy = False

    @property
    def waiting(self) -> int:
        """Jobs that wait for a batch."""
        return len(self._waiting)

    @property
    def in_hand(self) -> int:
        """Calls that hold a slot."""
        return self._in_hand

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Count a call as in hand while the block runs.

        Raises:
            OverloadedError: as many calls as the capacity are in hand already.
        """
        if self._in_hand >= self._capacity:
            raise OverloadedError(f"{self._in_hand} calls are in hand, as many as this server takes; try again later")
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1

    async def submit(self, job: _Job, deadline: float | None = None) -> _Answer:
        """Wait for a job's answer.

        Args:
            job: what to run.
            deadline: moment, by the event loop's clock, after which the answer is worth nothing.

        Raises:
            DeadlineError: the deadline passed before the job's batch started.
            Exception: whatever `run` raised on this job.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Answer] = loop.create_future()
        self._waiting[future] = _Waiting(job, deadline, loop.time())
        if not self._busy:
            self._busy = True
            # Calls that the loop has read in this same turn join the batch.
            loop.call_soon(self._start, loop)
        try:
            return await future
        finally:
            self._waiting.pop(future, None)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        futures, jobs = self._take(loop.time())
        if not jobs:
            self._busy = False
            return
        running = loop.run_in_executor(self._worker, self._run_each_safely, jobs)
        running.add_done_callback(lambda done: self._finish(loop, futures, done))

    def _take(self, now: float) -> tuple[list[asyncio.Future[_Answer]], list[_Job]]:
        futures: list[asyncio.Future[_Answer]] = []
        jobs: list[_Job] = []
        waits: list[float] = []
        while self._waiting and len(jobs) < self._max_batch:
            future = next(iter(self._waiting))
            waiting = self._waiting.pop(future)
            if future.done():
                continue
            if waiting.deadline is not None and now >= waiting.deadline:
                future.set_exception(DeadlineError("the deadline passed before the work began"))
                continue
            futures.append(future)
            jobs.append(waiting.job)
            waits.append(now - waiting.since)
        if jobs and self._on_batch is not None:
            self._on_batch(waits)
        return futures, jobs

    def _run_each_safely(self, jobs: list[_Job]) -> Sequence[_Answer | Exception]:
        """Answers, or the exception of each job that fails: one bad job must not fail its batch-mates."""
        try:
            answers = self._run(jobs)
            assert len(answers) == len(jobs)
            return answers
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            _log.warning("a batch of %d calls failed (%r); running them one by one", len(jobs), error)
            return [self._run_each_safely([job])[0] for job in jobs]

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[_Answer]],
        running: "asyncio.Future[Sequence[_Answer | Exception]]",
    ) -> None:
        for future, answer in zip(futures, running.result(), strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        self._start(loop)

    def close(self) -> None:
        """Wait for the running batch and end the worker; nothing may be submitted any more."""
        self._worker.shutdown(wait=True)
