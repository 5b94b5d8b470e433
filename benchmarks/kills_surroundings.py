"""Scenarios of `kills_rebuild` by what a night stands on: a store, a full disk, folders that stay as they are."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import retrieval.snapshot.object_storage as object_storage
from benchmarks.killed import started
from benchmarks.kills_world import Sweep, expect

__all__ = ["full", "readonly", "s3"]


def s3(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    from tests.s3 import make_bucket, settings

    port_file = sweep.root / "s3-port"
    port_file.unlink(missing_ok=True)

    def serve() -> int:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        port_file.with_suffix(".new").write_text(str(server.get_host_and_port()[1]))
        port_file.with_suffix(".new").rename(port_file)
        while os.getppid() == parent:
            time.sleep(0.5)
        return 0

    parent = os.getpid()
    server = started(serve, sweep.root / "s3-output")
    while not port_file.exists():
        time.sleep(0.1)
    endpoint = f"http://127.0.0.1:{port_file.read_text()}"
    os.environ |= settings(endpoint) | {"XDG_CACHE_HOME": str(sweep.root / "s3-caches")}
    bucket = make_bucket(endpoint).rsplit("/", 1)[0]

    def upload(url: str) -> int:
        import obstore

        store, folder = object_storage.object_store(url), sweep.start.folder / "registry"
        version = sweep.old["version"]
        for path in sorted((folder / version).iterdir(), key=lambda path: path.name == "manifest.json"):
            obstore.put(store, f"{version}/{path.name}", path.read_bytes())
        obstore.put(store, "CURRENT", (folder / "CURRENT").read_bytes())
        return 0

    def trial(number: int) -> int:
        url = f"{bucket}/trial-{number}"
        place = sweep.copy(f"s3-{number}", registry=url)
        expect(started(partial(upload, url), place.output()), 0)
        rng = random.Random(f"{sweep.seed}-s3-{number}")
        kills = sweep.random_deaths(rng, place, place.fork)
        sweep.check_end(place)
        sweep.done(place)
        return kills

    try:
        for number in range(trials):
            yield partial(trial, number)
    finally:
        server.kill_after(0)


def full(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""
    grown = _kib(sweep.root / "whole") - _kib(sweep.root / "start")

    def trial(number: int) -> int:
        place = sweep.copy(f"full-{number}")
        room = _kib(place.folder) + int((number + 0.5) * 1.5 * max(grown, 1000) / trials)
        shutil.move(place.folder, place.folder.with_name(f"{place.folder.name}-kept"))
        place.folder.mkdir()
        with _mounted("tmpfs", "tmpfs", place.folder, f"size={room}k"):
            shutil.copytree(
                place.folder.with_name(f"{place.folder.name}-kept"), place.folder, symlinks=True, dirs_exist_ok=True
            )
            code = expect(place.fork(), 0, 1, 2)
            sweep.check_live(place)
            subprocess.run(["mount", "-o", "remount,size=4g", str(place.folder)], check=True)
            sweep.check_end(place)
        sweep.done(place)
        return int(code != 0)

    for number in range(trials):
        yield partial(trial, number)


def readonly(sweep: Sweep, trials: int) -> Iterator[Callable[[], int]]:
    """See the module."""

    def trial(name: str) -> int:
        place = sweep.copy(f"readonly-{name}")
        folder = place.folder / name
        with _mounted("none", str(folder), folder, "bind"):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            code = expect(place.fork(), 1, 2)
            sweep.check_live(place)
        sweep.check_end(place)
        sweep.done(place)
        return int(code != 0)

    for name in ("registry", "work", "histories"):
        yield partial(trial, name)


@contextlib.contextmanager
def _mounted(kind: str, what: str, where: Path, options: str) -> Iterator[None]:
    command = ["mount", *(["-t", kind] if kind != "none" else []), "-o", options, what, str(where)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


def _kib(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*") if path.is_file()) // 2
