"""Bytes by key in a Redis that several replicas share. Needs the extra `redis`."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

from retrieval.errors import HistoryStoreError, InputError
from retrieval.histories.blobs import Change

__all__ = ["SharedBlobs"]

_log = logging.getLogger(__name__)

_PREFIX = b"retrieval:history:"
_TIMEOUT_SECONDS = 2.0
# Replicas that write the same user at the same moment: each round, one of them succeeds.
_ROUNDS = 100

# Sets a key if it still has the content that was read, told by its SHA-1 ("" for none).
_COMPARE_AND_SET = """
local held = redis.call('GET', KEYS[1])
if (held and redis.sha1hex(held) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


class SharedBlobs:
    """A database of a Redis server (one server, or the primary of several).

    What is acknowledged is as durable as Redis keeps it, so the server must append to its file at every write.

    Args:
        url: `redis://[user:password@]host:port/database`, or `rediss://` with TLS.

    Raises:
        InputError: the URL is none, or Redis does not keep what it is given.
        HistoryStoreError: no Redis answers there.
    """

    def __init__(self, url: str) -> None:
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS
            )
        except ValueError as error:
            raise InputError(f"--histories: is not the address of a Redis database ({error})") from None
        address = self._redis.connection_pool.connection_kwargs
        # Never the URL, which may hold a password.
        self._name = f"redis at {address.get('host', address.get('path'))}:{address.get('port', '')}"
        self._compare_and_set = self._redis.register_script(_COMPARE_AND_SET)
        try:
            with self._told():
                self._check_durable()
        except BaseException:
            self._redis.close()
            raise

    def _check_durable(self) -> None:
        try:
            settings = self._redis.config_get("append*")
        except redis.ResponseError:
            _log.warning("%s does not tell whether it is durable: acknowledged events may be lost with it", self._name)
            return
        if (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
            raise InputError(
                f"{self._name}: would lose acknowledged events in a crash; set `appendonly yes` and "
                "`appendfsync always` in its configuration"
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise HistoryStoreError(f"{self._name}: {error}") from error

    def get(self, key: bytes) -> bytes | None:
        """See `Blobs`."""
        with self._told():
            content: Any = self._redis.get(_PREFIX + key)
        return content

    def update(self, keys: Sequence[bytes], change: Change) -> None:
        """See `Blobs`."""
        waiting = list(keys)
        for _ in range(_ROUNDS):
            if not waiting:
                return
            with self._told():
                waiting = self._round(waiting, change)
        raise HistoryStoreError(f"{self._name}: other writers changed the same users {_ROUNDS} times")

    def _round(self, keys: list[bytes], change: Change) -> list[bytes]:
        """Two round trips; gives the keys that somebody else wrote between them."""
        contents: list[Any] = self._redis.mget([_PREFIX + key for key in keys])
        tried: list[bytes] = []
        with self._redis.pipeline(transaction=False) as pipeline:
            for key, held in zip(keys, contents, strict=True):
                content = change(key, held)
                if content == held:
                    continue
                digest = hashlib.sha1(held, usedforsecurity=False).hexdigest() if held is not None else ""
                self._compare_and_set(keys=[_PREFIX + key], args=[digest, content], client=pipeline)
                tried.append(key)
            done = pipeline.execute() if tried else []
        return [key for key, set_ in zip(tried, done, strict=True) if not set_]

    def close(self) -> None:
        """See `Blobs`."""
        self._redis.close()
