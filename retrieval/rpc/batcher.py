"""Calls gathered into batches: whatever waits when the worker is free is worked on together.

No delay is added: an idle worker starts as soon as the event loop has nothing more to hear of, and batches grow only
while it is busy. Clients take turns: a batch takes one call of each in the order in which they came, then a second one,
and so on.

A batch is begun and ended on the event loop, and only what takes long is done on the worker: two threads that both run
Python wait for each other's interpreter lock, and wake each other in vain (docs/decisions/026).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from retrieval.rpc.errors import DeadlineError, OverloadedError

__all__ = ["Batcher"]

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")

_log = logging.getLogger(__name__)

# Weight of the latest batch in the running mean of how long a batch takes.
_LATEST = 0.2
# A batch begins after so many turns of the event loop in a row have brought no further call. A turn that has nothing to
# do takes some microseconds, and calls that have come to the server get here one a turn, at most.
_QUIET_TURNS = 2


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[_Job]):
    job: _Job
    deadline: float | None
    since: float


class Batcher(Generic[_Job, _Answer]):
    """Runs jobs of one event loop in batches on one thread of its own.

    Calls that are cancelled, or whose deadline passes, before their batch starts are never run.

    Args:
        run: turns a batch of jobs into as many answers, or exceptions in their place; called on the worker thread.
        begin: turns jobs into what `run` gets, or exceptions; called on the event loop. None changes nothing.
        end: turns what `run` got and gave into answers, or exceptions; called on the event loop. None changes nothing.
        max_batch: jobs per run.
        capacity: calls in hand at once, waiting and running together.
        client_capacity: of these, calls of one client; None sets no such limit.
        prepare_thread: called on the worker thread before its first run.
        on_batch: called on the event loop when a batch begins, with the seconds that each of its jobs waited.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        *,
        begin: Callable[[list[_Job]], Sequence[Any]] | None = None,
        end: Callable[[list[Any], Sequence[Any]], Sequence[_Answer | Exception]] | None = None,
        max_batch: int,
        capacity: int,
        client_capacity: int | None = None,
        prepare_thread: Callable[[], None] | None = None,
        on_batch: Callable[[Sequence[float]], None] | None = None,
    ) -> None:
        self._begin, self._end, self._on_batch = begin, end, on_batch
        self._run, self._max_batch, self._capacity = run, max_batch, capacity
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="encode-and-search", initializer=prepare_thread)
        # By client, the one whose turn is next first. A dict is a queue from which a cancelled call can leave at once,
        # wherever it stands. No queue is empty.
        self._queues: dict[str, dict[asyncio.Future[_Answer], _Waiting[_Job]]] = {}
        self._client_capacity = client_capacity if client_capacity is not None else capacity
        self._in_hand, self._total = Counter[str](), 0
        self._busy = False
        self._began = 0.0
        self._batch_seconds: float | None = None

    @property
    def waiting(self) -> int:
        """Jobs that wait for a batch."""
        return sum(map(len, self._queues.values()))

    @property
    def in_hand(self) -> int:
        """Calls that hold a slot."""
        return self._total

    @contextmanager
    def slot(self, client: str = "", calls: int = 1) -> Iterator[None]:
        """Count so many calls of a client as in hand while the block runs.

        Raises:
            OverloadedError: with these there would be more calls in hand than the capacity, in all or of this client.
        """
        more = "as many as" if calls == 1 else f"and {calls} more are more than"
        total = self.in_hand
        if total + calls > self._capacity:
            raise OverloadedError(
                f"{total} calls are in hand, {more} this server takes; try again later", self._batch_seconds
            )
        if self._in_hand[client] + calls > self._client_capacity:
            raise OverloadedError(
                f"{self._in_hand[client]} calls of {client} are in hand, {more} this server takes of one client",
                self._batch_seconds,
            )
        self._in_hand[client] += calls
        self._total += calls
        try:
            yield
        finally:
            self._total -= calls
            self._in_hand[client] -= calls
            if not self._in_hand[client]:
                del self._in_hand[client]

    def _seconds_until_start(self, client: str, now: float) -> float:
        """How long a job of a client that arrives now will wait, as far as recent batches tell; rather too short."""
        if not self._busy or self._batch_seconds is None:
            return 0.0
        own = len(self._queues.get(client, ()))
        # Of each other client at most one more than this client has waiting comes first.
        ahead = own + sum(min(len(queue), own + 1) for name, queue in self._queues.items() if name != client)
        running = max(0.0, self._began + self._batch_seconds - now)
        return running + ahead // self._max_batch * self._batch_seconds

    async def submit(self, job: _Job, deadline: float | None = None, client: str = "") -> _Answer:
        """Wait for a job's answer.

        Args:
            job: what to run.
            deadline: moment, by the event loop's clock, after which the answer is worth nothing.
            client: whose it is; clients take turns.

        Raises:
            DeadlineError: the deadline passed before the job's batch started.
            OverloadedError: too many jobs wait for this one to start before its deadline.
            Exception: whatever `run` raised on this job.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        wait = self._seconds_until_start(client, now)
        if deadline is not None and now < deadline < now + wait:
            raise OverloadedError(
                f"the work would begin in {1000 * wait:.0f} ms, after the deadline; try again later", wait
            )
        future: asyncio.Future[_Answer] = loop.create_future()
        self._queues.setdefault(client, {})[future] = _Waiting(job, deadline, now)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._start, loop)
        try:
            return await future
        finally:
            self._leave(client, future)

    def _leave(self, client: str, future: "asyncio.Future[_Answer]") -> None:
        queue = self._queues.get(client)
        if queue is not None and queue.pop(future, None) is not None and not queue:
            del self._queues[client]

    def _next(self) -> "tuple[asyncio.Future[_Answer], _Waiting[_Job]]":
        """Take the oldest job of the client whose turn it is, who goes to the end of the line."""
        client = next(iter(self._queues))
        queue = self._queues.pop(client)
        future = next(iter(queue))
        waiting = queue.pop(future)
        if queue:
            self._queues[client] = queue
        return future, waiting

    def _start(self, loop: asyncio.AbstractEventLoop, before: int = 0, quiet: int = 0) -> None:
        """Begin a batch once the loop has gone round without hearing of a further call, or the batch is full."""
        waiting = self.waiting
        quiet = 0 if waiting > before else quiet + 1
        if quiet < _QUIET_TURNS and 0 < waiting < self._max_batch:
            loop.call_soon(self._start, loop, waiting, quiet)
            return
        futures, jobs = self._take(loop.time())
        if not jobs:
            self._busy = False
            return
        self._began = loop.time()
        if self._begin is not None:
            futures, jobs = self._begun(futures, jobs, self._begin)
            if not jobs:
                loop.call_soon(self._start, loop)
                return
        # Not by `run_in_executor`, whose futures around futures take the loop longer than a batch's own book-keeping.
        self._worker.submit(self._work, loop, futures, jobs)

    def _begun(
        self,
        futures: list[asyncio.Future[_Answer]],
        jobs: list[_Job],
        begin: Callable[[list[_Job]], Sequence[Any]],
    ) -> tuple[list[asyncio.Future[_Answer]], list[Any]]:
        """What the worker gets; who has nothing for it is told at once."""
        left: list[asyncio.Future[_Answer]] = []
        begun: list[Any] = []
        for future, one in zip(futures, _safely(begin, jobs), strict=True):
            if isinstance(one, Exception):
                future.set_exception(one)
            else:
                left.append(future)
                begun.append(one)
        return left, begun

    def _work(self, loop: asyncio.AbstractEventLoop, futures: list[asyncio.Future[_Answer]], jobs: list[Any]) -> None:
        """Run a batch, on the worker thread."""
        loop.call_soon_threadsafe(self._finish, loop, futures, jobs, self._run_each_safely(jobs))

    def _take(self, now: float) -> tuple[list[asyncio.Future[_Answer]], list[_Job]]:
        futures: list[asyncio.Future[_Answer]] = []
        jobs: list[_Job] = []
        waits: list[float] = []
        while self._queues and len(jobs) < self._max_batch:
            future, waiting = self._next()
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

    def _run_each_safely(self, jobs: list[Any]) -> Sequence[Any]:
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
        jobs: list[Any],
        found: Sequence[Any],
    ) -> None:
        seconds = loop.time() - self._began
        before = self._batch_seconds if self._batch_seconds is not None else seconds
        self._batch_seconds = before + _LATEST * (seconds - before)
        # Where a whole batch waits, the worker gets it before this one's answers are made.
        self._start(loop)
        end = self._end
        answers = found if end is None else _safely(lambda jobs: end(jobs, found), jobs)
        for future, answer in zip(futures, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def close(self) -> None:
        """Wait for the running batch and end the worker; nothing may be submitted any more."""
        self._worker.shutdown(wait=True)


def _safely(work: Callable[[list[Any]], Sequence[Any]], jobs: list[Any]) -> Sequence[Any]:
    """What some work gives for each job; its failure for all, if it fails: the loop must go on."""
    try:
        return work(jobs)
    except Exception as error:
        return [error] * len(jobs)
