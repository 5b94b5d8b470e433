"""The calls of the service: admitted on the event loop, answered in batches.

What a call needs, decoding and checking it, searching, and making its message, is done for all calls of a batch, one
thing after the other: Python that does the same again is several times faster than Python that comes to it after
something else (docs/decisions/025). A worker thread encodes and searches, the event loop does the rest (026).
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import faiss
import grpc
import torch

from retrieval.errors import RetrievalError
from retrieval.histories.store import HistoryStore
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.batcher import Batcher
from retrieval.rpc.convert import (
    batch_request_from,
    embed_request_from,
    embedded_to,
    result_to,
    retrieve_request_from,
    retrieved_to,
    state_to,
)
from retrieval.rpc.convert_record import record_request_from, recorded_to
from retrieval.rpc.errors import OverloadedError
from retrieval.rpc.handler import Method, parsed
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import Limits, PreparedRetrieve
from retrieval.rpc.recall import RecallSampler
from retrieval.rpc.requests import Embedded
from retrieval.rpc.server_config import ServerConfig
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.rpc.solve import Prepared, Solved, answer_of
from retrieval.rpc.status import reason_of

__all__ = ["Calls", "limit_threads"]

# Threads that wait for the history store, which may block on a disk.
_LOOKUP_THREADS = 4


@dataclass(frozen=True, slots=True)
class _Asked:
    """A message that is to be decoded and checked, and when it came, by `time.perf_counter`."""

    serving: ServingSnapshot
    message: pb.RetrieveRequest
    came: float


_Job = _Asked | Prepared
_Message = pb.RetrieveResponse | pb.EmbedUsersResponse
_Made = TypeVar("_Made")


class Calls:
    """Answers the calls of one server. For one event loop.

    Args:
        config: how to run.
        histories: stored histories; None refuses requests that name a stored user.
        metrics: where everything is counted.
        live: the snapshot to answer from; raises while there is none.
    """

    def __init__(
        self,
        config: ServerConfig,
        histories: HistoryStore | None,
        metrics: Metrics,
        live: Callable[[], ServingSnapshot],
    ) -> None:
        self._metrics, self._live, self._capacity = metrics, live, config.capacity
        self._service = RetrievalService(histories, _within(config), metrics=metrics)
        self._batcher: Batcher[_Job, _Message] = Batcher(
            self._service.solve,
            begin=self._prepared,
            end=self._messages,
            max_batch=config.max_batch,
            capacity=config.capacity,
            client_capacity=config.client_capacity,
            prepare_thread=partial(limit_threads, config.threads),
            on_batch=metrics.batch,
        )
        metrics.waiting.set_function(lambda: self._batcher.waiting)
        metrics.in_hand.set_function(lambda: self._batcher.in_hand)
        self._recall = RecallSampler(config.recall_share, metrics.recall, partial(limit_threads, 1))
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="histories")
        self._recording = 0

    @property
    def methods(self) -> dict[str, Method]:
        """By name."""
        return {
            "Retrieve": self._retrieve,
            "BatchRetrieve": self._batch_retrieve,
            "EmbedUsers": self._embed_users,
            "RecordEvents": self._record_events,
            "GetServingState": self._serving_state,
        }

    def close(self) -> None:
        """Wait for the running batch and end all threads; no call may come any more."""
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()
        self._recall.close()

    async def _retrieve(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        came, deadline = time.perf_counter(), _deadline(context)
        # A call that finds no slot is not even parsed: refusing must be cheap.
        with self._batcher.slot(client):
            message, serving = parsed(pb.RetrieveRequest, content), self._live()
            job: _Job = _Asked(serving, message, came)
            if message.WhichOneof("user") == "stored_user":
                # Reading a stored history may block.
                job = await self._in_lookups(
                    lambda: self._service.prepare(serving, retrieve_request_from(message), came)
                )
            return (await self._batcher.submit(job, deadline, client)).SerializeToString()

    async def _embed_users(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        came, deadline = time.perf_counter(), _deadline(context)
        with self._batcher.slot(client):
            message, serving = parsed(pb.EmbedUsersRequest, content), self._live()
            # Many users take long to check, and stored ones may block.
            job = await self._in_lookups(lambda: self._service.prepare(serving, embed_request_from(message), came))
            return (await self._batcher.submit(job, deadline, client)).SerializeToString()

    async def _batch_retrieve(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        """Each request is a job of its own, so that clients take turns by request and not by call."""
        came, deadline = time.perf_counter(), _deadline(context)
        message = parsed(pb.BatchRetrieveRequest, content)
        self._service.check_batch(len(message.requests))
        with self._batcher.slot(client, len(message.requests)):
            serving = self._live()
            prepared = await self._in_lookups(
                lambda: self._service.prepare_batch(serving, batch_request_from(message), came)
            )
            outcomes = await asyncio.gather(*(self._outcome(one, deadline, client) for one in prepared))
        results = []
        for outcome in outcomes:
            results.append(result_to(outcome))
            # Many long answers would hold up every other call.
            await asyncio.sleep(0)
        return pb.BatchRetrieveResponse(results=results).SerializeToString()

    async def _in_lookups(self, prepare: Callable[[], _Made]) -> _Made:
        """Decode and check a call on a thread that may wait."""

        def timed() -> _Made:
            with self._metrics.stage("decode"):
                return prepare()

        return await asyncio.get_running_loop().run_in_executor(self._lookups, timed)

    async def _outcome(
        self, prepared: Prepared | RetrievalError, deadline: float | None, client: str
    ) -> pb.RetrieveResponse | Exception:
        """What becomes of one request of a BatchRetrieve: nothing that happens to it touches the others."""
        try:
            if isinstance(prepared, RetrievalError):
                raise prepared
            answer = await self._batcher.submit(prepared, deadline, client)
        except Exception as error:
            self._metrics.rejected(reason_of(error))
            return error
        assert isinstance(answer, pb.RetrieveResponse)
        return answer

    async def _record_events(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        if self._recording >= self._capacity:
            raise OverloadedError(f"{self._recording} RecordEvents calls are in hand, as many as this server takes")
        self._recording += 1
        try:
            request = record_request_from(parsed(pb.RecordEventsRequest, content))
            answer, done = self._service.begin_recording(self._live(), request)
            await asyncio.wrap_future(done)
        finally:
            self._recording -= 1
        return recorded_to(answer).SerializeToString()

    async def _serving_state(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        parsed(pb.GetServingStateRequest, content)
        return state_to(self._service.state(self._live())).SerializeToString()

    def _prepared(self, jobs: Sequence[_Job]) -> list[Prepared | Exception]:
        """Jobs that are decoded and checked, and what is wrong with the others."""
        if not any(isinstance(job, _Asked) for job in jobs):
            return [job for job in jobs if not isinstance(job, _Asked)]
        with self._metrics.stage("decode"):
            return [self._decoded(job) if isinstance(job, _Asked) else job for job in jobs]

    def _decoded(self, asked: _Asked) -> Prepared | Exception:
        try:
            return self._service.prepare(asked.serving, retrieve_request_from(asked.message), asked.came)
        except Exception as error:
            return error

    def _messages(
        self, prepared: Sequence[Prepared], solved: Sequence[Solved | Exception]
    ) -> list[_Message | Exception]:
        """The answers to what the worker solved."""
        with self._metrics.stage("answer"):
            return [self._message(one, found) for one, found in zip(prepared, solved, strict=True)]

    def _message(self, prepared: Prepared, found: Solved | Exception) -> _Message | Exception:
        if isinstance(found, Exception):
            return found
        try:
            answer = answer_of(prepared, found)
            if isinstance(answer, Embedded):
                return embedded_to(answer)
            assert isinstance(prepared, PreparedRetrieve)
            self._recall.offer(prepared, answer)
            if answer.shortfall:
                self._metrics.fell_short()
            return retrieved_to(answer, string_ids=prepared.serving.string_ids)
        except Exception as error:
            return error


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    """When a call's deadline passes, by the event loop's clock; None if it has none."""
    remaining = context.time_remaining()
    return asyncio.get_running_loop().time() + remaining if remaining is not None else None


def limit_threads(threads: int | None) -> None:
    """Set how many threads torch and Faiss use when they are called from this thread."""
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Fewer, if OMP_NUM_THREADS says so.
        threads = min(torch.get_num_threads(), max(1, cores - 1))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def _within(config: ServerConfig) -> Limits:
    """Limits with no more requests in a BatchRetrieve than its client may have in hand."""
    in_hand = min(config.capacity, config.client_capacity or config.capacity)
    return config.limits.model_copy(update={"max_batch": min(config.limits.max_batch, in_hand)})
