"""The gRPC server: decoding and checking on the event loop, encoding and searching on one worker thread."""

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from wsgiref.simple_server import WSGIServer

import faiss
import grpc
import torch
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server
from pydantic import Field, model_validator

from retrieval.config import Config
from retrieval.errors import InputError, InvalidRequestError
from retrieval.histories.store import HistoryStore
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.batcher import Batcher
from retrieval.rpc.convert import (
    embed_request_from,
    embedded_to,
    record_request_from,
    recorded_to,
    retrieve_request_from,
    retrieved_to,
    state_to,
)
from retrieval.rpc.errors import OverloadedError
from retrieval.rpc.health import Health
from retrieval.rpc.logs import REQUEST_ID, request_id, request_id_of
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.prepare import Limits, PreparedRetrieve
from retrieval.rpc.recall import RecallSampler
from retrieval.rpc.reload import Reloader
from retrieval.rpc.requests import Embedded, EmbedRequest, Retrieved, RetrieveRequest, StoredUser
from retrieval.rpc.security import TlsFiles, Tokens, client_of, is_loopback, server_credentials
from retrieval.rpc.service import Answer, Prepared, RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.rpc.status import reason_of, status_of
from retrieval.rpc.tracing import exported_traces
from retrieval.snapshot.registry import Registry, storage_at

__all__ = ["SERVICE", "Server", "ServerConfig", "run_server", "running_server"]

_log = logging.getLogger(__name__)

_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["RetrievalService"]
SERVICE: str = _DESCRIPTOR.full_name

# Calls of one connection, over the server's capacity: above 1, so that calls beyond it are refused and do not wait in
# their client.
_STREAMS_PER_SLOT = 4

# Threads that wait for the history store, which may block on a disk.
_LOOKUP_THREADS = 4


class ServerConfig(Config):
    """How a server runs.

    Attributes:
        registry: folder or URL of snapshots to follow; it may be empty or missing at the start.
        cache: folder for copies of an object store's snapshots; None takes one in the user's cache folder.
        host: address to listen on; the default is reachable from this machine only. Another needs `tls`, or `insecure`.
        port: port to listen on; 0 takes a free one.
        tls: certificate files; None sends everything in the clear.
        tokens: file of bearer tokens (see `security.Tokens`); None takes anybody's calls. Health and reflection ask
            for none: probes have none, and what reflection tells is public.
        insecure: whether other machines may connect without encryption.
        reflection: whether the reflection service is offered.
        metrics_port: port of the Prometheus metrics, on the same host; 0 takes a free one, None serves none.
        device: where the encoder runs: "cpu", "cuda", "cuda:1".
        threads: CPU threads of encoding and searching; None leaves one core to the event loop. Without that, threads
            that wait for each other on a busy core make calls many times slower.
        poll_seconds: mean time between two looks at the registry.
        max_batch: calls that are encoded and searched together.
        capacity: calls in hand at once; further ones are refused. RecordEvents has as much to itself, so that a slow
            disk does not refuse a Retrieve.
        client_capacity: of these, calls of one client; None sets no such limit. A client is the name of a token, else
            of a certificate, else an address.
        drain_seconds: time after a stop is asked for in which calls are still taken, for load balancers to notice.
        grace_seconds: time that calls in hand get to finish after that.
        keepalive_seconds: a connection on which nothing comes for so long is asked for a sign of life, and closed if
            none comes in as long again.
        max_message_bytes: size of a request message.
        recall_share: share of Retrieve calls whose answer is compared with exact search, beside the serving.
        limits: what one call may ask for.
    """

    registry: Path | str
    cache: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    tls: TlsFiles | None = None
    tokens: Path | None = None
    insecure: bool = False
    reflection: bool = True
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    poll_seconds: float = Field(default=5.0, gt=0)
    max_batch: int = Field(default=64, ge=1)
    capacity: int = Field(default=256, ge=1)
    client_capacity: int | None = Field(default=None, ge=1)
    drain_seconds: float = Field(default=0.0, ge=0)
    grace_seconds: float = Field(default=10.0, ge=0)
    keepalive_seconds: float = Field(default=60.0, ge=1)
    max_message_bytes: int = Field(default=4 * 2**20, ge=1024)
    recall_share: float = Field(default=0.0, ge=0, le=1)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _encrypted_or_local(self) -> Self:
        if self.tls is None and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"{self.host} is reachable from other machines, but nothing would be encrypted; give a certificate and "
                "key (--tls-cert, --tls-key), or say --insecure"
            )
        return self


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
        self._credentials = server_credentials(config.tls) if config.tls is not None else None
        self._tokens = Tokens(config.tokens) if config.tokens is not None else None
        self._config = config
        self._metrics = Metrics()
        self._service = RetrievalService(histories, config.limits, metrics=self._metrics)
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
        self._reloader = Reloader(
            Registry(config.registry, storage_at(config.registry, config.cache)),
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
        self._port = 0
        options = [
            ("grpc.max_receive_message_length", config.max_message_bytes),
            # Otherwise a second server on a taken port would silently share its calls.
            ("grpc.so_reuseport", 0),
            # A peer that is gone without a word, or takes nothing, is noticed by its silence.
            ("grpc.keepalive_time_ms", round(1000 * config.keepalive_seconds)),
            ("grpc.keepalive_timeout_ms", round(1000 * config.keepalive_seconds)),
            ("grpc.http2.ping_timeout_ms", round(1000 * config.keepalive_seconds)),
            ("grpc.keepalive_permit_without_calls", 1),
            # Answers that nobody reads lie in memory: so many of a connection at most.
            ("grpc.max_concurrent_streams", _STREAMS_PER_SLOT * config.capacity),
        ]
        self._grpc = grpc.aio.server(options=options, interceptors=interceptors)
        self._grpc.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if config.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)

    @property
    def address(self) -> str:
        """HOST:PORT that a client on this machine can use."""
        return f"{self._host}:{self._port}"

    @property
    def _host(self) -> str:
        return f"[{self._config.host}]" if ":" in self._config.host else self._config.host

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT of the Prometheus metrics; None if none are served."""
        if self._scrapes is None:
            return None
        return f"{self._host}:{self._scrapes[0].server_port}"

    async def start(self) -> None:
        """Listen, then try once to load the live snapshot; afterwards the registry is followed.

        Raises:
            InputError: a port is taken or the host is not this machine's.
        """
        self._port = self._config.port
        try:
            if self._credentials is not None:
                self._port = self._grpc.add_secure_port(self.address, self._credentials)
            else:
                self._port = self._grpc.add_insecure_port(self.address)
        except RuntimeError:
            raise InputError(f"{self.address}: cannot listen there; is the port taken by another server?") from None
        self._serve_metrics()
        await self._grpc.start()
        _log.info("listening on %s", self.address)
        await self._reloader.check()
        self._following = asyncio.create_task(self._reloader.follow())

    def _serve_metrics(self) -> None:
        port = self._config.metrics_port
        if port is None:
            return
        try:
            self._scrapes = start_http_server(port, self._config.host, self._metrics.registry)
        except OSError as error:
            raise InputError(f"{self._host}:{port}: cannot serve metrics there ({error.strerror})") from None
        _log.info("metrics at http://%s/metrics", self.metrics_address)

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
        await self._grpc.stop(self._config.grace_seconds)
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

    def _handlers(self) -> grpc.GenericRpcHandler:
        methods = {
            "Retrieve": self._retrieve,
            "EmbedUsers": self._embed_users,
            "RecordEvents": self._record_events,
            "GetServingState": self._serving_state,
        }
        assert set(methods) == set(_DESCRIPTOR.methods_by_name)
        handlers = {name: self._unary(name, method) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _unary(
        self, name: str, method: "Callable[[bytes, grpc.aio.ServicerContext, str], Awaitable[bytes]]"
    ) -> grpc.RpcMethodHandler:
        """A handler from bytes to bytes: knows its client, counts its calls, ends failures with a status of ours."""
        certificates = self._config.tls is not None and self._config.tls.client_ca is not None

        async def call(content: bytes, context: grpc.aio.ServicerContext) -> bytes:
            start, code = time.perf_counter(), grpc.StatusCode.CANCELLED
            remaining = context.time_remaining()
            sent: Any = context.invocation_metadata()
            this = request_id_of(sent)
            request_id.set(this)
            try:
                client = client_of(context, self._tokens, certificates=certificates)
                answer = await method(content, context, client)
                code = grpc.StatusCode.OK
                context.set_trailing_metadata(((REQUEST_ID, this),))
                return answer
            except Exception as error:
                status = status_of(error)
                code = status.code
                self._metrics.rejected(reason_of(error))
            finally:
                seconds = time.perf_counter() - start
                if code is grpc.StatusCode.CANCELLED and remaining is not None and seconds >= remaining:
                    # gRPC cancels the handler of a call whose deadline passes.
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                self._metrics.call(name, code.name, seconds)
                _log.debug("%s ended with %s after %.2f ms", name, code.name, 1000 * seconds)
            await context.abort(status.code, status.details, (*status.trailing_metadata, (REQUEST_ID, this)))
            raise AssertionError("abort always raises")

        return grpc.unary_unary_rpc_method_handler(call)

    async def _retrieve(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        start = time.perf_counter()
        request = retrieve_request_from(_parsed(pb.RetrieveRequest, content))
        answer, serving = await self._answer(request, context, start, client)
        assert isinstance(answer, Retrieved)
        if answer.shortfall:
            self._metrics.fell_short()
        with self._metrics.stage("answer"):
            return retrieved_to(answer, string_ids=serving.string_ids).SerializeToString()

    async def _embed_users(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        start = time.perf_counter()
        request = embed_request_from(_parsed(pb.EmbedUsersRequest, content))
        answer, _ = await self._answer(request, context, start, client)
        assert isinstance(answer, Embedded)
        with self._metrics.stage("answer"):
            return embedded_to(answer).SerializeToString()

    async def _record_events(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        request = record_request_from(_parsed(pb.RecordEventsRequest, content))
        if self._recording >= self._config.capacity:
            raise OverloadedError(f"{self._recording} RecordEvents calls are in hand, as many as this server takes")
        self._recording += 1
        try:
            answer, done = self._service.begin_recording(self._reloader.live, request)
            await asyncio.wrap_future(done)
        finally:
            self._recording -= 1
        return recorded_to(answer).SerializeToString()

    async def _serving_state(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        _parsed(pb.GetServingStateRequest, content)
        return state_to(self._service.state(self._reloader.live)).SerializeToString()

    async def _answer(
        self, request: RetrieveRequest | EmbedRequest, context: grpc.aio.ServicerContext, start: float, client: str
    ) -> tuple[Answer, ServingSnapshot]:
        """Answer a request that began to be decoded at `start`."""
        loop = asyncio.get_running_loop()
        remaining = context.time_remaining()
        deadline = loop.time() + remaining if remaining is not None else None
        with self._batcher.slot(client):
            serving = self._reloader.live
            if isinstance(request, EmbedRequest) or isinstance(request.user, StoredUser):
                # Stored histories may block, and many users take long to check.
                prepared = await loop.run_in_executor(self._lookups, self._service.prepare, serving, request)
            else:
                prepared = self._service.prepare(serving, request)
            self._metrics.took("decode", time.perf_counter() - start)
            answer = await self._batcher.submit(prepared, deadline, client)
        if isinstance(prepared, PreparedRetrieve) and isinstance(answer, Retrieved):
            self._recall.offer(prepared, answer)
        return answer, serving


def _limit_threads(threads: int | None) -> None:
    """Set how many threads torch and Faiss use when they are called from this thread."""
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Fewer, if OMP_NUM_THREADS says so.
        threads = min(torch.get_num_threads(), max(1, cores - 1))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


_Message = TypeVar("_Message", bound=Message)


def _parsed(kind: type[_Message], content: bytes) -> _Message:
    try:
        return kind.FromString(content)
    except DecodeError:
        raise InvalidRequestError("request", f"is not a {kind.DESCRIPTOR.full_name} message") from None


async def _serve(
    config: ServerConfig, histories: HistoryStore | None, stop: asyncio.Event, on_ready: Callable[[str], object]
) -> None:
    """Run until `stop` is set."""
    with exported_traces() as interceptors:
        server = Server(config, histories, interceptors)
        try:
            await server.start()
            on_ready(server.address)
            await stop.wait()
        finally:
            await server.stop()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ModuleNotFoundError:
        # Not made for Windows.
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_server(
    config: ServerConfig, histories: HistoryStore | None = None, on_ready: Callable[[str], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then finish the calls in hand and return. For a process's main thread.

    Args:
        config: how to run.
        histories: stored histories; None refuses requests that name a stored user.
        on_ready: called with the server's address once it listens and has tried to load the live snapshot.

    Raises:
        InputError: the server cannot listen at the configured address.
    """

    async def serve() -> None:
        stop = asyncio.Event()
        # From the beginning: a server that is still loading its first snapshot ends in order, too.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await _serve(config, histories, stop, on_ready if on_ready is not None else lambda _: None)

    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
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
        await _serve(config, histories, stop, lambda address: started.set_result((address, end)))

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=_new_event_loop) as runner:
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
