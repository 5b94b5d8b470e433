"""What Retrieve answers, over a real socket, against an oracle that scores every item."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.rpc.client import Embedding, History, RetrievalClient, Retrieved, Source, StoredUser
from retrieval.rpc.convert import retrieve_request_to
from retrieval.rpc.requests import RetrieveRequest
from tests.rpc.world import ITEMS, MAX_LENGTH, START, USERS, WIDTH, World

LATER = START + 10_000_000


def embedding_of(world: World, user: int, time: int) -> NDArray[np.float32]:
    dataset = world.dataset
    start, end = dataset.offsets[user : user + 1], dataset.offsets[user + 1 : user + 2]
    return embed_users(world.encoder, gather_histories(dataset.events, start, end, np.array([time]), MAX_LENGTH))


def seen_rows(world: World, user: int) -> NDArray[np.int64]:
    dataset = world.dataset
    return np.unique(dataset.events.items[dataset.offsets[user] : dataset.offsets[user + 1]]).astype(np.int64)


def assert_is_the_exact_answer(
    world: World, answer: Retrieved, user: int, k: int, time: int, excluded: NDArray[np.int64]
) -> None:
    query = embedding_of(world, user, time)
    vocabulary = world.dataset.vocabulary
    expected = np.sort(np.delete(item_vectors(world.encoder) @ query[0], excluded))[::-1][:k]
    np.testing.assert_allclose(answer.scores, expected, atol=2e-6)
    assert answer.shortfall == k - len(expected)
    # Each item has the score that is told for it: rounding may swap neighbours, but nothing more.
    rows = vocabulary.rows_of(answer.items)
    np.testing.assert_allclose(answer.scores, item_vectors(world.encoder)[rows] @ query[0], atol=2e-6)
    assert len(set(rows.tolist())) == len(rows)
    assert not np.isin(rows, excluded).any()


@pytest.mark.parametrize("user", [0, 1, MAX_LENGTH - 1, MAX_LENGTH, 29])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_an_inline_history_gets_the_models_nearest_items(
    world: World, client: RetrievalClient, user: int, exclude_seen: bool
) -> None:
    answer = client.retrieve(world.history(user), k=20, request_time=LATER, exclude_seen=exclude_seen)
    excluded = seen_rows(world, user) if exclude_seen else np.empty(0, np.int64)
    assert_is_the_exact_answer(world, answer, user, 20, LATER, excluded)
    assert answer.source is Source.MODEL
    assert answer.snapshot_version == world.registry.current()
    assert (answer.shortfall, answer.unknown_items, answer.titles) == (0, 0, [])


@pytest.mark.parametrize("user", range(0, USERS, 7))
def test_a_stored_user_gets_what_its_history_sent_inline_gets(world: World, client: RetrievalClient, user: int) -> None:
    inline = client.retrieve(world.history(user), k=30, request_time=LATER, exclude_seen=True)
    assert client.retrieve(StoredUser(user), k=30, request_time=LATER, exclude_seen=True) == inline


def test_a_ready_embedding_of_any_length_gets_what_its_history_gets(world: World, client: RetrievalClient) -> None:
    embedded = client.embed_users([world.history(5)], request_time=LATER)
    answer = client.retrieve(Embedding([7.5 * value for value in embedded.embedding(0)]), k=20)
    inline = client.retrieve(world.history(5), k=20, request_time=LATER)
    assert answer.items == inline.items
    np.testing.assert_allclose(answer.scores, inline.scores, atol=1e-6)


def test_ids_come_back_as_they_went_in(world: World, client: RetrievalClient) -> None:
    answer = client.retrieve(world.history(3), k=10_000)
    assert sorted(answer.items) == sorted(world.ids(np.arange(ITEMS)))
    assert {type(item) for item in answer.items} == {type(world.ids([0])[0])}


def test_k_beyond_the_catalogue_answers_everything_and_tells_the_shortfall(
    world: World, client: RetrievalClient
) -> None:
    answer = client.retrieve(world.history(8), k=ITEMS + 50, exclude_seen=True, request_time=LATER)
    seen = seen_rows(world, 8)
    assert len(answer.items) == ITEMS - len(seen)
    assert answer.shortfall == 50 + len(seen)
    assert_is_the_exact_answer(world, answer, 8, ITEMS + 50, LATER, seen)


def test_exclusions_hold_with_repeats_and_unknown_ids_among_them(world: World, client: RetrievalClient) -> None:
    best = client.retrieve(world.history(8), k=10, request_time=LATER)
    unknown = "no such item" if isinstance(best.items[0], str) else -(2**62)
    exclude = [*best.items[:5], *best.items[:5], unknown]
    answer = client.retrieve(world.history(8), k=5, request_time=LATER, exclude=exclude)
    assert answer.items == best.items[5:]
    everything = client.retrieve(world.history(8), k=5, exclude=world.ids(np.arange(ITEMS)))
    assert (everything.items, everything.scores, everything.shortfall) == ([], [], 5)
    rest = client.retrieve(world.history(8), k=ITEMS, exclude=exclude)
    assert (len(rest.items), rest.shortfall) == (ITEMS - 5, 5)


def test_exclude_seen_reaches_back_beyond_what_the_encoder_reads(world: World, client: RetrievalClient) -> None:
    user = 29
    seen = set(world.ids(seen_rows(world, user)))
    assert len(world.history(user).items) > 2 * MAX_LENGTH
    assert seen.isdisjoint(client.retrieve(StoredUser(user), k=ITEMS, exclude_seen=True).items)
    assert seen.isdisjoint(client.retrieve(world.history(user), k=ITEMS, exclude_seen=True).items)


def test_unknown_items_of_a_history_are_counted_and_change_nothing_else(world: World, client: RetrievalClient) -> None:
    history = world.history(20)
    unknown: int | str = "no such item" if world.dataset.vocabulary.has_string_ids else 4_000_000_000_000_000_000
    mixed = History(
        [unknown, *history.items[:9], unknown, unknown, *history.items[9:], unknown],
        [0, *history.timestamps[:9], *[history.timestamps[9]] * 2, *history.timestamps[9:], LATER - 1],
        ["like", *history.actions[:9], "", "skip", *history.actions[9:], "like"],
    )
    plain = client.retrieve(history, k=20, request_time=LATER, exclude_seen=True)
    answer = client.retrieve(mixed, k=20, request_time=LATER, exclude_seen=True)
    assert answer.items == plain.items
    np.testing.assert_allclose(answer.scores, plain.scores, atol=1e-6)
    assert (answer.unknown_items, plain.unknown_items) == (4, 0)


@pytest.mark.parametrize("history", ["empty", "unknown"])
def test_without_a_known_item_the_answer_is_what_is_popular(
    world: World, client: RetrievalClient, history: str
) -> None:
    unknown: list[str] | list[int] = ["?", "??"] if world.dataset.vocabulary.has_string_ids else [2**62, 2**62 + 1]
    sent = History([], []) if history == "empty" else History(unknown, [5, 5])
    counts = world.dataset.item_counts
    rank = world.dataset.vocabulary.rank_by_id
    order = sorted(range(ITEMS), key=lambda row: (-counts[row], rank[row]))
    answer = client.retrieve(sent, k=7, exclude_seen=True)
    assert answer.items == world.ids(order[:7])
    np.testing.assert_allclose(answer.scores, counts[order[:7]] / counts.sum(), rtol=1e-6)
    assert answer.source is Source.POPULARITY
    assert answer.unknown_items == len(sent.items)
    without = client.retrieve(sent, k=ITEMS, exclude=world.ids(order[:3]))
    assert without.items == world.ids(order[3:])
    assert without.shortfall == 3
    assert client.retrieve(sent, k=4, exclude=world.ids(order[1:4])).items == world.ids([order[0], *order[4:7]])


def test_titles_are_sent_when_asked_for(world: World, client: RetrievalClient) -> None:
    answer = client.retrieve(world.history(8), k=50, include_titles=True)
    rows = world.dataset.vocabulary.rows_of(answer.items).tolist()
    assert answer.titles == [f"Title {row}" if row % 7 else "" for row in rows]
    popular = client.retrieve(History([], []), k=3, include_titles=True)
    assert len(popular.titles) == 3


def test_the_request_time_is_an_input_and_one_from_the_past_counts_as_the_last_events(
    world: World, client: RetrievalClient
) -> None:
    history = world.history(10)
    last = history.timestamps[-1]
    at_last, before, later = (client.retrieve(history, k=20, request_time=time) for time in (last, 0, last + 10**7))
    assert before == at_last
    assert later.scores != at_last.scores


def test_actions_are_an_input_and_may_be_left_out(world: World, client: RetrievalClient) -> None:
    history = world.history(10)
    without = client.retrieve(History(history.items, history.timestamps), k=20, request_time=LATER)
    blank = History(history.items, history.timestamps, [""] * len(history.items))
    assert client.retrieve(blank, k=20, request_time=LATER) == without
    assert client.retrieve(history, k=20, request_time=LATER).scores != without.scores


def test_numpy_arrays_are_taken_where_lists_are() -> None:
    arrays = History(np.array([5, 7]), np.array([1, 2]), ["", "like"])  # type: ignore[arg-type]
    lists = History([5, 7], [1, 2], ["", "like"])
    requests = [RetrieveRequest(user=user, k=1, exclude=user.items) for user in (arrays, lists)]
    assert len({retrieve_request_to(request).SerializeToString() for request in requests}) == 1


def test_embed_users_answers_unit_vectors_and_zeros_where_nothing_is_known(
    world: World, client: RetrievalClient
) -> None:
    embedded = client.embed_users([StoredUser(4), History([], []), world.history(29)], request_time=LATER)
    assert embedded.width == WIDTH
    assert embedded.events_read == [5, 0, MAX_LENGTH]
    assert embedded.unknown_items == [0, 0, 0]
    np.testing.assert_allclose(embedded.embedding(0), embedding_of(world, 4, LATER)[0], atol=1e-5)
    assert embedded.embedding(1) == [0.0] * WIDTH
    np.testing.assert_allclose(embedded.embedding(2), embedding_of(world, 29, LATER)[0], atol=1e-5)
    assert client.embed_users([]).values == []


def test_the_serving_state_describes_the_snapshot(world: World, client: RetrievalClient) -> None:
    state = client.serving_state()
    assert state.snapshot_version == world.registry.current()
    assert state.dataset == world.dataset.info.fingerprint
    assert (state.items, state.width, state.max_length) == (ITEMS, WIDTH, MAX_LENGTH)
    assert state.string_ids == world.dataset.vocabulary.has_string_ids
    assert state.actions == ("like", "skip")
    assert state.index == "Flat"
    assert state.stored_users
    kinds = {one.name: (one.values, one.several) for one in state.attributes}
    assert kinds == {"title": ("text", False), "events": ("integers", False), "popularity": ("numbers", False)}


def test_two_hundred_concurrent_calls_are_all_answered_right(world: World, client: RetrievalClient) -> None:
    rng = np.random.default_rng(0)
    calls = [(int(rng.integers(USERS)), int(rng.integers(1, 60)), LATER + int(rng.integers(10**6))) for _ in range(200)]

    def ask(call: tuple[int, int, int]) -> Retrieved:
        user, k, time = call
        who = StoredUser(user) if time % 2 else world.history(user)
        return client.retrieve(who, k=k, request_time=time, exclude_seen=True)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, calls))
    for (user, k, time), answer in zip(calls, answers, strict=True):
        assert_is_the_exact_answer(world, answer, user, k, time, seen_rows(world, user))
