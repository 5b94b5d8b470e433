"""Following a registry: the live snapshot in memory, replaced without a pause when another is published."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from retrieval.errors import NoSnapshotError, RetrievalError
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

__all__ = ["Reloader"]

_log = logging.getLogger(__name__)

# A snapshot that cannot be loaded is tried again after 1, 2, 4, … polls: verifying one reads all of its bytes.
_LONGEST_PAUSE = 32


class Reloader:
    """Holds the snapshot that answers, and looks for its successor.

    A new version is verified, loaded and warmed on another thread; then one reference changes. Who took the old
    snapshot keeps it until done. One that cannot be loaded is logged, and the old one stays.

    Args:
        registry: where snapshots are published.
        device: where encoders run.
        poll_seconds: mean time between two looks at the registry.
        on_change: awaited after each change of the live snapshot.
        on_refusal: called each time that a snapshot could not be loaded.
        prepare_thread: called on the loading thread before its first load.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        device: str = "cpu",
        poll_seconds: float = 5.0,
        on_change: Callable[[ServingSnapshot], Awaitable[None]] | None = None,
        on_refusal: Callable[[], None] | None = None,
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-snapshot", initializer=prepare_thread)
        self._registry, self._device, self._poll_seconds = registry, device, poll_seconds
        self._on_change, self._on_refusal = on_change, on_refusal
        # Of its own: a program's seeded global generator is not ours to advance.
        self._random = random.Random()
        self._live: ServingSnapshot | None = None
        self._failed_version: str | None = None
        self._failures = 0
        self._polls_to_skip = 0
        self._last_complaint = ""
        self._changing = asyncio.Lock()
        self._notified = asyncio.Event()

    @property
    def live(self) -> ServingSnapshot:
        """The snapshot that answers.

        Raises:
            NoSnapshotError: none has been loaded yet.
        """
        if self._live is None:
            raise NoSnapshotError("no snapshot is loaded yet")
        return self._live

    @property
    def serving_version(self) -> str:
        """Name of the snapshot that answers; "" while there is none."""
        return self._live.version if self._live is not None else ""

    @property
    def problem(self) -> str:
        """Why the latest look at the registry did not end with its current version live; "" if it did."""
        return self._last_complaint

    async def follow(self) -> None:
        """Look at the registry again and again, until cancelled."""
        while True:
            # Jitter: replicas that were started together must not all read a new snapshot at the same moment.
            pause = self._poll_seconds * self._random.uniform(0.8, 1.2)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._notified.wait(), pause)
            self._notified.clear()
            await self.check()

    def notify(self) -> None:
        """Let `follow` look now, even at a version that could not be loaded before."""
        self._polls_to_skip = 0
        self._notified.set()

    async def refresh(self) -> None:
        """As `check`, even at a version that could not be loaded before."""
        self._polls_to_skip = 0
        await self.check()

    async def activate(self, version: str | None) -> str:
        """Load a version, make it the registry's current one, and serve it. If that fails, nothing has changed.

        Args:
            version: its name; None is the newest before the current one.

        Returns:
            The version that was current before; "" if there was none.

        Raises:
            UnknownVersionError: there is no such version.
            SnapshotError: it cannot be loaded, or the registry cannot be read or written.
        """
        loop = asyncio.get_running_loop()
        async with self._changing:
            left, loaded = await loop.run_in_executor(self._loader, self._load_to_activate, version)
            await loop.run_in_executor(self._loader, self._registry.activate, loaded.version)
            await self._take(loaded)
            return left

    def _load_to_activate(self, version: str | None) -> tuple[str, ServingSnapshot]:
        """The current version, and the one that is to be, loaded."""
        try:
            left = self._registry.current()
        except NoSnapshotError:
            left = ""
        version = version if version is not None else self._registry.previous()
        live = self._live
        return left, live if live is not None and live.version == version else self._load(version)

    async def check(self) -> None:
        """Look at the registry once and load what is new. Never raises: what goes wrong is logged."""
        async with self._changing:
            await self._check()

    async def _check(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            version = await loop.run_in_executor(self._loader, self._registry.current)
        except Exception as error:
            self._complain(error)
            return
        if self._live is not None and version == self._live.version:
            self._failed_version, self._last_complaint = None, ""
            return
        if version == self._failed_version and self._polls_to_skip > 0:
            self._polls_to_skip -= 1
            return
        try:
            loaded = await loop.run_in_executor(self._loader, self._load, version)
        except Exception as error:
            self._failures = self._failures + 1 if version == self._failed_version else 1
            self._failed_version = version
            self._polls_to_skip = min(2 ** (self._failures - 1), _LONGEST_PAUSE) - 1
            if self._on_refusal is not None:
                self._on_refusal()
            self._complain(error)
            return
        await self._take(loaded)

    async def _take(self, loaded: ServingSnapshot) -> None:
        """Let a loaded snapshot answer."""
        changed = loaded is not self._live
        self._live, self._failed_version, self._last_complaint = loaded, None, ""
        if not changed:
            return
        _log.info("serving snapshot %s (%d items)", loaded.version, int(loaded.snapshot.served.sum()))
        if self._on_change is not None:
            await self._on_change(loaded)

    def close(self) -> None:
        """End the loading thread, after the load that it may be at."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _load(self, version: str) -> ServingSnapshot:
        return ServingSnapshot(open_snapshot(self._registry.folder(version), self._device))

    def _complain(self, error: Exception) -> None:
        """Log a failure once, not at every poll."""
        sentence = str(error) or repr(error)
        if sentence == self._last_complaint:
            return
        self._last_complaint = sentence
        stays = f"{self._live.version} stays live" if self._live is not None else "no snapshot is live"
        if isinstance(error, NoSnapshotError):
            _log.warning("%s; %s", sentence, stays)
        else:
            unexpected = error if not isinstance(error, RetrievalError) else None
            _log.error("a snapshot could not be loaded: %s; %s", sentence, stays, exc_info=unexpected)
