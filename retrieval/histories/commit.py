"""Many writers, one durable write: what waits while a write runs is the next one."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from retrieval.errors import HistoryStoreError

__all__ = ["GroupCommit"]

_Item = TypeVar("_Item")

# Items of one write: one that is too large would delay those that come next.
_TOGETHER = 4096


class GroupCommit(Generic[_Item]):
    """A thread that writes what others hand it, as much together as is waiting; an idle one starts at once.

    Args:
        write: makes items durable, in order. Writing them again must do no harm.
    """

    def __init__(self, write: Callable[[Sequence[_Item]], None]) -> None:
        self._write = write
        self._waiting: queue.SimpleQueue[tuple[Sequence[_Item], Future[None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="record-events", daemon=True)
        self._thread.start()

    def submit(self, items: Sequence[_Item]) -> "Future[None]":
        """Write items; done when they are durable. Any thread may call this, and none is held up.

        Raises:
            HistoryStoreError: it was closed.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise HistoryStoreError("the store of histories is closed")
            self._waiting.put((items, done))
        return done

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        more = True
        while more:
            jobs: list[tuple[Sequence[_Item], Future[None]]] = []
            more = self._collect(jobs)
            self._finish([(items, done) for items, done in jobs if done.set_running_or_notify_cancel()])

    def _collect(self, jobs: list[tuple[Sequence[_Item], "Future[None]"]]) -> bool:
        """Wait for a job, and take what waits with it; False at the end."""
        size = 0
        while size < _TOGETHER:
            try:
                job = self._waiting.get(block=not jobs)
            except queue.Empty:
                return True
            if job is None:
                return False
            jobs.append(job)
            size += len(job[0])
        return True

    def _finish(self, jobs: list[tuple[Sequence[_Item], "Future[None]"]]) -> None:
        if not jobs:
            return
        try:
            self._write([item for items, _ in jobs for item in items])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0][1].set_exception(error)
                return
            # One user's damaged history must not refuse the others' events.
            for job in jobs:
                self._finish([job])
            return
        for _, done in jobs:
            done.set_result(None)
