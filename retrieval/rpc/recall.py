"""How much of what exact search finds is in the answers: measured on a sample of calls, beside the serving."""

import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retrieval.rpc.prepare import PreparedEmbed, PreparedRetrieve, UserEvents
from retrieval.rpc.requests import Embedded, Retrieved, Source
from retrieval.rpc.service import RetrievalService

__all__ = ["RecallSampler", "recall_of"]

# Samples that wait; further ones are passed over. Each holds on to its snapshot.
_WAITING = 4
# Scores of one user differ by rounding between batches.
_ROUNDING = 1e-5


def recall_of(prepared: PreparedRetrieve, answer: Retrieved) -> float | None:
    """Share of the best min(k, eligible) items that an answer holds, equal scores counting as equal.

    None where there is nothing to measure: the answer is not the model's, was exact, or no item was eligible.
    """
    if answer.source is not Source.MODEL or prepared.exact:
        return None
    user, serving = prepared.user, prepared.serving
    if isinstance(user, UserEvents):
        # A service of its own keeps the sample out of the served calls' figures.
        (embedded,) = RetrievalService().answer([PreparedEmbed(serving=serving, users=(user,))])
        assert isinstance(embedded, Embedded)
        user = np.array(embedded.values, np.float32)
    searcher = serving.snapshot.searcher
    exact = searcher.search(user[None], [min(prepared.k, len(searcher))], [prepared.excluded], exact=True)
    best = exact.scores[0][exact.rows[0] >= 0]
    if not len(best):
        return None
    return min(1.0, np.count_nonzero(np.array(answer.scores) >= best[-1] - _ROUNDING) / len(best))


class RecallSampler:
    """Measures the recall of some answers on a thread that gives way to all others. For one event loop.

    Args:
        share: of answers, from 0 to 1.
        observe: called with each recall.
        prepare_thread: called on the thread before its first measurement.
    """

    def __init__(
        self, share: float, observe: Callable[[float], None], prepare_thread: Callable[[], None] | None = None
    ) -> None:
        self._share, self._observe, self._prepare_thread = share, observe, prepare_thread
        self._random = random.Random()
        self._places = threading.BoundedSemaphore(_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recall", initializer=self._give_way)

    def _give_way(self) -> None:
        if hasattr(os, "setpriority") and threading.get_native_id() != os.getpid():
            # On Linux priorities are those of threads.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        if self._prepare_thread is not None:
            self._prepare_thread()

    def offer(self, prepared: PreparedRetrieve, answer: Retrieved) -> None:
        """Perhaps measure this answer, at some time; never waits."""
        if self._random.random() < self._share and self._places.acquire(blocking=False):
            self._thread.submit(self._measure, prepared, answer)

    def _measure(self, prepared: PreparedRetrieve, answer: Retrieved) -> None:
        try:
            recall = recall_of(prepared, answer)
            if recall is not None:
                self._observe(recall)
        finally:
            self._places.release()

    def close(self) -> None:
        """End the thread after the measurement that it may be at."""
        self._thread.shutdown(wait=True, cancel_futures=True)
