"""The gRPC server: decoding and checking on the event loop, encoding and searching on one worker thread."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import faiss
import grpc
import torch
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import start_http_server

from retrieval.errors import InputError, RetrievalError
from retrieval.histories.store import HistoryStore
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.admin import ADMIN_DESCRIPTOR, Admin
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
from retrieval.rpc.handler import Method, handlers_of, parsed
from retrieval.rpc.health import Health
from retrieval.rpc.loop import new_event_loop
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.port import Port
from retrieval.rpc.prepare import Limits, PreparedRetrieve
from retrieval.rpc.recall import RecallSampler
from retrieval.rpc.reload import Reloader
from retrieval.rpc.requests import Embedded, EmbedRequest, Retrieved, RetrieveRequest, StoredUser
from retrieval.rpc.security import Tokens, server_credentials
from retrieval.rpc.server_config import AdminConfig, ServerConfig
from retrieval.rpc.service import Answer, Prepared, RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.rpc.status import reason_of
from retrieval.rpc.tracing import exported_traces
from retrieval.snapshot.registry import Registry, storage_at

__all__ = ["SERVICE", "AdminConfig", "Server", "ServerConfig", "run_server", "running_server"]

_log = logging.getLogger(__name__)

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["RetrievalService"]
SERVICE: str = _DESCRIPTOR.full_name

# Calls that one connection may have open beyond the server's capacity, to be refused; what is more waits in its client.
# They are in line before the event loop: were they thousands, each would be past its deadline when its turn comes.
_STREAMS_BEYOND = 32

# Threads that wait for the history store, which may block on a disk.
_LOOKUP_THREADS = 4


class Server:
    """A server on the running event loop: `await start()`, then `await stop()`.

    Args:
        config: how to run.
        histories: stored histories; None refuses requests that name a stored user.
        interceptors: gRPC interceptors around every call, for instance of tracing.

    Raises:
        InputError: a file of certificates or tokens is not usable.
    """

    def __init__(
        self,
        config: ServerConfig,
        histories: HistoryStore | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ) -> None:
        self._config = config
        self._metrics = Metrics()
        self._service = RetrievalService(histories, _within(config), metrics=self._metrics)
        self._batcher: Batcher[Prepared, Answer] = Batcher(
            self._service.answer,
            max_batch=config.max_batch,
            capacity=config.capacity,
            client_capacity=config.client_capacity,
            prepare_thread=partial(_limit_threads, config.threads),
            on_batch=self._metrics.batch,
        )
        self._metrics.waiting.set_function(lambda: self._batcher.waiting)
        self._metrics.in_hand.set_function(lambda: self._batcher.in_hand)
        self._recall = RecallSampler(config.recall_share, self._metrics.recall, partial(_limit_threads, 1))
        self._scrapes: tuple[WSGIServer, threading.Thread] | None = None
        self._recording = 0
        self._lookups = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="histories")
        self._registry = Registry(config.registry, storage_at(config.registry, config.cache))
        self._reloader = Reloader(
            self._registry,
            device=config.device,
            poll_seconds=config.poll_seconds,
            on_change=self._announce,
            on_refusal=self._metrics.snapshot_refused,
            # Loading may take its time; the calls beside it may not.
            prepare_thread=partial(_limit_threads, 1),
        )
        self._health = Health(SERVICE)
        self._following: asyncio.Task[None] | None = None
        self._stopping = False
        self._calls, self._health_alone, self._admin = self._open(interceptors)

    def _open(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> tuple[Port, Port | None, Port | None]:
        """The ports of calls, of health and of the admin service."""
        config, silence = self._config, round(1000 * self._config.keepalive_seconds)
        options = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            # A peer that is gone without a word, or takes nothing, is noticed by its silence.
            ("grpc.keepalive_time_ms", silence),
            ("grpc.keepalive_timeout_ms", silence),
            ("grpc.http2.ping_timeout_ms", silence),
            ("grpc.keepalive_permit_without_calls", 1),
            # Answers that nobody reads lie in memory, too.
            ("grpc.max_concurrent_streams", config.capacity + _STREAMS_BEYOND),
        ]
        credentials = server_credentials(config.tls) if config.tls is not None else None

        def handlers(service: ServiceDescriptor, methods: dict[str, Method], file: Path | None) -> Any:
            tokens = Tokens(file) if file is not None else None
            certificates = config.tls is not None and config.tls.client_ca is not None
            return handlers_of(service, methods, metrics=self._metrics, tokens=tokens, certificates=certificates)

        calls, health, admin = Port(config.host, config.port, credentials, options, interceptors), None, None
        calls.offer(SERVICE, handlers(_DESCRIPTOR, self._methods(), config.tokens))
        calls.offer_health(self._health)
        if config.health_port is not None:
            health = Port(config.host, config.health_port, None, options)
            health.offer_health(self._health)
        if config.admin is not None:
            admin = Port(config.admin.host, config.admin.port, credentials, options, interceptors)
            methods = Admin(self._registry, self._reloader).methods
            admin.offer(ADMIN_DESCRIPTOR.full_name, handlers(ADMIN_DESCRIPTOR, methods, config.admin.tokens))
        for port in (calls, admin):
            if port is not None and config.reflection:
                port.offer_reflection()
        return calls, health, admin

    @property
    def address(self) -> str:
        """HOST:PORT that a client on this machine can use."""
        return self._calls.address

    @property
    def health_address(self) -> str | None:
        """HOST:PORT of the health service alone; None if it has no port of its own."""
        return self._health_alone.address if self._health_alone is not None else None

    @property
    def admin_address(self) -> str | None:
        """HOST:PORT of the admin service; None if it is not offered."""
        return self._admin.address if self._admin is not None else None

    @property
    def _ports(self) -> list[Port]:
        return [port for port in (self._health_alone, self._calls, self._admin) if port is not None]

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the Prometheus metrics; None if none are served."""
        if self._scrapes is None:
            return None
        host = self._config.host
        return f"[{host}]:{self._scrapes[0].server_port}" if ":" in host else f"{host}:{self._scrapes[0].server_port}"

    async def start(self) -> None:
        """Listen, then try once to load the live snapshot; afterwards the registry is followed.

        Raises:
            InputError: a port is taken or the host is not this machine's.
        """
        self._serve_metrics()
        for port in self._ports:
            await port.start()
        await self._reloader.check()
        self._following = asyncio.create_task(self._reloader.follow())

    def _serve_metrics(self) -> None:
        port = self._config.metrics_port
        if port is None:
            return
        try:
            self._scrapes = start_http_server(port, self._config.host, self._metrics.registry)
        except OSError as error:
            raise InputError(f"{self._config.host}:{port}: cannot serve metrics there ({error.strerror})") from None
        _log.info("metrics at http://%s/metrics", self.metrics_address)

    def look(self) -> None:
        """Look at the registry now instead of at the next poll."""
        self._reloader.notify()

    async def _announce(self, serving: ServingSnapshot) -> None:
        self._metrics.snapshot(serving.version, serving.snapshot.manifest.created)
        if not self._stopping:
            self._health.set_serving(True)

    async def stop(self) -> None:
        """Turn the health service to NOT_SERVING, take calls for the drain time, finish those in hand, and close."""
        self._stopping = True
        self._health.set_serving(False)
        if self._following is not None:
            self._following.cancel()
            _log.info("not serving any more; taking calls for another %g s", self._config.drain_seconds)
            await asyncio.sleep(self._config.drain_seconds)
        self._health.close()
        await asyncio.gather(*(port.stop(self._config.grace_seconds) for port in self._ports))
        self._reloader.close()
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()
        self._recall.close()
        if self._scrapes is not None:
            server, thread = self._scrapes
            server.shutdown()
            server.server_close()
            thread.join()
        _log.info("stopped")

    def _methods(self) -> dict[str, Method]:
        return {
            "Retrieve": self._retrieve,
            "BatchRetrieve": self._batch_retrieve,
            "EmbedUsers": self._embed_users,
            "RecordEvents": self._record_events,
            "GetServingState": self._serving_state,
        }

    async def _retrieve(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        def decode() -> RetrieveRequest:
            return retrieve_request_from(parsed(pb.RetrieveRequest, content))

        answer, serving = await self._answer(decode, context, client)
        assert isinstance(answer, Retrieved)
        with self._metrics.stage("answer"):
            return retrieved_to(answer, string_ids=serving.string_ids).SerializeToString()

    async def _batch_retrieve(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        """Each request is a job of its own, so that clients take turns by request and not by call."""
        came = time.perf_counter()
        message = parsed(pb.BatchRetrieveRequest, content)
        self._service.check_batch(len(message.requests))
        loop, deadline = asyncio.get_running_loop(), _deadline(context)
        with self._batcher.slot(client, len(message.requests)):
            serving = self._reloader.live

            def prepare() -> list[Prepared | RetrievalError]:
                return self._service.prepare_batch(serving, batch_request_from(message), came)

            prepared = await loop.run_in_executor(self._lookups, prepare)
            self._metrics.took("decode", time.perf_counter() - came)
            outcomes = await asyncio.gather(*(self._outcome(one, deadline, client) for one in prepared))
        with self._metrics.stage("answer"):
            results = []
            for outcome in outcomes:
                results.append(result_to(outcome, string_ids=serving.string_ids))
                # Many long answers would hold up every other call.
                await asyncio.sleep(0)
            return pb.BatchRetrieveResponse(results=results).SerializeToString()

    async def _outcome(
        self, prepared: Prepared | RetrievalError, deadline: float | None, client: str
    ) -> Retrieved | Exception:
        """What becomes of one request of a BatchRetrieve: nothing that happens to it touches the others."""
        try:
            if isinstance(prepared, RetrievalError):
                raise prepared
            answer = await self._submit(prepared, deadline, client)
        except Exception as error:
            self._metrics.rejected(reason_of(error))
            return error
        assert isinstance(answer, Retrieved)
        return answer

    async def _embed_users(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        def decode() -> EmbedRequest:
            return embed_request_from(parsed(pb.EmbedUsersRequest, content))

        answer, _ = await self._answer(decode, context, client)
        assert isinstance(answer, Embedded)
        with self._metrics.stage("answer"):
            return embedded_to(answer).SerializeToString()

    async def _record_events(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        if self._recording >= self._config.capacity:
            raise OverloadedError(f"{self._recording} RecordEvents calls are in hand, as many as this server takes")
        self._recording += 1
        try:
            request = record_request_from(parsed(pb.RecordEventsRequest, content))
            answer, done = self._service.begin_recording(self._reloader.live, request)
            await asyncio.wrap_future(done)
        finally:
            self._recording -= 1
        return recorded_to(answer).SerializeToString()

    async def _serving_state(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        parsed(pb.GetServingStateRequest, content)
        return state_to(self._service.state(self._reloader.live)).SerializeToString()

    async def _answer(
        self, decode: Callable[[], RetrieveRequest | EmbedRequest], context: grpc.aio.ServicerContext, client: str
    ) -> tuple[Answer, ServingSnapshot]:
        """Answer a request, which is not even decoded where there is no slot for it: refusing must be cheap."""
        loop, start, deadline = asyncio.get_running_loop(), time.perf_counter(), _deadline(context)
        with self._batcher.slot(client):
            request, serving = decode(), self._reloader.live
            if isinstance(request, EmbedRequest) or isinstance(request.user, StoredUser):
                # Stored histories may block, and many users take long to check.
                prepared = await loop.run_in_executor(self._lookups, self._service.prepare, serving, request, start)
            else:
                prepared = self._service.prepare(serving, request, start)
            self._metrics.took("decode", time.perf_counter() - start)
            return await self._submit(prepared, deadline, client), serving

    async def _submit(self, prepared: Prepared, deadline: float | None, client: str) -> Answer:
        answer = await self._batcher.submit(prepared, deadline, client)
        if isinstance(prepared, PreparedRetrieve) and isinstance(answer, Retrieved):
            self._recall.offer(prepared, answer)
            if answer.shortfall:
                self._metrics.fell_short()
        return answer


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    """When a call's deadline passes, by the event loop's clock; None if it has none."""
    remaining = context.time_remaining()
    return asyncio.get_running_loop().time() + remaining if remaining is not None else None


def _limit_threads(threads: int | None) -> None:
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


async def _serve(
    config: ServerConfig, histories: HistoryStore | None, stop: asyncio.Event, on_ready: Callable[["Server"], object]
) -> None:
    """Run until `stop` is set; `on_ready` is called once the server has started."""
    with exported_traces() as interceptors:
        server = Server(config, histories, interceptors)
        try:
            await server.start()
            on_ready(server)
            await stop.wait()
        finally:
            await server.stop()


def run_server(
    config: ServerConfig, histories: HistoryStore | None = None, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the calls in hand and return. For a process's main thread.

    SIGHUP looks at the registry at once.

    Args:
        config: how to run.
        histories: stored histories; None refuses requests that name a stored user.
        on_ready: called with the server's address once it listens and has tried to load the live snapshot.

    Raises:
        InputError: the server cannot listen at the configured address.
    """

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        # From the beginning: a server that is still loading its first snapshot ends in order, too.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        # Whoever publishes just before the first look need not be heard: that look will see it.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)

        def ready(server: Server) -> None:
            # What is there by now stays: a full collection that walks over it holds every call up for tens of
            # milliseconds.
            gc.collect()
            gc.freeze()
            loop.add_signal_handler(signal.SIGHUP, server.look)
            if on_ready is not None:
                on_ready(server.address)

        await _serve(config, histories, stop, ready)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())


@contextmanager
def running_server(config: ServerConfig, histories: HistoryStore | None = None) -> Iterator[str]:
    """A server on a thread of this process while the block runs; gives its address. For demos and tests.

    Raises:
        InputError: the server cannot listen at the configured address.
    """
    started: Future[tuple[str, Callable[[], object]]] = Future()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        end = partial(loop.call_soon_threadsafe, stop.set)
        await _serve(config, histories, stop, lambda server: started.set_result((server.address, end)))

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="retrieval-server")
    thread.start()
    try:
        address, stop = started.result()
        try:
            yield address
        finally:
            stop()
    finally:
        thread.join()
