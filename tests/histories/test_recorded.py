"""The contract of a store of histories, the same for a folder and for Redis."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.errors import HistoryCorruptError, HistoryStoreError, InputError
from retrieval.histories.codec import event_digest
from retrieval.histories.embedded import EmbeddedBlobs
from retrieval.histories.event import Event
from retrieval.histories.recorded import MAX_EVENTS, MAX_ID_BYTES, RecordedHistories, open_histories
from retrieval.histories.store import HistoryStore, StoredHistory
from tests.histories.redis_server import running_redis
from tests.histories.test_codec import Oracle

Place = Callable[[], str]


def plain(history: StoredHistory | None) -> list[tuple[int | str, str, int]] | None:
    if history is None:
        return None
    return [
        (item, action, time)
        for item, action, time in zip(history.items, history.actions, history.timestamps.tolist(), strict=True)
    ]


# Ids that differ by kind, by a zero, by a prefix, by sign; and the name under which a store keeps its settings.
USERS: list[int | str] = [
    0,
    7,
    -7,
    2**63 - 1,
    -(2**63),
    "7",
    "",
    "\0",
    "a",
    "a\0",
    "aa",
    "Zoë",
    "\0settings",
    "settings",
]
EVENTS = st.builds(
    Event,
    user_id=st.sampled_from(USERS),
    item_id=st.integers(-3, 3),
    timestamp=st.integers(0, 8),
    action=st.sampled_from(["", "like"]),
    event_id=st.sampled_from(["", "", "x", "y", "z"]),
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(st.lists(EVENTS, max_size=8), max_size=12), bound=st.integers(1, 5))
def test_a_store_holds_what_the_oracle_holds(new_place: Place, calls: list[list[Event]], bound: int) -> None:
    oracles: dict[int | str, Oracle] = {}
    place = new_place()
    with closing(open_histories(place, bound)) as store:
        for call in calls:
            store.append(call).result(20)
            for event in call:
                assert event.item_id is not None
                oracle = oracles.setdefault(event.user_id, Oracle(bound))
                oracle.record((event.item_id, event.action, event.timestamp, event_digest(event.event_id)))
        expected = {user: [entry[:3] for entry in oracle.held] for user, oracle in oracles.items()}
        assert {user: plain(store.read(user)) for user in USERS} == {user: expected.get(user) for user in USERS}
    with closing(open_histories(place)) as store:
        assert store.max_events == bound
        assert {user: plain(store.read(user)) for user in USERS} == {user: expected.get(user) for user in USERS}


def test_items_may_have_strings_for_ids(new_place: Place) -> None:
    with closing(open_histories(new_place())) as store:
        store.append([Event(user_id=1, item_id=item, timestamp=1) for item in ("b", "é", "", "a")]).result(20)
        assert plain(store.read(1)) == [("b", "", 1), ("é", "", 1), ("", "", 1), ("a", "", 1)]
        assert store.max_events == MAX_EVENTS


def test_what_is_no_id_has_no_history(new_place: Place) -> None:
    with closing(open_histories(new_place())) as store:
        for user in (2**63, -(2**63) - 1, "\ud800", "x" * (MAX_ID_BYTES + 1), "é" * MAX_ID_BYTES):
            assert store.read(user) is None
        store.append([Event(user_id="x" * MAX_ID_BYTES, item_id=1, timestamp=1)]).result(20)
        assert plain(store.read("x" * MAX_ID_BYTES)) == [(1, "", 1)]


def test_many_writers_lose_nothing_and_readers_see_what_was_acknowledged(new_place: Place) -> None:
    with closing(open_histories(new_place())) as store, ThreadPoolExecutor(16) as pool:

        def record(number: int) -> None:
            user = number % 3
            store.append([Event(user_id=user, item_id=number, timestamp=5, event_id=f"e{number}")]).result(30)
            found = store.read(user)
            assert found is not None
            assert number in found.items

        list(pool.map(record, range(300)))
        for user in range(3):
            found = store.read(user)
            assert found is not None
            assert sorted(found.items) == list(range(user, 300, 3))


def test_two_processes_worth_of_writers_of_one_user_lose_nothing(new_place: Place, tmp_path: Path) -> None:
    """Replicas share a Redis; a folder is opened once per process, so the second writer is a process there."""
    place = new_place()
    events = [[Event(user_id=1, item_id=100 * who + number, timestamp=5) for number in range(60)] for who in range(2)]
    with closing(open_histories(place)) as first:
        if place.startswith("redis"):
            with closing(open_histories(place)) as second:
                waiting = [
                    store.append([event])
                    for pair in zip(*events, strict=True)
                    for store, event in zip((first, second), pair, strict=True)
                ]
                for done in waiting:
                    done.result(30)
        else:
            import multiprocessing

            other = multiprocessing.get_context("spawn").Process(target=_record_elsewhere, args=(place, events[1]))
            other.start()
            for event in events[0]:
                first.append([event]).result(30)
            other.join(60)
            assert other.exitcode == 0
        found = first.read(1)
        assert found is not None
        assert sorted(found.items) == [*range(60), *range(100, 160)]


def _record_elsewhere(place: str, events: Sequence[Event]) -> None:
    with closing(open_histories(place)) as store:
        for event in events:
            store.append([event]).result(30)


class Held:
    """A place of bytes in memory, whose writes wait until they are let through, or fail."""

    def __init__(self) -> None:
        self.contents: dict[bytes, bytes] = {}
        self.go, self.begun = threading.Event(), threading.Event()
        self.writes: list[int] = []
        self.go.set()

    def get(self, key: bytes) -> bytes | None:
        return self.contents.get(key)

    def update(self, keys: Sequence[bytes], change: Callable[[bytes, bytes | None], bytes]) -> None:
        self.begun.set()
        assert self.go.wait(20)
        self.writes.append(len(keys))
        self.contents |= {key: change(key, self.contents.get(key)) for key in keys}

    def close(self) -> None:
        pass


def event(user: int, item: int = 1) -> Event:
    return Event(user_id=user, item_id=item, timestamp=item)


def test_what_waits_while_a_write_runs_is_one_write() -> None:
    blobs = Held()
    store: HistoryStore = RecordedHistories(blobs)
    blobs.go.clear()
    blobs.begun.clear()
    done = [store.append([event(0)])]
    assert blobs.begun.wait(10)
    done += [store.append([event(user)]) for user in range(1, 101)]
    assert not any(one.done() for one in done)
    blobs.go.set()
    for one in done:
        one.result(10)
    assert blobs.writes == [1, 1, 100], "the settings, the first event, all others"
    store.close()


def test_an_append_that_was_cancelled_in_time_is_not_written() -> None:
    blobs = Held()
    store = RecordedHistories(blobs)
    blobs.go.clear()
    blobs.begun.clear()
    first = store.append([event(0)])
    assert blobs.begun.wait(10)
    second, third = store.append([event(1)]), store.append([event(2)])
    assert second.cancel()
    blobs.go.set()
    first.result(10)
    third.result(10)
    store.close()
    assert store.read(1) is None
    assert store.read(2) is not None


def test_one_users_damaged_history_refuses_nobody_elses_events() -> None:
    blobs = Held()
    store = RecordedHistories(blobs)
    store.append([event(1)]).result(10)
    (key,) = (key for key in blobs.contents if key.startswith(b"i"))
    blobs.contents[key] = b"rubbish"
    with pytest.raises(HistoryCorruptError):
        store.read(1)
    blobs.go.clear()
    blobs.begun.clear()
    waiting: list[Future[None]] = [store.append([event(0)])]
    assert blobs.begun.wait(10)
    waiting += [store.append([event(user)]) for user in (1, 2)]
    blobs.go.set()
    assert isinstance(waiting[1].exception(10), HistoryCorruptError)
    waiting[0].result(10)
    waiting[2].result(10)
    store.close()
    assert plain(store.read(2)) == [(1, "", 1)]


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    store = RecordedHistories(Held())
    done = [store.append([event(user)]) for user in range(50)]
    store.close()
    assert all(one.done() and one.exception() is None for one in done)
    with pytest.raises(HistoryStoreError, match="is closed"):
        store.append([event(1)])


@pytest.mark.parametrize("bound", [0, -1])
def test_a_store_keeps_at_least_one_event(new_place: Place, bound: int) -> None:
    with pytest.raises(InputError, match="max_events must be at least 1"):
        open_histories(new_place(), bound)


def test_another_bound_or_format_than_the_stores_is_refused(new_place: Place) -> None:
    place = new_place()
    open_histories(place, 5).close()
    open_histories(place, 5).close()
    with pytest.raises(InputError, match="was made for 5 events per user, not 6"):
        open_histories(place, 6)
    blobs = Held()
    blobs.contents[b"\0settings"] = b'{"format": 9, "max_events": 5}'
    with pytest.raises(InputError, match="has format 9; this version reads 2"):
        RecordedHistories(blobs)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a store of histories, and holds something else"):
        open_histories(str(tmp_path))
    with pytest.raises(InputError, match="is not a store of histories"):
        open_histories(str(tmp_path / "notes.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "dataset.json").touch()
    with pytest.raises(InputError, match="retrieval histories fill"):
        open_histories(str(tmp_path))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    open_histories(str(tmp_path)).close()
    (tmp_path / "data.mdb").write_bytes(b"rubbish" * 1000)
    with pytest.raises(HistoryStoreError, match="cannot be opened as a store of histories"):
        open_histories(str(tmp_path))


def test_a_write_is_all_or_nothing(tmp_path: Path) -> None:
    blobs = EmbeddedBlobs(tmp_path / "store")

    def half(key: bytes, _: bytes | None) -> bytes:
        if key == b"b":
            raise RuntimeError("full")
        return b"content"

    with pytest.raises(RuntimeError):
        blobs.update([b"a", b"b"], half)
    assert blobs.get(b"a") is None
    blobs.close()


def test_a_folders_writes_are_synced(tmp_path: Path) -> None:
    """A kill of the process cannot tell; only the loss of the machine's power could."""
    blobs = EmbeddedBlobs(tmp_path / "store")
    flags = blobs._environment.flags()
    assert (flags["sync"], flags["metasync"], flags["writemap"], flags["map_async"]) == (True, True, False, False)
    blobs.close()


def test_a_redis_that_would_forget_is_refused(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--appendonly", "yes", "--appendfsync", "everysec") as url:
        with pytest.raises(InputError, match="would lose acknowledged events in a crash; set `appendonly yes`"):
            open_histories(url)
        address, _, _ = url.partition("/0")
    with pytest.raises(HistoryStoreError, match=address.removeprefix("redis://")) as told:
        open_histories(url.replace("redis://", "redis://someone:secret@"))
    assert "secret" not in str(told.value)


def test_a_redis_that_goes_away_is_told_and_comes_back(tmp_path: Path) -> None:
    import redis

    with running_redis(tmp_path) as url:
        store = open_histories(url)
        store.append([event(1)]).result(20)
        with redis.Redis.from_url(url) as client:
            client.config_set("maxmemory", "1mb")
            with pytest.raises(HistoryStoreError):
                store.append([event(2)]).result(20)
            client.config_set("maxmemory", "0")
        store.append([event(2)]).result(20)
    with pytest.raises(HistoryStoreError):
        store.read(1)
    with pytest.raises(HistoryStoreError):
        store.append([event(1)]).result(60)
    store.close()


def test_the_address_of_a_redis_must_be_one() -> None:
    pytest.importorskip("redis", reason="the extra `redis` is not installed")
    with pytest.raises(InputError, match="is not the address of a Redis database"):
        open_histories("redis:nonsense")


def test_a_filled_store_reads_as_arrays(new_place: Place) -> None:
    with closing(open_histories(new_place())) as store:
        store.append([event(1, item) for item in (3, 1, 2)]).result(20)
        found = store.read(1)
    assert found is not None
    np.testing.assert_array_equal(found.items, [1, 2, 3])
    assert found.timestamps.dtype == np.int64
