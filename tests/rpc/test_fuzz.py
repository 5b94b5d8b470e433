"""Hostile bytes over a real socket: each call is answered or refused by a code that is the caller's, never INTERNAL."""

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import RetrievalClient
from tests.rpc.world import WIDTH, World

_OPERATORS = st.integers(-1, 6)
_NAMES = st.sampled_from(["title", "events", "", "colour"])
_INTEGERS = st.integers(-(2**63), 2**63 - 1)
_VALUES = st.one_of(
    st.just(pb.FilterValue()),
    st.text(max_size=5).map(lambda text: pb.FilterValue(text=text)),
    _INTEGERS.map(lambda number: pb.FilterValue(integer=number)),
    st.floats().map(lambda number: pb.FilterValue(number=number)),
    st.booleans().map(lambda flag: pb.FilterValue(boolean=flag)),
    _INTEGERS.map(lambda moment: pb.FilterValue(moment=moment)),
)
_TESTS = st.one_of(
    st.just(pb.Filter()),
    st.builds(
        lambda name, values: pb.Filter(**{"in": {"attribute": name, "values": values}}),
        _NAMES,
        st.lists(_VALUES, max_size=3),
    ),
    st.builds(
        lambda name, operator, value: pb.Filter(compare={"attribute": name, "operator": operator, "value": value}),
        _NAMES,
        _OPERATORS,
        _VALUES,
    ),
    _NAMES.map(lambda name: pb.Filter(missing={"attribute": name})),
)
_FILTERS = st.recursive(
    _TESTS,
    lambda parts: st.one_of(
        st.lists(parts, max_size=3).map(lambda several: pb.Filter(all={"filters": several})),
        st.lists(parts, max_size=3).map(lambda several: pb.Filter(any={"filters": several})),
        parts.map(lambda part: pb.Filter(**{"not": part})),
    ),
    max_leaves=6,
)
_REQUESTS = st.builds(
    lambda filter_, k, time, numbers: pb.RetrieveRequest(
        embedding={"values": numbers}, k=k, request_time=time, filter=filter_, exact=k % 2 == 0, debug=k % 3 == 0
    ),
    _FILTERS,
    st.integers(-5, 400),
    _INTEGERS,
    st.lists(st.floats(width=32), min_size=WIDTH - 1, max_size=WIDTH) | st.just([1.0] * WIDTH),
)
_BATCHES = st.lists(_REQUESTS, max_size=3).map(lambda requests: pb.BatchRetrieveRequest(requests=requests))
_IDS = st.builds(pb.UserId, integer=_INTEGERS) | st.builds(pb.UserId, string=st.text(max_size=4)) | st.just(pb.UserId())
_RECORDS = st.builds(
    lambda users, items, names, times: pb.RecordEventsRequest(
        events=[
            pb.Event(
                user_id=user,
                item_id=pb.ItemId.FromString(item.SerializeToString()),
                action=name,
                timestamp=time,
                event_id=name,
            )
            for user, item, name, time in zip(users, items, names, times, strict=False)
        ]
    ),
    st.lists(_IDS, max_size=3),
    st.lists(_IDS, max_size=3),
    st.lists(st.text(max_size=120), min_size=3, max_size=3),
    st.lists(_INTEGERS | st.integers(0, 10), min_size=3, max_size=3),
)
_THE_CALLERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
}


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(_REQUESTS | _RECORDS | _BATCHES).SerializeToString())
    for place in draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=3)):
        content[place : place + 1] = draw(st.binary(max_size=3))
    return bytes(content)


def _code(channel: grpc.Channel, method: str, content: bytes) -> grpc.StatusCode:
    try:
        channel.unary_unary(f"/retrieval.v1.RetrievalService/{method}")(content, timeout=10)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    content=_REQUESTS.map(pb.RetrieveRequest.SerializeToString)
    | _RECORDS.map(pb.RecordEventsRequest.SerializeToString)
    | _BATCHES.map(pb.BatchRetrieveRequest.SerializeToString)
    | _damaged()
    | st.binary(max_size=100),
    method=st.sampled_from(
        ["Retrieve", "Retrieve", "BatchRetrieve", "EmbedUsers", "RecordEvents", "RecordEvents", "GetServingState"]
    ),
)
def test_whatever_is_sent_is_answered_or_refused(address: str, content: bytes, method: str) -> None:
    with grpc.insecure_channel(address) as channel:
        assert _code(channel, method, content) in _THE_CALLERS


@pytest.fixture(autouse=True, scope="module")
def _the_server_lives(world: World, client: RetrievalClient) -> Iterator[None]:
    yield
    assert client.retrieve(world.history(3), k=5).shortfall == 0
