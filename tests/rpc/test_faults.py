"""Faults of the surroundings: files that go, loads that overlap, a disk that is full, a clock that jumps."""

import shutil
import threading
from contextlib import closing
from pathlib import Path

import pytest

from retrieval.errors import HistoryStoreError
from retrieval.histories import embedded
from retrieval.histories.recorded import open_histories
from retrieval.rpc.client import Event, History, RetrievalClient, StoredUser
from retrieval.rpc.reload import Reloader
from retrieval.rpc.requests import RetrieveRequest
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from tests.rpc.test_reload import config, registry, until, version_of
from tests.rpc.world import START, World, make_encoder, publish

__all__ = ["registry"]

DAY = 86_400


def test_a_version_whose_files_are_gone_goes_on_answering_until_the_next(
    integer_world: World, registry: Registry
) -> None:
    first = publish(registry, integer_world.dataset, make_encoder(1))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=10) as client:
        before = client.retrieve(integer_world.history(9), k=5, request_time=START)
        shutil.rmtree(registry.folder(first))
        assert client.retrieve(integer_world.history(9), k=5, request_time=START) == before
        second = publish(registry, integer_world.dataset, make_encoder(2))
        until(lambda: version_of(client) == second)


def test_loads_never_overlap_and_the_last_version_wins(
    integer_world: World, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, open_, loading, most = Reloader._load, threading.Event(), [0], [0]
    begun = threading.Event()

    def slow(self: Reloader, version: str) -> ServingSnapshot:
        loading[0] += 1
        most[0] = max(most[0], loading[0])
        begun.set()
        assert open_.wait(20)
        loaded = load(self, version)
        loading[0] -= 1
        return loaded

    publish(registry, integer_world.dataset, make_encoder(1))
    with running_server(config(registry)) as address, RetrievalClient(address, timeout=10) as client:
        monkeypatch.setattr(Reloader, "_load", slow)
        publish(registry, integer_world.dataset, make_encoder(2))
        assert begun.wait(20)
        last = publish(registry, integer_world.dataset, make_encoder(3))
        # Calls are answered meanwhile.
        assert client.retrieve(History([], []), k=1).snapshot_version != last
        open_.set()
        until(lambda: version_of(client) == last)
    assert most == [1]


def test_a_store_that_is_full_refuses_events_and_loses_none(
    integer_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_ADDRESSES", 2**17)
    item = int(integer_world.ids([0])[0])
    server = ServerConfig(registry=integer_world.registry.location, port=0)
    acknowledged = 0
    with (
        closing(open_histories(str(tmp_path / "store"))) as store,
        running_server(server, store) as address,
        RetrievalClient(address, timeout=10) as client,
    ):

        def record_for_ever() -> None:
            nonlocal acknowledged
            for user in range(1000):
                events = [Event(user_id=user, item_id=item, timestamp=START + place) for place in range(50)]
                client.record_events(events)
                acknowledged += 1

        with pytest.raises(HistoryStoreError, match="the store of histories cannot be used at the moment"):
            record_for_ever()
        assert acknowledged > 10
        # Who asks for candidates is none the wiser.
        assert client.retrieve(StoredUser(0), k=3).shortfall == 0
        assert all(store.read(user) is not None for user in range(acknowledged))
        assert store.read(acknowledged) is None


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_a_clock_that_jumps_by_a_day_answers_as_if_asked_then(integer_world: World, jump: int) -> None:
    history = integer_world.history(9)
    now = [history.timestamps[-1] + 60]
    service, serving = RetrievalService(clock=lambda: now[0]), integer_world.open()
    ask = RetrieveRequest(user=history, k=5)
    before = service.retrieve(serving, ask)
    now[0] += jump
    at = max(now[0], history.timestamps[-1])
    expected = service.retrieve(serving, RetrieveRequest(user=history, k=5, request_time=at))
    assert service.retrieve(serving, ask) == expected
    now[0] -= jump
    assert service.retrieve(serving, ask) == before
