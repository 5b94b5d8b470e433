"""What a server tells Prometheus. One object per server, so that servers in one process do not mix their figures."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics", "Stage"]

Stage = Literal["decode", "queue", "encode", "search", "answer"]

_STAGES: tuple[Stage, ...] = ("decode", "queue", "encode", "search", "answer")
# Seconds: from a validated embedding query to a call that has missed every page's budget.
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_RECALLS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, histograms and gauges; docs/service.md lists them. Any thread may use it.

    Attributes:
        registry: what a scrape reads.
        waiting: calls that wait for the worker.
        in_hand: calls that have been admitted and not yet answered.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "retrieval_calls", "Calls that ended, by gRPC status.", ["method", "code"], registry=self.registry
        )
        self._call_seconds = Histogram(
            "retrieval_call_seconds", "From request bytes to answer or refusal, by gRPC status.", ["method", "code"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        stages = Histogram(
            "retrieval_stage_seconds", "Time by stage: queue per call, the others per batch.", ["stage"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        # Looked up once: `labels` costs more than the observation.
        self._ended: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._rejected: dict[str, Counter] = {}
        self._stages = {stage: stages.labels(stage) for stage in _STAGES}
        self._batch_sizes = Histogram(
            "retrieval_batch_size", "Calls per batch.", buckets=_BATCH_SIZES, registry=self.registry
        )
        self._rejections = Counter(
            "retrieval_rejections", "Calls refused, by ErrorInfo.reason.", ["reason"], registry=self.registry
        )
        self._shortfalls = Counter("retrieval_shortfalls", "Answers with fewer than k items.", registry=self.registry)
        self._recall = Histogram(
            "retrieval_online_recall", "Share of exact search's answer that a sampled answer holds.", buckets=_RECALLS,
            registry=self.registry,
        )  # fmt: skip
        self.waiting = Gauge("retrieval_waiting_calls", "Calls that wait for the worker.", registry=self.registry)
        self.in_hand = Gauge("retrieval_calls_in_hand", "Calls admitted and not yet answered.", registry=self.registry)
        self._snapshot = Gauge("retrieval_snapshot", "1 for the live snapshot.", ["version"], registry=self.registry)
        loads = Counter(
            "retrieval_snapshot_loads", "Snapshots that took over, and those that could not be loaded.", ["result"],
            registry=self.registry,
        )  # fmt: skip
        self._loaded, self._refused = loads.labels("loaded"), loads.labels("refused")
        self._created = math.nan
        age = Gauge("retrieval_snapshot_age_seconds", "Since the live snapshot was written.", registry=self.registry)
        age.set_function(lambda: time.time() - self._created)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Time the block; one that fails is not observed."""
        start = time.perf_counter()
        yield
        self.took(stage, time.perf_counter() - start)

    def took(self, stage: Stage, seconds: float) -> None:
        """A stage took so long."""
        self._stages[stage].observe(seconds)

    def batch(self, waits: Sequence[float]) -> None:
        """A batch begins; `waits` has the seconds that each of its calls waited for it."""
        self._batch_sizes.observe(len(waits))
        for seconds in waits:
            self.took("queue", seconds)

    def call(self, method: str, code: str, seconds: float) -> None:
        """A call ended with the gRPC status of this name."""
        ended = self._ended.get((method, code))
        if ended is None:
            ended = self._calls.labels(method, code), self._call_seconds.labels(method, code)
            self._ended[method, code] = ended
        ended[0].inc()
        ended[1].observe(seconds)

    def rejected(self, reason: str) -> None:
        """A call was refused; `reason` as in its ErrorInfo."""
        if reason not in self._rejected:
            self._rejected[reason] = self._rejections.labels(reason)
        self._rejected[reason].inc()

    def recall(self, share: float) -> None:
        """A sampled answer holds this share of what exact search finds."""
        self._recall.observe(share)

    def fell_short(self) -> None:
        """An answer has fewer than k items."""
        self._shortfalls.inc()

    def snapshot(self, version: str, created: str) -> None:
        """Another snapshot is live; `created` is ISO 8601, UTC."""
        self._loaded.inc()
        self._created = datetime.fromisoformat(created).timestamp()
        self._snapshot.clear()
        self._snapshot.labels(version).set(1)

    def snapshot_refused(self) -> None:
        """A snapshot could not be loaded."""
        self._refused.inc()
