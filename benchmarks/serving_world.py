"""The catalogues and queries of `benchmarks.serving`, and what exact search answers to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import WrongAnswerError
from retrieval.data.sequences import gather_histories
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import hstu_ml1m
from retrieval.index.builder import build_index
from retrieval.index.spec import IndexSpec
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Embedding, History
from retrieval.rpc.convert import retrieve_request_to, retrieved_from
from retrieval.rpc.requests import RetrieveRequest
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, write_snapshot
from retrieval.types import EventColumns

__all__ = ["EVENTS", "K", "Queries", "check", "make_queries", "publish_world"]

K, EVENTS = 100, 200
_LATENT, _MESSAGES = 16, 256
_NOW = 1_700_000_000
_EXACT_UP_TO = 100_000
_LEAST_RECALL, _ROUNDING = 0.9, 1e-4


def publish_world(registry: Registry, items: int) -> None:
    """A snapshot with an untrained encoder whose items lie in clusters, as learned ones do."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    encoder = HSTUEncoder(hstu_ml1m(num_items=items)).eval()
    width = encoder.config.width
    centres = rng.normal(size=(max(items // 500, 8), _LATENT)).astype(np.float32)
    latent = centres[rng.integers(0, len(centres), items)] + 0.6 * rng.normal(size=(items, _LATENT)).astype(np.float32)
    table = latent @ rng.normal(size=(_LATENT, width)).astype(np.float32)
    with torch.no_grad():
        encoder.item_embedding.weight.copy_(torch.from_numpy(table + rng.normal(size=table.shape).astype(np.float32)))
    inverted = IndexSpec(factory="IVF1024,Int8", search={"nprobe": 32})
    spec = IndexSpec() if items <= _EXACT_UP_TO else inverted
    ids = pa.array(rng.permutation(items) + 1_000_000, pa.int64())
    events = rng.integers(1, 1000, items)
    vocabulary = Vocabulary(ids, {"events": pa.array(events), "popularity": pa.array(events.astype(np.float64))})
    info = CheckpointInfo(encoder=encoder.config, actions=("",), dataset="0" * 64, split={}, training={})

    def write(folder: Path) -> bytes:
        index = build_index(item_vectors(encoder), spec)
        return write_snapshot(
            folder, encoder=encoder, info=info, vocabulary=vocabulary, index=index, ann_recall=1.0, report={}
        )

    registry.publish(write)


@dataclass(frozen=True, slots=True)
class Queries:
    """Messages of one kind, and the embeddings that they search by: float32 `[M, D]` of unit length."""

    messages: list[bytes]
    embeddings: NDArray[np.float32]


def make_queries(snapshot: Snapshot, kind: str) -> Queries:
    """Messages that all differ; embeddings of histories by the reference kernels."""
    rng = np.random.default_rng(1)
    ids = snapshot.vocabulary.ids.to_numpy()
    rows = rng.integers(0, len(ids), (_MESSAGES, EVENTS))
    times = _NOW - 10_000_000 + np.cumsum(rng.integers(0, 50_000, rows.shape), axis=1)
    vectors = item_vectors(snapshot.encoder)
    if kind == "embedding":
        liked = vectors[rows[:, :3]].mean(axis=1) + 0.02 * rng.normal(size=(_MESSAGES, vectors.shape[1]))
        embeddings = (liked / np.linalg.norm(liked, axis=1, keepdims=True)).astype(np.float32)
        users: list[Any] = [Embedding(embedding.tolist()) for embedding in embeddings]
    else:
        assert isinstance(snapshot.encoder, HSTUEncoder)
        snapshot.encoder.backend = "reference"
        ends = np.arange(1, _MESSAGES + 1) * EVENTS
        events = EventColumns(items=rows.ravel(), actions=np.zeros(rows.size, np.uint8), timestamps=times.ravel())
        requests = np.full(_MESSAGES, _NOW)
        embeddings = embed_users(snapshot.encoder, gather_histories(events, ends - EVENTS, ends, requests, EVENTS))
        users = [History(ids[one].tolist(), at.tolist()) for one, at in zip(rows, times, strict=True)]
    requests_ = [RetrieveRequest(user=user, k=K, request_time=_NOW) for user in users]
    return Queries([retrieve_request_to(request).SerializeToString() for request in requests_], embeddings)


def check(name: str, snapshot: Snapshot, queries: Queries, answers: list[bytes]) -> None:
    """Compare answers to the first messages with exact search.

    Raises:
        WrongAnswerError: a score is not its item's, or too few of the best items are there.
    """
    vectors, exact = item_vectors(snapshot.encoder), snapshot.manifest.index.factory == "Flat"
    found = 0
    for query, content in zip(queries.embeddings, answers, strict=False):
        answer = retrieved_from(pb.RetrieveResponse.FromString(content))
        scores = vectors @ query
        rows = snapshot.vocabulary.rows_of(answer.items)
        if len(set(answer.items)) != K or np.abs(scores[rows] - answer.scores).max() > _ROUNDING:
            raise WrongAnswerError(f"{name}: scores are not those of the items")
        found += int(np.count_nonzero(scores[rows] >= np.partition(scores, -K)[-K] - _ROUNDING))
    recall = found / (K * len(answers))
    if recall < (1.0 if exact else _LEAST_RECALL):
        raise WrongAnswerError(f"{name}: recall is {recall:.3f}")
