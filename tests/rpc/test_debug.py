"""What a caller may ask to know of an answer, and exact search on demand."""

import numpy as np
import pytest

from retrieval.index.filter import filter_from
from retrieval.index.spec import IndexSpec
from retrieval.rpc.client import Embedding, History, RetrievalClient, RetrieveRequest, SearchPlan, Source, StoredUser
from retrieval.rpc.prepare import PreparedRetrieve
from retrieval.rpc.recall import recall_of
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.rpc.world import ITEMS, START, WIDTH, World, make_encoder, publish

LATER = START + 10_000_000


@pytest.fixture(scope="module")
def approximate(integer_world: World, tmp_path_factory: pytest.TempPathFactory) -> ServingSnapshot:
    """The world's catalogue behind an index that looks at a sixteenth of it."""
    registry = Registry(tmp_path_factory.mktemp("approximate"))
    spec = IndexSpec(factory="IVF16,Flat", search={"nprobe": 1})
    version = publish(registry, integer_world.dataset, make_encoder(), spec=spec)
    return ServingSnapshot(open_snapshot(registry.folder(version)))


def test_exact_search_finds_what_the_index_misses(integer_world: World, approximate: ServingSnapshot) -> None:
    service, whole = RetrievalService(), integer_world.open()
    vectors = np.random.default_rng(3).standard_normal((20, WIDTH))
    users = [Embedding(vector.tolist()) for vector in vectors]
    # Five of a sixteenth's some twenty: the index has no reason to look further.
    quick = [RetrieveRequest(user=user, k=5, debug=True) for user in users]
    exact = [RetrieveRequest(user=user, k=5, debug=True, exact=True) for user in users]
    mixed = [request for pair in zip(quick, exact, strict=True) for request in pair]
    answers = service.batch_retrieve(approximate, mixed)
    expected = service.batch_retrieve(whole, quick)
    missed = 0
    for place, right in enumerate(expected):
        found, sure = answers[2 * place], answers[2 * place + 1]
        assert sure.items == right.items  # type: ignore[union-attr]
        assert sure.debug.plan is SearchPlan.SCAN  # type: ignore[union-attr]
        assert found.debug.plan is SearchPlan.INDEX  # type: ignore[union-attr]
        missed += found.items != right.items  # type: ignore[union-attr]
    assert missed > 5


def test_an_exact_answer_says_nothing_of_the_indexs_recall(approximate: ServingSnapshot) -> None:
    service = RetrievalService()
    for exact, measured in ((False, True), (True, False)):
        request = RetrieveRequest(user=Embedding([1.0] * WIDTH), k=5, exact=exact)
        prepared = service.prepare(approximate, request)
        assert isinstance(prepared, PreparedRetrieve)
        assert (recall_of(prepared, service.retrieve(approximate, request)) is not None) is measured


def test_a_caller_is_told_how_an_answer_came_about_if_it_asks(world: World, client: RetrievalClient) -> None:
    history = world.history(9)
    assert client.retrieve(history, k=5, request_time=LATER).debug is None
    debug = client.retrieve(history, k=5, request_time=LATER, debug=True, exclude=world.ids([1, 2])).debug
    assert debug is not None
    assert (debug.plan, debug.eligible, debug.batch_size) == (SearchPlan.INDEX, ITEMS - 2, 1)
    stages = (debug.decode_seconds, debug.queue_seconds, debug.encode_seconds, debug.search_seconds)
    assert all(0 < seconds < 20 for seconds in stages)
    exact = client.retrieve(StoredUser(9), k=5, request_time=LATER, debug=True, exact=True)
    assert exact.debug is not None
    assert exact.debug.plan is SearchPlan.SCAN
    assert exact.items == client.retrieve(history, k=5, request_time=LATER).items


def test_filtered_popular_and_empty_answers_tell_how_many_items_were_eligible(
    world: World, client: RetrievalClient
) -> None:
    untitled = len([row for row in range(ITEMS) if row % 7 == 0])
    for user, plan in ((History([], []), None), (world.history(9), SearchPlan.SCAN)):
        answer = client.retrieve(
            user, k=5, filter="title is missing", exclude=world.ids([0, 1]), debug=True, exact=True
        )
        assert answer.debug is not None
        assert (answer.debug.plan, answer.debug.eligible) == (plan, untitled - 1)
    nothing = client.retrieve(world.history(9), k=5, filter="title = 'no such title'", debug=True)
    assert nothing.debug is not None
    assert (nothing.debug.plan, nothing.debug.eligible, nothing.shortfall) == (None, 0, 5)


def test_items_that_no_event_was_on_are_told(
    world: World, client: RetrievalClient, service: RetrievalService, serving: ServingSnapshot
) -> None:
    cold = {
        item for item, count in zip(world.ids(list(range(ITEMS))), world.dataset.item_counts, strict=True) if not count
    }
    assert 50 <= len(cold) < ITEMS
    answer = client.retrieve(world.history(9), k=ITEMS, request_time=LATER)
    assert {answer.items[place] for place in answer.cold_items} == cold
    assert answer.cold_items == sorted(answer.cold_items)
    assert answer.sources == [Source.COLD_ITEM if item in cold else Source.MODEL for item in answer.items]
    request = RetrieveRequest(user=world.history(9), k=ITEMS, request_time=LATER)
    assert service.retrieve(serving, request).cold_items == answer.cold_items
    popular = client.retrieve(History([], []), k=ITEMS)
    assert popular.cold_items == []
    assert set(popular.sources) == {Source.POPULARITY}


def test_half_a_surrogate_pair_is_refused_wherever_text_goes(world: World, client: RetrievalClient) -> None:
    lone, user = "\ud800", History([], [])
    for option, field in (
        ({"filter": filter_from(f'"{lone}" = 3')}, "filter.in.attribute"),
        ({"filter": filter_from(f'"{lone}" < 3')}, "filter.compare.attribute"),
        ({"filter": filter_from(f'"{lone}" is missing')}, "filter.missing.attribute"),
        ({"filter": filter_from(f"title = '{lone}'")}, "filter.in.values[0]"),
        ({"required_version": lone}, "required_version"),
        ({"action": lone}, "action"),
    ):
        with pytest.raises(Exception, match="surrogates not allowed") as error:
            client.retrieve(user, k=1, **option)
        assert getattr(error.value, "field", None) == field
    for history in (History([lone], [1]), History(world.ids([1]), [1], [lone]), History([], [], context={lone: "a"})):
        with pytest.raises(Exception, match="surrogates not allowed") as error:
            client.retrieve(history, k=1)
        assert getattr(error.value, "field", "").startswith("history")
