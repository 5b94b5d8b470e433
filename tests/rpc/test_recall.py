"""Recall of served answers against exact search."""

import asyncio
import dataclasses

import numpy as np

from retrieval.rpc.client import Embedding, RetrievalClient
from retrieval.rpc.prepare import PreparedRetrieve
from retrieval.rpc.recall import recall_of
from retrieval.rpc.requests import History, RetrieveRequest, Source
from retrieval.rpc.server import Server, ServerConfig
from retrieval.rpc.service import RetrievalService
from tests.rpc.test_metrics import of, scrape
from tests.rpc.test_server import wait_for
from tests.rpc.world import ITEMS, WIDTH, World


def test_an_exact_answer_has_recall_1_and_loses_what_is_taken_from_it(integer_world: World) -> None:
    service, serving = RetrievalService(), integer_world.open()
    embedding = Embedding(np.random.default_rng(0).normal(size=WIDTH).tolist())
    for user in (embedding, integer_world.history(9)):
        request = RetrieveRequest(user=user, k=10, exclude=integer_world.history(9).items)
        prepared = service.prepare(serving, request)
        assert isinstance(prepared, PreparedRetrieve)
        answer = service.retrieve(serving, request)
        assert recall_of(prepared, answer) == 1.0
        worse = service.retrieve(serving, dataclasses.replace(request, k=ITEMS)).scores[-3:]
        poor = dataclasses.replace(answer, scores=answer.scores[:7] + worse)
        assert recall_of(prepared, poor) == 0.7
        short = dataclasses.replace(answer, scores=answer.scores[:4])
        assert recall_of(prepared, short) == 0.4


def test_popular_items_for_a_stranger_are_not_measured(integer_world: World) -> None:
    service, serving = RetrievalService(), integer_world.open()
    request = RetrieveRequest(user=History([], []), k=3)
    prepared, answer = service.prepare(serving, request), service.retrieve(serving, request)
    assert isinstance(prepared, PreparedRetrieve)
    assert answer.source is Source.POPULARITY
    assert recall_of(prepared, answer) is None


def test_a_server_measures_the_share_that_it_is_told_to(integer_world: World) -> None:
    async def run(share: float) -> None:
        config = ServerConfig(registry=integer_world.registry.location, port=0, metrics_port=0, recall_share=share)
        server = Server(config)
        try:
            await server.start()
            await asyncio.to_thread(ask, server, share)
        finally:
            await server.stop()

    def ask(server: Server, share: float) -> None:
        metrics = server.metrics_address
        assert metrics is not None
        with RetrievalClient(server.address, 10) as client:
            for _ in range(3):
                client.retrieve(integer_world.history(9), k=5)
        wait_for(lambda: of(scrape(metrics), "online_recall_count") == 3 * share)
        assert of(scrape(metrics), "online_recall_sum") == 3 * share
        assert of(scrape(metrics), "stage_seconds_count", stage="encode") == 3, "samples are not served calls"

    for share in (0, 1):
        asyncio.run(asyncio.wait_for(run(share), 30))
