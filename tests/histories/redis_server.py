"""A Redis server of the test's own, durable at every write."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["running_redis"]


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[str]:
    """Run `redis-server` on a free port while the block runs; gives its URL. Skips where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    redis = pytest.importorskip("redis", reason="the extra `redis` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    durable: Sequence[str] = options or ("--appendonly", "yes", "--appendfsync", "always")
    command = [binary, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder), *durable]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            client = redis.Redis(port=port)
            end = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < end, "redis-server does not answer"
                    assert process.poll() is None, "redis-server ended"
                    time.sleep(0.02)
            client.close()
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
