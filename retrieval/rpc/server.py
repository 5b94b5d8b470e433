"""The gRPC server: its ports, the snapshot that it follows, and how it begins and ends."""

import asyncio
import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import start_http_server

from retrieval.errors import InputError
from retrieval.histories.store import HistoryStore
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.admin import ADMIN_DESCRIPTOR, Admin
from retrieval.rpc.calls import Calls, limit_threads
from retrieval.rpc.handler import Method, handlers_of
from retrieval.rpc.health import Health
from retrieval.rpc.loop import new_event_loop
from retrieval.rpc.metrics import Metrics
from retrieval.rpc.port import Port
from retrieval.rpc.reload import Reloader
from retrieval.rpc.security import Tokens, server_credentials
from retrieval.rpc.server_config import AdminConfig, ServerConfig
from retrieval.rpc.serving import ServingSnapshot
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
        self._scrapes: tuple[WSGIServer, threading.Thread] | None = None
        self._registry = Registry(config.registry, storage_at(config.registry, config.cache))
        self._reloader = Reloader(
            self._registry,
            device=config.device,
            poll_seconds=config.poll_seconds,
            on_change=self._announce,
            on_refusal=self._metrics.snapshot_refused,
            # Loading may take its time; the calls beside it may not.
            prepare_thread=partial(limit_threads, 1),
        )
        self._calls = Calls(config, histories, self._metrics, lambda: self._reloader.live)
        self._health = Health(SERVICE)
        self._following: asyncio.Task[None] | None = None
        self._stopping = False
        self._port, self._health_alone, self._admin = self._open(interceptors)

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
        calls.offer(SERVICE, handlers(_DESCRIPTOR, self._calls.methods, config.tokens))
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
        return self._port.address

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
        return [port for port in (self._health_alone, self._port, self._admin) if port is not None]

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
        self._calls.close()
        if self._scrapes is not None:
            server, thread = self._scrapes
            server.shutdown()
            server.server_close()
            thread.join()
        _log.info("stopped")


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
