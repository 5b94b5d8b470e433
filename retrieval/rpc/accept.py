"""A gRPC server that has several requests for calls open at once.

grpcio's server asks its core for one call, waits until the event loop is told of it by another thread, and asks for the
next. While the loop works, all other calls wait in the core, where nothing can be done for them together: of 64 callers
some 5 were in the server's hands. Here, the core may hand over a number of calls before the loop gets to the first.

To be removed once grpcio does so by itself. This leans on a class and a method of grpcio's that are not public; where
the method is not called any more, all is as it comes, and `tests/rpc/test_accept.py` tells.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpc._cython import cygrpc

__all__ = ["accepting_ahead"]

# Requests of each kind that are open; more hardly gain.
_OPEN = 16


class _Arrivals:
    """Calls of one kind, as they come."""

    def __init__(self) -> None:
        self.open = 0
        self._came: deque[asyncio.Future[Any]] = deque()
        self._awaited: deque[asyncio.Future[Any]] = deque()

    @property
    def waiting(self) -> int:
        """Calls that have come and that nobody has asked for yet."""
        return len(self._came)

    def arrived(self, call: "asyncio.Future[Any]") -> None:
        """One of the open requests is done."""
        self.open -= 1
        if not call.cancelled():
            # Looked at here, since nobody else may: a server that stops fails all that are open.
            call.exception()
        while self._awaited:
            waiter = self._awaited.popleft()
            if not waiter.done():
                _hand_over(call, waiter)
                return
        self._came.append(call)

    def next(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[Any]":
        """The next call, or the failure to get one."""
        waiter: asyncio.Future[Any] = loop.create_future()
        if self._came:
            _hand_over(self._came.popleft(), waiter)
        else:
            self._awaited.append(waiter)
        return waiter


def _hand_over(call: "asyncio.Future[Any]", waiter: "asyncio.Future[Any]") -> None:
    if call.cancelled():
        waiter.cancel()
    elif (error := call.exception()) is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(call.result())


class _Server(cygrpc.AioServer):
    def __init__(self, *args: object, **named: object) -> None:
        super().__init__(*args, **named)
        self._kinds: dict[bytes | None, _Arrivals] = {}
        self._stopping = False

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        """The next call of this registered method, or of any that is not: asked for by grpcio's loop over calls."""
        arrivals = self._kinds.setdefault(method, _Arrivals())
        while arrivals.open < _OPEN and not self._stopping:
            arrivals.open += 1
            super()._make_request_call_future(method).add_done_callback(arrivals.arrived)
        return arrivals.next(asyncio.get_running_loop())

    async def shutdown(self, grace: float | None) -> None:
        """As ever; but calls that have been taken are begun before that."""
        self._stopping = True
        while self.is_running() and any(arrivals.waiting for arrivals in self._kinds.values()):
            await asyncio.sleep(0)
        await super().shutdown(grace)


@contextmanager
def accepting_ahead() -> Iterator[None]:
    """Servers that are made while the block runs take calls ahead."""
    theirs = cygrpc.AioServer
    cygrpc.AioServer = _Server
    try:
        yield
    finally:
        cygrpc.AioServer = theirs
