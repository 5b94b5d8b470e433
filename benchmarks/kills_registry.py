"""Two processes publish to one S3 registry without end and are killed at random: what is live is always whole.

    python -m benchmarks.kills_registry --kills 200

Starts an S3 server of its own on a free port. Checks after every pair of kills, in a process that sees the registry for
the first time, that the live version opens and that no number was given twice; at the end, that the next publication
goes live, that every version opens, and that nothing of the killed ones is left. Times nothing.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import obstore
from moto.server import ThreadedMotoServer

from retrieval.errors import RegistryBusyError, SnapshotConflictError
from retrieval.snapshot.manifest import version_number
from retrieval.snapshot.object_storage import ObjectStorage, object_store
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.s3 import make_bucket, settings
from tests.snapshot.make import publish

# Short, so that the lease of the killed is free again soon.
LEASE_SECONDS = 0.5


def open_registry(url: str, cache: Path) -> Registry:
    """The registry as a new process sees it."""
    return Registry(url, ObjectStorage(url, object_store(url), cache, lease_seconds=LEASE_SECONDS))


def publish_for_ever(url: str, cache: Path) -> None:
    """What the processes do that are killed."""
    registry = open_registry(url, cache)
    print("ready", flush=True)
    seed = 0
    while True:
        seed += 1
        try:
            publish(registry, seed)
        except (RegistryBusyError, SnapshotConflictError):
            continue


def kill_pair(url: str, root: Path, chance: random.Random) -> None:
    """Start two processes and kill both, each at a moment of its own."""
    command = [sys.executable, "-m", "benchmarks.kills_registry", "--publish-to", url]
    processes = [
        subprocess.Popen([*command, "--cache", str(root / f"publisher-{number}")], stdout=subprocess.PIPE)
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        time.sleep(chance.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--publish-to", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.publish_to:
        publish_for_ever(parsed.publish_to, parsed.cache)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= settings(f"http://{host}:{port}")
    url, chance = make_bucket(f"http://{host}:{port}"), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        publish(open_registry(url, root / "first"))
        for kills in range(2, parsed.kills + 1, 2):
            kill_pair(url, root, chance)
            registry = open_registry(url, root / f"after-{kills}")
            open_snapshot(registry.folder(registry.current()))
            numbers = [version_number(version) for version in registry.versions()]
            assert len(set(numbers)) == len(numbers), numbers
        registry = open_registry(url, root / "last")
        assert publish(registry) == registry.current()
        versions = registry.versions()
        for version in versions:
            open_snapshot(registry.folder(version))
        names = {entry["path"].partition("/")[0] for page in obstore.list(object_store(url)) for entry in page}
        assert names == {*versions, "CURRENT", "LEASE"}, names
        print(f"{parsed.kills} kills, {len(versions)} versions: the live one was always whole, nothing is left over")
    server.stop()


if __name__ == "__main__":
    main()
