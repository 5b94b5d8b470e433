"""The server's event loop: uvloop's, with what keeps calls that are given up from leaving memory behind.

grpcio frees what it lent its core for an operation only if the coroutine that waits for the operation goes on normally
(grpc/grpc#43360, unmended in 1.85.3). A caller who gives up ends it otherwise, by an exception or by cancelling the
call's task, and 96 bytes are lost; lying between what is freed, they also keep the allocator from giving pages back.
Here, such an operation ends normally, and a cancellation waits for it, which is not long: the call is over.

To be removed once grpcio frees them by itself; `tests/rpc/test_loop.py` tells.
"""

import asyncio
from collections.abc import Coroutine, Generator
from contextvars import Context
from typing import Any

from grpc._cython.cygrpc import ExecuteBatchError

__all__ = ["new_event_loop"]

# Names of grpcio's coroutines: around a call's handler, and around an operation of the core.
_CALL, _OPERATION = "_handle_exceptions", "execute_batch"


class _Future(asyncio.Future[Any]):
    def set_exception(self, exception: type | BaseException) -> None:
        """As ever; but an operation of the core that fails has ended, and who waits for it looks at what it gave."""
        if isinstance(exception, ExecuteBatchError):
            self.set_result(None)
        else:
            super().set_exception(exception)


class _CallTask(asyncio.Task[Any]):
    def cancel(self, msg: Any | None = None) -> bool:
        """As ever; but not while an operation of the core is under way."""
        if _innermost(self.get_coro()) != _OPERATION:
            return super().cancel(msg)
        waiter: asyncio.Future[Any] | None = self._fut_waiter  # type: ignore[attr-defined]
        if waiter is None or waiter.done():
            # The task goes on before this.
            self.get_loop().call_soon(self.cancel, msg)
        else:
            waiter.add_done_callback(lambda _: self.cancel(msg))
        return True


def _innermost(waiting: object) -> str:
    """Name of the coroutine that a coroutine ends up waiting in."""
    name = ""
    while (inner := getattr(waiting, "cr_await", None)) is not None:
        name, waiting = getattr(waiting, "__name__", ""), inner
    return name


def _task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
    context: Context | None = None,
) -> asyncio.Future[Any]:
    kind = _CallTask if getattr(coroutine, "__name__", "") == _CALL else asyncio.Task
    return kind(coroutine, loop=loop, context=context)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop for a server."""
    try:
        import uvloop
    except ModuleNotFoundError:
        # Not made for Windows.
        base: type[asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
    else:
        base = uvloop.Loop

    class Loop(base):  # type: ignore[misc, valid-type]
        def create_future(self) -> asyncio.Future[Any]:
            return _Future(loop=self)

    loop = Loop()
    loop.set_task_factory(_task)
    return loop
