"""Filters and required versions over the socket, against a plain pass over the catalogue."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from retrieval.errors import FilterError, InvalidRequestError
from retrieval.index.filter import Compare, Filter, In, Missing, Not, filter_from
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Embedding, History, RetrievalClient, Source
from retrieval.rpc.convert import retrieve_request_from, retrieve_request_to
from retrieval.rpc.errors import VersionNotLoadedError
from retrieval.rpc.prepare import Limits
from retrieval.rpc.requests import RetrieveRequest
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from tests.rpc.world import ITEMS, START, WIDTH, World

LATER = START + 10_000_000
HOLDS: dict[str, Callable[[int, int], bool]] = {
    "title is missing": lambda row, _: row % 7 == 0,
    "events >= 3": lambda _, events: events >= 3,
    "events > 1 and events <= 4 and not title is missing": lambda row, events: 1 < events <= 4 and row % 7 != 0,
    "title in ('Title 1', 'Title 9') or events < 1": lambda row, events: row in (1, 9) or events < 1,
    "title != 'Title 1'": lambda row, _: row != 1,
    "events = -1": lambda _row, _events: False,
}


@pytest.mark.parametrize("text", HOLDS)
@pytest.mark.parametrize("user", ["history", "nobody"])
def test_answers_are_the_best_of_the_items_that_meet_the_filter(
    world: World, client: RetrievalClient, text: str, user: str
) -> None:
    sent = world.history(9) if user == "history" else History([], [])
    counts = world.dataset.item_counts.tolist()
    exclude = world.ids([0, 1])
    meets = set(world.ids([row for row in range(2, ITEMS) if HOLDS[text](row, counts[row])]))
    everything = client.retrieve(sent, k=ITEMS, request_time=LATER)
    best = [item for item in everything.items if item in meets]
    answer = client.retrieve(sent, k=20, request_time=LATER, filter=text, exclude=exclude)
    assert answer.items == best[:20]
    assert answer.shortfall == 20 - len(best[:20])
    assert answer.source is (Source.MODEL if user == "history" else Source.POPULARITY)
    score = dict(zip(everything.items, everything.scores, strict=True))
    np.testing.assert_allclose(answer.scores, [score[item] for item in answer.items], atol=1e-6)


@pytest.mark.parametrize(
    "filter_",
    [
        filter_from("a in ('x', 'y''') and (b < 1.5 or not c = true) and \"d e\" is missing and f >= 2024-05-01T10:30"),
        In("a", (True, 1, 1.0, -(2**63), 2**63 - 1)),
        Compare("a", "<=", datetime(1, 1, 1, tzinfo=UTC)),
        Compare("a", ">", datetime.max.replace(tzinfo=UTC)),
        Not(Missing("")),
    ],
    ids=str,
)
def test_a_filter_comes_back_from_its_message_as_it_was(filter_: Filter) -> None:
    request = RetrieveRequest(user=None, k=1, filter=filter_)
    message = pb.RetrieveRequest.FromString(retrieve_request_to(request).SerializeToString())
    # As text: 1 equals 1.0 and true.
    assert str(retrieve_request_from(message).filter) == str(filter_)


def nested(depth: int) -> Filter:
    found: Filter = Missing("title")
    for _ in range(depth - 1):
        found = Not(found)
    return found


@pytest.mark.parametrize(
    ("filter_", "field", "sentence"),
    [
        (filter_from("events = 1 and colour = 'red'"), "filter.all[1].in", "attribute 'colour' is not known"),
        (filter_from("events = 1 or not events < 'x'"), "filter.any[1].not.compare", "the attribute holds integers"),
        (Missing("colour"), "filter.missing", "attribute 'colour' is not known"),
        (In("title", ("x" * 10**6, 1)), "filter.in", "the attribute holds text"),
        (In("x" * 10**6, (1,)), "filter.in", "is not known|…"),
        (In("events", tuple(range(10_000))), "filter", "has 10001 tests and values; at most 10000 are taken"),
        (In("events", (2**63,)), "filter.in.values[0]", "must be a 64-bit integer"),
        (nested(51), "filter", "is nested deeper than 50 levels"),
    ],
    ids=["unknown", "type", "missing", "mixed", "long", "many", "large", "deep"],
)
def test_a_wrong_filter_is_refused_by_the_path_of_what_is_wrong(
    client: RetrievalClient, filter_: Filter, field: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence) as raised:
        client.retrieve(Embedding([1.0] * WIDTH), k=1, filter=filter_)
    assert raised.value.field == field
    assert len(str(raised.value)) < 1000


def test_the_deepest_filter_is_answered(client: RetrievalClient) -> None:
    assert client.retrieve(Embedding([1.0] * WIDTH), k=1, filter=nested(50)).shortfall == 0


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "filter"),
        ({"all": {}}, "filter.all"),
        ({"any": {"filters": [{"missing": {"attribute": "title"}}, {}]}}, "filter.any[1]"),
        ({"not": {"in": {"attribute": "events"}}}, "filter.not.in"),
        ({"in": {"attribute": "events", "values": [{}]}}, "filter.in.values[0]"),
        ({"in": {"attribute": "events", "values": [{"number": float("nan")}]}}, "filter.in"),
        ({"compare": {"attribute": "events", "operator": 9, "value": {"integer": 1}}}, "filter.compare.operator"),
        ({"compare": {"attribute": "events", "operator": 1}}, "filter.compare.value"),
        (
            {"compare": {"attribute": "events", "operator": 1, "value": {"moment": 2**63 - 1}}},
            "filter.compare.value",
        ),
    ],
)
def test_a_message_that_is_no_filter_is_refused_by_its_path(message: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        retrieve_request_from(pb.RetrieveRequest(filter=pb.Filter(**message)))
    assert raised.value.field == field


def test_a_text_that_is_no_filter_is_refused_before_it_is_sent(client: RetrievalClient) -> None:
    with pytest.raises(FilterError, match="an operator"):
        client.retrieve(History([], []), filter="events")


def test_an_operator_sets_how_large_filters_may_be(serving: ServingSnapshot) -> None:
    service = RetrievalService(limits=Limits(max_filter=3))
    request = RetrieveRequest(user=History([], []), k=1, filter=In("events", (1, 2)))
    service.retrieve(serving, request)
    with pytest.raises(InvalidRequestError, match="has 4 tests and values; at most 3"):
        service.retrieve(serving, RetrieveRequest(user=History([], []), k=1, filter=In("events", (1, 2, 3))))


def test_a_required_version_answers_or_the_call_fails(world: World, client: RetrievalClient) -> None:
    live = world.registry.current()
    assert client.retrieve(world.history(3), k=1, required_version=live).snapshot_version == live
    with pytest.raises(VersionNotLoadedError, match=f"'other' is not the live snapshot, which is {live}"):
        client.retrieve(world.history(3), k=1, required_version="other")
