"""How many calls a client has open at once, so that an overloaded server is not asked what it would refuse."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from retrieval.rpc.errors import DeadlineError, OverloadedError

__all__ = ["Throttle"]

# Seconds without a refusal, the server's or ours, after which the limit is forgotten: it says nothing any more.
_FORGOTTEN = 5.0
# Seconds before the next call of a client that is refused even one at a time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Throttle:
    """A limit of a client's open calls that the server's refusals teach it. Any thread may use it.

    There is none until the server refuses a call. Then it is what is open without that call, and each further call that
    the server refuses, or does not answer before its deadline, takes its place with it. As many answers as calls are
    allowed make it one more. A call beyond the limit is refused here, at once, and costs the server nothing. Clients
    of one server thus come to share its room evenly, as senders do a link (additive increase, and a decrease in
    proportion to what one sends: Chiu and Jain 1989).

    What is limited is calls that are open, and not calls per second, since room for calls in hand is what the server
    lacks: when the load falls, or the server gets faster, fewer calls are open, the limit binds no more, and all are
    sent, at once.

    A client that is refused with a single call open waits before the next one, longer and longer, up to a second.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._open = 0
        self._limit: float | None = None
        self._refused = self._not_before = 0.0
        self._pause = _FIRST_PAUSE

    @property
    def limit(self) -> float | None:
        """Calls that may be open; None is any number."""
        return self._limit

    @contextmanager
    def call(self, calls: int = 1) -> Iterator[None]:
        """Count the block as so many open calls; how it ends tells whether the server took them.

        Raises:
            OverloadedError: they would be more than the limit. The block has not begun.
        """
        with self._lock:
            self._enter(calls)
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self._lock:
                self._leave(calls, error)

    def _enter(self, calls: int) -> None:
        if self._limit is not None:
            now = self._clock()
            if now - self._refused > _FORGOTTEN:
                self._limit = None
            # However many they are, they may go alone.
            elif now < self._not_before or (self._open and self._open + calls > self._limit):
                self._refused = now
                raise OverloadedError(
                    "not sent: the server refuses calls, and this client has as many open as it takes; try again later",
                    by_client=True,
                )
        self._open += calls

    def _leave(self, calls: int, error: BaseException | None) -> None:
        # A deadline that passes on a server that refuses nothing was too short.
        refused = isinstance(error, OverloadedError) or (self._limit is not None and isinstance(error, DeadlineError))
        limit = self._limit if self._limit is not None else float(self._open)
        if refused:
            self._refused = self._clock()
            if limit <= 1:
                self._not_before = self._refused + self._pause
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._limit = max(1.0, min(limit, self._open) - calls)
        elif error is None and self._limit is not None:
            self._pause = _FIRST_PAUSE
            # One that does not bind has nothing to learn.
            if 2 * self._open >= limit:
                self._limit = limit + calls / limit
        self._open -= calls
