"""Snapshots change under a running server."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval.errors import InvalidRequestError, NoSnapshotError
from retrieval.rpc.client import History, RetrievalClient, Retrieved
from retrieval.rpc.requests import RetrieveRequest
from retrieval.rpc.server import ServerConfig, run_server, running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.rpc.world import USERS, World, make_encoder, publish

POLL = 0.02
LATER = 20_000_000


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def config(registry: Registry) -> ServerConfig:
    return ServerConfig(registry=registry.location, port=0, poll_seconds=POLL)


def version_of(client: RetrievalClient) -> str:
    return client.serving_state(timeout=10).snapshot_version


def test_a_server_that_starts_without_a_snapshot_serves_the_first_that_is_published(
    integer_world: World, registry: Registry
) -> None:
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        assert not client.is_serving()
        version = publish(registry, integer_world.dataset, integer_world.encoder)
        client.wait_until_serving(20)
        assert client.retrieve(History([], []), k=1).snapshot_version == version


def test_the_first_snapshot_is_loaded_before_a_server_says_that_it_is_ready(integer_world: World) -> None:
    slow_poll = ServerConfig(registry=integer_world.registry.location, port=0, poll_seconds=3600)
    with running_server(slow_poll) as address, RetrievalClient(address) as client:
        assert client.is_serving()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "one bit flipped": lambda content: content[:-40] + bytes([content[-40] ^ 4]) + content[-39:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["index.faiss", "encoder.safetensors"])
def test_a_damaged_snapshot_is_refused_and_the_old_one_goes_on(
    integer_world: World, registry: Registry, caplog: pytest.LogCaptureFixture, damage: str, file: str
) -> None:
    first = publish(registry, integer_world.dataset, make_encoder(1))
    second = publish(registry, integer_world.dataset, make_encoder(2))
    path = registry.folder(second) / file
    content = path.read_bytes()
    registry.activate(first)
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        path.write_bytes(DAMAGE[damage](content))
        registry.activate(second)
        until(lambda: "a snapshot could not be loaded" in caplog.text)
        complaints = [record.message for record in caplog.records if record.levelname == "ERROR"]
        assert complaints == [
            record for record in complaints if str(path) in record and f"{first} stays live" in record
        ]
        assert client.retrieve(History([], []), k=1).snapshot_version == first
        assert client.is_serving()
        time.sleep(5 * POLL)
        assert caplog.text.count("a snapshot could not be loaded") == 1, "the same complaint is not repeated"
        path.write_bytes(content)
        until(lambda: version_of(client) == second)


def test_a_server_that_starts_on_a_damaged_snapshot_waits_for_a_good_one(
    integer_world: World, registry: Registry
) -> None:
    damaged = publish(registry, integer_world.dataset, make_encoder(1))
    index = registry.folder(damaged) / "index.faiss"
    index.write_bytes(index.read_bytes()[:-1])
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        with pytest.raises(NoSnapshotError, match="no snapshot is loaded yet"):
            client.retrieve(History([], []))
        good = publish(registry, integer_world.dataset, make_encoder(2))
        client.wait_until_serving(20)
        assert version_of(client) == good


def test_a_snapshot_whose_encoder_lacks_an_action_is_refused(
    integer_world: World, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry, integer_world.dataset, make_encoder(), actions=("", "like", "skip", "buy"))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        assert not client.is_serving()
    assert "names 4 actions, but its encoder knows 3; no snapshot is live" in caplog.text


def test_a_snapshot_without_actions_takes_any_name_and_one_that_ignores_them_knows_its_own(
    integer_world: World, registry: Registry
) -> None:
    history = History(integer_world.history(9).items, integer_world.history(9).timestamps)
    named = History(history.items, history.timestamps, ["buy"] * len(history.items))
    liked = History(history.items, history.timestamps, ["like"] * len(history.items))
    publish(registry, integer_world.dataset, make_encoder(num_actions=0), actions=("",))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        plain = client.retrieve(history, request_time=LATER)
        assert client.retrieve(named, request_time=LATER) == plain
        version = publish(registry, integer_world.dataset, make_encoder(num_actions=0))
        until(lambda: version_of(client) == version)
        with pytest.raises(InvalidRequestError, match=r"actions\[0\]: 'buy' is not an action"):
            client.retrieve(named, request_time=LATER)
        assert client.retrieve(liked, request_time=LATER) == client.retrieve(history, request_time=LATER)


def test_a_rollback_is_followed(integer_world: World, registry: Registry) -> None:
    first = publish(registry, integer_world.dataset, make_encoder(1))
    publish(registry, integer_world.dataset, make_encoder(2))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        assert version_of(client) != first
        registry.activate(first)
        until(lambda: version_of(client) == first)


def test_a_signal_lets_a_server_look_at_once(integer_world: World, registry: Registry) -> None:
    """The server runs in this process's main thread, as `retrieval serve` does; it never polls of itself."""
    first = publish(registry, integer_world.dataset, make_encoder(1))
    seen: list[str] = []

    def ask(address: str) -> None:
        try:
            with RetrievalClient(address, timeout=5) as client:
                seen.append(version_of(client))
                for version in (publish(registry, integer_world.dataset, make_encoder(2)), first):
                    registry.activate(version)
                    os.kill(os.getpid(), signal.SIGHUP)
                    until(lambda version=version: version_of(client) == version)  # type: ignore[misc]
                    seen.append(version)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    callers: list[threading.Thread] = []

    def ready(address: str) -> None:
        callers.append(threading.Thread(target=ask, args=(address,)))
        callers[0].start()

    run_server(config(registry).model_copy(update={"poll_seconds": 3600.0}), on_ready=ready)
    callers[0].join()
    assert len(seen) == 3
    assert seen[0] == seen[2] == first


def test_a_registry_that_disappears_leaves_the_snapshot_live(
    integer_world: World, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    version = publish(registry, integer_world.dataset, make_encoder(1))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=5) as client:
        Path(registry.location).rename(Path(registry.location).with_name("moved"))
        until(lambda: f"{version} stays live" in caplog.text)
        assert client.retrieve(History([], []), k=1).snapshot_version == version


def test_swaps_under_load_lose_no_call_and_mix_no_versions(integer_world: World, registry: Registry) -> None:
    """Callers hammer the server while six snapshots follow each other; every answer is its named version's."""
    versions = [publish(registry, integer_world.dataset, make_encoder(0))]
    answers: list[tuple[int, Retrieved]] = []
    failures: list[Exception] = []
    done = threading.Event()

    def hammer(client: RetrievalClient, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set():
            user = int(rng.integers(USERS))
            try:
                answers.append((user, client.retrieve(integer_world.history(user), k=10, request_time=LATER)))
            except Exception as error:
                failures.append(error)

    with running_server(config(registry)) as address, RetrievalClient(address, timeout=20) as client:
        callers = [threading.Thread(target=hammer, args=(client, seed)) for seed in range(6)]
        for caller in callers:
            caller.start()
        for seed in range(1, 6):
            versions.append(publish(registry, integer_world.dataset, make_encoder(seed)))
            until(lambda: bool(answers) and answers[-1][1].snapshot_version == versions[-1])
        done.set()
        for caller in callers:
            caller.join()
    assert failures == []
    assert {answer.snapshot_version for _, answer in answers} == set(versions)
    service = RetrievalService()
    servings = {version: ServingSnapshot(open_snapshot(registry.folder(version))) for version in versions}
    expected = {}
    for user, answer in answers:
        key = (answer.snapshot_version, user)
        if key not in expected:
            request = RetrieveRequest(user=integer_world.history(user), k=10, request_time=LATER)
            expected[key] = service.retrieve(servings[answer.snapshot_version], request)
        np.testing.assert_allclose(answer.scores, expected[key].scores, atol=1e-5)
        assert len(set(answer.items) & set(expected[key].items)) >= 9
