"""One answer, whoever asks and wherever: training code, evaluation, in process, our client, a foreign client."""

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from retrieval.data.sequences import gather_training
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.inference import embed_users
from retrieval.evaluation.ranking import query_batches
from retrieval.rpc.client import Embedding, History, RetrievalClient, StoredUser
from retrieval.rpc.requests import EmbedRequest, RetrieveRequest
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.rpc.world import ITEMS, MAX_LENGTH, START, USERS, WIDTH, World, make_encoder, publish
from tests.tolerances import assert_close

LATER = START + 10_000_000


def part(history: History, start: int, end: int) -> History:
    return History(history.items[start:end], history.timestamps[start:end], history.actions[start:end])


def test_the_server_embeds_a_history_as_training_code_does(world: World, client: RetrievalClient) -> None:
    """The loss looks at a token's output; the server is sent the events up to it, at the time of the next one."""
    dataset = world.dataset
    users = [1, 5, 11, 29, 35]
    batch = gather_training(
        dataset.events,
        dataset.offsets[users],
        dataset.offsets[np.array(users) + 1],
        dataset.positive,
        MAX_LENGTH,
    )
    with torch.no_grad():
        outputs = world.encoder(JaggedTensors.of(batch.inputs, world.encoder.device))
    for place, user in enumerate(users):
        begin, end = batch.inputs.offsets[place : place + 2].tolist()
        history = world.history(user)
        first = len(history.items) - 1 - (end - begin)
        for token in range(end - begin):
            time = history.timestamps[first + token + 1]
            embedded = client.embed_users([part(history, first, first + token + 1)], request_time=time)
            assert_close(torch.tensor(embedded.values), outputs[begin + token], "embedding", "forward")


def test_the_server_embeds_a_history_as_evaluation_does(world: World, client: RetrievalClient) -> None:
    dataset = world.dataset
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    (batch,) = query_batches(dataset, split.test, MAX_LENGTH)
    evaluated = torch.from_numpy(embed_users(world.encoder, batch.histories))
    assert len(evaluated) > USERS / 2
    for user, target, expected in zip(split.test.users.tolist(), split.test.targets.tolist(), evaluated, strict=True):
        history, end = world.history(user), target - int(dataset.offsets[user])
        embedded = client.embed_users([part(history, 0, end)], request_time=history.timestamps[end])
        assert_close(torch.tensor(embedded.values), expected, "embedding", "forward")


def test_who_shares_a_batch_does_not_matter(world: World, service: RetrievalService, serving: ServingSnapshot) -> None:
    requests = [RetrieveRequest(user=world.history(user), k=10, request_time=LATER) for user in range(USERS)]
    requests += [RetrieveRequest(user=History([], []), k=5), RetrieveRequest(user=Embedding([1.0] * WIDTH), k=5)]
    alone = [service.retrieve(serving, request) for request in requests]
    prepared = [service.prepare(serving, request) for request in requests]
    for order in (range(len(requests)), reversed(range(len(requests))), range(0, len(requests), 3)):
        places = list(order)
        for place, answer in zip(places, service.answer([prepared[place] for place in places]), strict=True):
            expected = alone[place]
            # By score: rounding may swap items whose scores differ in the last place.
            np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-5)  # type: ignore[union-attr]
            assert len(set(answer.items) & set(expected.items)) >= len(expected.items) - 1  # type: ignore[union-attr]


def test_requests_of_two_snapshots_in_one_batch_are_answered_each_by_its_own(
    integer_world: World, tmp_path: Path
) -> None:
    registry, service = Registry(tmp_path), RetrievalService()
    versions = [publish(registry, integer_world.dataset, make_encoder(seed)) for seed in (1, 2)]
    servings = [ServingSnapshot(open_snapshot(registry.folder(version))) for version in versions]
    request = RetrieveRequest(user=integer_world.history(9), k=10, request_time=LATER)
    alone = [service.retrieve(serving, request) for serving in servings]
    assert alone[0].items != alone[1].items
    batch = [service.prepare(servings[which], request) for which in (0, 1, 1, 0)]
    answers = service.answer(batch)
    assert [answer.snapshot_version for answer in answers] == [versions[which] for which in (0, 1, 1, 0)]
    assert [answer.items for answer in answers] == [alone[which].items for which in (0, 1, 1, 0)]  # type: ignore[union-attr]


def test_embeddings_do_not_depend_on_batch_mates(world: World, client: RetrievalClient) -> None:
    together = client.embed_users([StoredUser(user) for user in range(USERS)], request_time=LATER)
    for user in range(USERS):
        alone = client.embed_users([StoredUser(user)], request_time=LATER)
        expected = torch.tensor(alone.embedding(0))
        assert_close(torch.tensor(together.embedding(user)), expected, "embedding", "forward")


@pytest.mark.parametrize("user", [0, 13, 29])
def test_in_process_and_over_the_socket_answers_are_equal(
    world: World, service: RetrievalService, serving: ServingSnapshot, client: RetrievalClient, user: int
) -> None:
    users: list[Any] = [world.history(user), StoredUser(user), History([], [])]
    options: list[dict[str, Any]] = [
        {"k": 12},
        {"k": 400, "exclude_seen": True, "include_titles": True},
        {"k": 3, "exclude": world.ids([1, 2, 3])},
    ]
    for who in users:
        for option in options:
            request = RetrieveRequest(user=who, request_time=LATER, **option)
            over = client.retrieve(who, request_time=LATER, **option)
            here = service.retrieve(serving, request)
            assert over.items == here.items
            np.testing.assert_allclose(over.scores, here.scores, atol=1e-6)
            assert (over.source, over.shortfall, over.titles) == (here.source, here.shortfall, here.titles)
    embedded = service.embed_users(serving, EmbedRequest(users=users, request_time=LATER))
    sent = client.embed_users(users, request_time=LATER)
    np.testing.assert_allclose(sent.values, embedded.values, atol=1e-6)
    assert sent.events_read == embedded.events_read


class ForeignClient:
    """Knows nothing but the address: what it sends and reads is built from the server's reflection."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"retrieval.v1.RetrievalService", "grpc.health.v1.Health"} <= set(database.get_services())
        self._service = descriptor_pool.DescriptorPool(database).FindServiceByName("retrieval.v1.RetrievalService")

    def call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        described = self._service.FindMethodByName(method)
        message = json_format.ParseDict(request, message_factory.GetMessageClass(described.input_type)())
        answer = self._channel.unary_unary(
            f"/retrieval.v1.RetrievalService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )(message, timeout=10)
        values: dict[str, Any] = json_format.MessageToDict(answer)
        return values


def test_a_foreign_client_gets_the_same_candidates(world: World, address: str, client: RetrievalClient) -> None:
    kind = "strings" if world.dataset.vocabulary.has_string_ids else "integers"
    with grpc.insecure_channel(address) as channel:
        foreign = ForeignClient(channel)
        for user in (0, 7, 29):
            history = world.history(user)
            request = {
                "history": {
                    "items": {kind: {"values": list(history.items)}},
                    "actions": list(history.actions),
                    "timestamps": list(history.timestamps),
                },
                "k": 25,
                "request_time": LATER,
                "exclude_seen": True,
                "exclude": {kind: {"values": world.ids([0, 9])}},
            }
            answer = foreign.call("Retrieve", request)
            ours = client.retrieve(history, k=25, request_time=LATER, exclude_seen=True, exclude=world.ids([0, 9]))
            # JSON writes 64-bit integers as strings.
            assert answer["items"][kind]["values"] == [str(item) for item in ours.items]
            np.testing.assert_allclose(answer["scores"], ours.scores, atol=1e-6)
            assert answer["snapshotVersion"] == ours.snapshot_version
            assert answer["source"] == "SOURCE_MODEL"
            stored = foreign.call("Retrieve", {"stored_user": {"integer": user}, "k": 25, "request_time": LATER})
            assert len(stored["scores"]) == 25
        assert foreign.call("GetServingState", {})["storedUsers"]
        everything = {kind: {"values": world.ids(np.arange(ITEMS))}}
        nothing = foreign.call("Retrieve", {"history": {}, "k": 5, "exclude": everything})
        assert nothing["items"] == {kind: {}}, "an answer without items still tells the ids' kind"
