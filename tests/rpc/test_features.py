"""Context, auxiliary series and asked actions over the wire: read as training reads them, never an error."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories, gather_training, user_histories
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import as_read, embed_users
from retrieval.errors import InvalidRequestError, SnapshotCorruptError
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import open_histories
from retrieval.rpc.client import Event, History, RetrievalClient, Source, StoredUser
from retrieval.rpc.requests import EmbedRequest
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from retrieval.types import JaggedBatch, TokenKind
from tests.rpc.world import MAX_LENGTH, START, USERS, World, histories, make_encoder, publish, string_ids
from tests.support import SideEvent, add_side, write_dataset
from tests.tolerances import assert_close

KINDS = (
    TokenKind(name="age", context=True, values=("18", "25")),
    TokenKind(name="region", context=False, values=("north", "south", "é")),
    TokenKind(name="device", context=False, values=("phone",)),
)
LATER = START + 10_000_000


def auxiliary(seed: int = 0) -> list[list[SideEvent]]:
    """With runs, with values that have no row, at times of events and between them."""
    rng, found = np.random.default_rng(seed), []
    for events in histories():
        times = sorted(int(events[at][2]) + int(rng.integers(-1, 2)) for at in rng.integers(0, len(events), 6))
        kinds = rng.integers(2, 4, 6)
        row = [
            (int(kind), int(rng.integers(0, 4 if kind == 2 else 2)), time)
            for kind, time in zip(kinds, times, strict=True)
        ]
        # As in a dataset: runs of equal values are their first event.
        last: dict[int, int] = {}
        kept = []
        for kind, value, time in row:
            if last.get(kind) != value:
                kept.append((kind, value, time))
            last[kind] = value
        found.append(kept)
    return found


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("rich")
    dataset = write_dataset(folder / "dataset", histories(), string_ids())
    dataset = add_side(dataset, KINDS, [[user % 3] for user in range(USERS)], auxiliary())
    encoder = make_encoder(kinds=tuple(kind.rows for kind in KINDS), query_actions=True)
    registry = Registry(folder / "registry")
    publish(registry, dataset, encoder)
    stored = open_histories(str(folder / "histories"))
    fill_histories(dataset, stored)
    return World(dataset, registry, encoder, stored)


@pytest.fixture(scope="module")
def rich_client(rich: World) -> Iterator[RetrievalClient]:
    with (
        running_server(ServerConfig(registry=rich.registry.location, port=0), rich.stored) as address,
        RetrievalClient(address, timeout=10) as client,
    ):
        yield client


def sent(rich: World, user: int, end: int) -> History:
    """What a client that keeps its own log sends just before the user's event `end`: raw, runs not compressed."""
    plain, begin = rich.history(user), int(rich.dataset.offsets[user])
    side = rich.dataset.side(np.array([user]), np.array([begin + end]))
    assert side is not None
    age = int(side.context[0, 0])
    context = {"age": KINDS[0].values[age - 1]} if age else {}
    series: dict[str, list[tuple[int, str]]] = {"region": [], "device": []}
    for at in range(int(side.starts[0]), int(side.ends[0])):
        kind, row = KINDS[side.kinds[at] - 1], int(side.values[at])
        series[kind.name] += 2 * [(int(side.timestamps[at]), kind.values[row - 1] if row else "mars")]
    return History(plain.items[:end], plain.timestamps[:end], plain.actions[:end], context, series)


def test_histories_of_sixteen_thousand_events_are_served_inline_and_stored(tmp_path: Path) -> None:
    """Through the limits on requests, read by a model that looks at some of them."""
    length, rng = 16_000, np.random.default_rng(0)
    events = [(int(item), 1, START + 60 * place) for place, item in enumerate(rng.integers(0, 300, length))]
    dataset = write_dataset(tmp_path / "d", [events, events[:3]], string_ids())
    shape = {"max_length": length, "read_length": 64, "read": "spread"}
    config = HSTUConfig.model_validate(make_encoder().config.model_dump() | shape)
    torch.manual_seed(0)
    encoder = HSTUEncoder(config).eval()
    registry = Registry(tmp_path / "registry")
    publish(registry, dataset, encoder)
    users, ends = np.array([0]), np.array([length])
    histories = gather_histories(dataset.events, np.array([0]), ends, np.array([LATER]), length)
    places = as_read(encoder, histories).timestamps
    assert len(places) == 64
    # Half of them are the last 32, the others lie evenly among the 15,968 before.
    assert (np.diff((places - START) // 60) == [499] * 31 + [250] + [1] * 31).all()
    expected = embed_users(encoder, user_histories(dataset, users, ends, np.array([LATER]), length))[0]
    ids = dataset.vocabulary.ids_of(dataset.events.items[:length].astype(np.int64))
    inline = History(ids, dataset.events.timestamps[:length].tolist(), ["like"] * length)
    with closing(open_histories(str(tmp_path / "h"), 16_000)) as stored:
        fill_histories(dataset, stored)
        server = ServerConfig(registry=registry.location, port=0)
        with running_server(server, stored) as address, RetrievalClient(address, timeout=20) as client:
            found = client.embed_users([inline, StoredUser(0)], request_time=LATER)
    assert found.events_read == [64, 64]
    for place in range(2):
        np.testing.assert_allclose(found.embedding(place), expected, atol=1e-5)


def test_a_served_sequence_is_the_trained_one_token_for_token(rich: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, serving = rich.dataset, rich.open()
    seen: list[JaggedBatch] = []
    embed = ServingSnapshot.embed

    def watched(self: ServingSnapshot, batch: JaggedBatch) -> NDArray[np.float32]:
        seen.append(batch)
        return embed(self, batch)

    monkeypatch.setattr(ServingSnapshot, "embed", watched)
    users = np.flatnonzero(np.diff(dataset.offsets) >= 2)
    ends = dataset.offsets[users + 1]
    side = dataset.side(users, ends - 1)
    trained = gather_training(
        dataset.events, dataset.offsets[users], ends, np.ones(3, np.float32), MAX_LENGTH, side
    ).inputs
    assert trained.kinds is not None
    assert set(trained.kinds.tolist()) == {0, 1, 2, 3}
    assert (np.diff(trained.offsets) == MAX_LENGTH).any()
    service = RetrievalService()
    for place, user in enumerate(users.tolist()):
        last = int(ends[place] - dataset.offsets[user]) - 1
        time = int(dataset.events.timestamps[ends[place] - 1])
        service.embed_users(serving, EmbedRequest(users=[sent(rich, user, last)], request_time=time))
        part = slice(int(trained.offsets[place]), int(trained.offsets[place + 1]))
        for field in ("kinds", "items", "actions", "timestamps", "query_times"):
            assert getattr(seen[-1], field).tolist() == getattr(trained, field)[part].tolist(), (user, field)


def test_inline_and_stored_histories_are_the_same_over_the_socket(rich: World, rich_client: RetrievalClient) -> None:
    service, serving = RetrievalService(rich.stored), rich.open()
    for user in (0, 5, 11, 29):
        inline = sent(rich, user, len(rich.history(user).items))
        fresh = History([], [], (), inline.context, inline.auxiliary)
        users: list[History | StoredUser] = [inline, StoredUser(user), StoredUser(user, fresh)]
        over = rich_client.embed_users(users, request_time=LATER, action="like")
        here = service.embed_users(serving, EmbedRequest(users=[inline], request_time=LATER, action="like"))
        for place in range(3):
            assert_close(torch.tensor(over.embedding(place)), torch.tensor(here.values), "embedding", "forward")
        assert over.events_read == [here.events_read[0]] * 3
        assert 0 < here.events_read[0] <= MAX_LENGTH - len(KINDS)


def test_what_is_recorded_beside_events_is_read_like_an_inline_history(
    rich: World, rich_client: RetrievalClient
) -> None:
    for user, name in ((5, 10_005), (29, 10_029)):
        inline = sent(rich, user, len(rich.history(user).items))
        points = [(time, series, value) for series, points in inline.auxiliary.items() for time, value in points]
        recorded = [
            Event(user_id=name, item_id=cast("int | str", item), timestamp=time, action=action)
            for item, time, action in zip(inline.items, inline.timestamps, inline.actions, strict=True)
        ]
        recorded += [Event(user_id=name, item_id=None, timestamp=t, auxiliary={series: v}) for t, series, v in points]
        recorded.append(
            Event(user_id=name, item_id=None, timestamp=LATER, context={**inline.context, "shoe size": "43"})
        )
        for _ in range(2):
            assert rich_client.record_events(recorded).unknown_items == 0
        over = rich_client.embed_users([inline, StoredUser(name)], request_time=LATER)
        assert over.embedding(0) == pytest.approx(over.embedding(1), abs=1e-6)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"item_id": None}, r"events\[0\].item_id: holds no id, and the event tells neither context nor auxiliary"),
        ({"context": {"age": "x" * 101}}, r"events\[0\].context\['age'\]: has 101 bytes; at most 100 are taken"),
        ({"auxiliary": {"é" * 51: ""}}, r"events\[0\].auxiliary\['é.*: has 102 bytes; at most 100 are taken"),
        ({"context": {str(name): "" for name in range(33)}}, r"events\[0\]: has 33 values of context and auxiliary"),
    ],
)
def test_what_cannot_be_recorded_is_named(rich_client: RetrievalClient, event: dict[str, Any], message: str) -> None:
    item = {"item_id": "x" if isinstance(string_ids()[0], str) else 1}
    with pytest.raises(InvalidRequestError, match=message):
        rich_client.record_events([Event(**{"user_id": 1, "timestamp": START} | item | event)])


def test_a_stored_user_that_is_not_known_is_answered_from_context(rich_client: RetrievalClient) -> None:
    answer = rich_client.retrieve(StoredUser(10**6, History([], [], (), {"age": "18"})), k=5, request_time=LATER)
    assert answer.source is Source.CONTEXT


def test_every_part_of_a_history_counts(rich: World, rich_client: RetrievalClient) -> None:
    items, times = rich.ids([3, 4]), [START, START + 100]
    variants: list[dict[str, Any]] = [
        {},
        {"context": {"age": "25"}},
        {"auxiliary": {"region": [(START + 50, "south")]}},
        {"auxiliary": {"region": [(START + 50, "north")]}},
        {"auxiliary": {"device": [(START + 50, "phone")]}},
    ]
    found = [rich_client.embed_users([History(items, times, **one)], request_time=LATER).values for one in variants]
    found.append(rich_client.embed_users([History(items, times)], request_time=LATER, action="skip").values)
    for place, one in enumerate(found):
        for other in found[:place]:
            assert np.abs(np.subtract(one, other)).max() > 1e-3


def test_what_the_snapshot_does_not_know_is_no_error(rich: World, rich_client: RetrievalClient) -> None:
    items, times = rich.ids([3, 4]), [START, START + 100]

    def values(context: dict[str, str], series: dict[str, list[tuple[int, str]]]) -> list[float]:
        return rich_client.embed_users([History(items, times, (), context, series)], request_time=LATER).values

    unknown = values({"age": "99"}, {"region": [(START, "mars")]})
    assert unknown == values({"age": "", "shoe size": "44"}, {"region": [(START, "pluto"), (START + 9, "venus")]})
    assert unknown != values({}, {})
    assert values({}, {}) == values({"age": "99"}, {"colour": [(START, "red")]})


def test_a_new_user_is_answered_from_context_and_says_so(rich: World, rich_client: RetrievalClient) -> None:
    answers = [
        rich_client.retrieve(History([], [], (), {"age": age}), k=5, request_time=LATER) for age in ("18", "25", "99")
    ]
    assert [answer.source for answer in answers] == [Source.CONTEXT, Source.CONTEXT, Source.POPULARITY]
    assert answers[0].items != answers[1].items
    series = History([], [], (), {}, {"device": [(START, "phone")]})
    assert rich_client.retrieve(series, k=5, request_time=LATER).source is Source.CONTEXT
    known = rich_client.retrieve(History(rich.ids([3]), [START]), k=5, request_time=LATER)
    assert known.source is Source.MODEL
    embedded = rich_client.embed_users([History([], [], (), {"age": "18"}), History([], [])], request_time=LATER)
    assert embedded.events_read == [0, 0]
    assert np.linalg.norm(embedded.embedding(0)) == pytest.approx(1, abs=1e-5)
    assert not any(embedded.embedding(1))


def test_the_state_says_what_is_read(rich_client: RetrievalClient, client: RetrievalClient) -> None:
    state = rich_client.serving_state()
    assert (state.context, state.auxiliary, state.query_actions) == (("age",), ("region", "device"), True)
    state = client.serving_state()
    assert (state.context, state.auxiliary, state.query_actions) == ((), (), False)


def test_a_snapshot_without_kinds_takes_any_and_reads_none(world: World, client: RetrievalClient) -> None:
    plain = world.history(5)
    rich = History(plain.items, plain.timestamps, plain.actions, {"age": "25"}, {"region": [(START, "north")]})
    answers = [client.embed_users([one], request_time=LATER).values for one in (plain, rich)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ([(5, "a"), (4, "b")], r"history\.auxiliary\['region'\]\.timestamps\[1\]: 4 is before 5"),
        ([(-1, "a")], r"history\.auxiliary\['region'\]\.timestamps\[0\]: -1 is not a time"),
        ([(1, "a")] * 20_001, r"history\.auxiliary: has 20001 events; at most 20000"),
        ([(1, 7)], r"context and auxiliary must hold strings and seconds"),
    ],
)
def test_series_that_cannot_be_are_refused(rich_client: RetrievalClient, series: list[Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        rich_client.retrieve(History([], [], (), {}, {"region": series}), k=3)


def test_actions_that_cannot_be_asked_for_are_refused(rich_client: RetrievalClient, client: RetrievalClient) -> None:
    with pytest.raises(
        InvalidRequestError, match="action: 'buy' is not an action of this snapshot; it has 'like', 'skip'"
    ):
        rich_client.retrieve(StoredUser(3), action="buy")
    with pytest.raises(InvalidRequestError, match="action: cannot be asked for"):
        client.retrieve(StoredUser(3), action="like")


def test_a_snapshot_whose_kinds_do_not_fit_its_encoder_is_refused(rich: World, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    version = publish(registry, rich.dataset, make_encoder(kinds=(3, 4, 9)))
    with pytest.raises(SnapshotCorruptError, match="other numbers of values than its encoder"):
        open_snapshot(registry.folder(version))
