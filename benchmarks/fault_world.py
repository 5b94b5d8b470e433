"""What the benchmarks that mistreat a server serve, ask, and know to be right: an oracle that shares no code with it.

Snapshots have an untrained encoder, seeded, so that each version's answers are its own. The oracle opens a version by
itself, embeds with the reference kernels, scores every item and leaves out what was excluded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.harness import WrongAnswerError
from retrieval.data.sequences import gather_histories
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.index.builder import build_index
from retrieval.index.filter import Compare, filter_from
from retrieval.index.spec import IndexSpec
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.client import Embedding, History, StoredUser
from retrieval.rpc.convert import retrieve_request_to, retrieved_from
from retrieval.rpc.requests import Retrieved, RetrieveRequest, Source
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot, write_snapshot
from retrieval.types import EventColumns

__all__ = ["ACTIONS", "METHOD", "NOW", "WIDTH", "K", "Oracle", "ids_of", "make_requests", "snapshot_writer"]

METHOD = "/retrieval.v1.RetrievalService/Retrieve"
K, WIDTH = 20, 32
NOW = 1_700_000_000
ACTIONS = ("", "like", "skip")
_MAX_LENGTH, _MOST_EVENTS = 50, 80
# Of a score: reference kernels against compiled ones, alone against in a batch.
_ROUNDING = 2e-5
# Further items that are known to the oracle, since nearly equal scores may change places.
_BEYOND = 40


def ids_of(items: int) -> NDArray[np.int64]:
    """Ids of a catalogue, in no order."""
    return np.random.default_rng(7).permutation(items) + 1_000_000


def snapshot_writer(
    items: int, seed: int, spoil: Callable[[Path], object] = lambda folder: None
) -> Callable[[Path], bytes]:
    """What `Registry.publish` takes.

    Args:
        items: of the catalogue.
        seed: of the encoder.
        spoil: given the folder once the manifest is made, so that what it changes is not what was promised.
    """
    torch.manual_seed(seed)
    shape = {"max_length": _MAX_LENGTH, "width": WIDTH, "num_heads": 2, "qk_dim": 16, "v_dim": 16}
    encoder = HSTUEncoder(HSTUConfig(num_items=items, num_actions=len(ACTIONS), **shape)).eval()
    with torch.no_grad():
        encoder.item_embedding.weight.normal_()
    events = np.random.default_rng(seed).integers(1, 1000, items)
    attributes = {"events": pa.array(events), "popularity": pa.array(events.astype(np.float64))}
    attributes["title"] = pa.array([f"Title {row}" for row in range(items)])
    vocabulary = Vocabulary(pa.array(ids_of(items)), attributes)
    info = CheckpointInfo(encoder=encoder.config, actions=ACTIONS, dataset="0" * 64, split={}, training={})

    def write(folder: Path) -> bytes:
        index = build_index(item_vectors(encoder), IndexSpec())
        manifest = write_snapshot(
            folder, encoder=encoder, info=info, vocabulary=vocabulary, index=index, ann_recall=1.0,
            report={},
        )  # fmt: skip
        spoil(folder)
        return manifest

    return write


def make_requests(
    ids: NDArray[np.int64], count: int, seed: int = 1, width: int = WIDTH, least_events: int = 300
) -> list[RetrieveRequest]:
    """By turns: an embedding, a history, one without its own items, with a filter, with exclusions, a stranger.

    Args:
        ids: of items.
        count: of requests.
        seed: of all of it.
        width: of embeddings.
        least_events: what the filter asks of an item.
    """
    filter_ = filter_from(f"events >= {least_events}")
    rng = np.random.default_rng(seed)
    requests: list[RetrieveRequest] = []
    for number in range(count):
        length = int(rng.integers(1, _MOST_EVENTS))
        times = NOW - 5_000_000 + np.cumsum(rng.integers(0, 50_000, length))
        history = History(rng.choice(ids, length).tolist(), times.tolist())
        embedding = Embedding(rng.normal(size=width).astype(np.float32).tolist())
        kinds: Sequence[dict] = (
            {"user": embedding},
            {"user": history},
            {"user": history, "exclude_seen": True},
            {"user": embedding, "filter": filter_},
            {"user": history, "exclude": rng.choice(ids, len(ids) // 10, replace=False).tolist()},
            {"user": History([], [])},
        )
        requests.append(RetrieveRequest(k=K, request_time=NOW, **kinds[number % len(kinds)]))
    return requests


@dataclass(frozen=True, slots=True)
class _Expected:
    """Best items of an answer and a few more, best first."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    source: Source
    count: int


class Oracle:
    """What each version answers to each of the requests.

    Args:
        registry: where versions are.
        requests: as `make_requests` makes them; also ones of stored users.
        stored: the histories of these.

    Attributes:
        messages: the requests on the wire.
    """

    def __init__(
        self,
        registry: Registry,
        requests: Sequence[RetrieveRequest],
        stored: Mapping[int | str, History] = MappingProxyType({}),
    ) -> None:
        self._registry, self._requests = registry, requests
        users = [stored[one.user.id] if isinstance(one.user, StoredUser) else one.user for one in requests]
        self._resolved = [replace(one, user=user) for one, user in zip(requests, users, strict=True)]
        self.messages = [retrieve_request_to(request).SerializeToString() for request in requests]
        self._known: dict[str, list[_Expected]] = {}

    @property
    def versions(self) -> set[str]:
        """Those that are known."""
        return set(self._known)

    def learn(self, version: str) -> None:
        """Work out a version's answers, while its folder is there."""
        if version not in self._known:
            snapshot = open_snapshot(self._registry.folder(version))
            vectors = item_vectors(snapshot.encoder)
            self._known[version] = [_expected(snapshot, vectors, request) for request in self._resolved]

    def check(self, number: int, content: bytes) -> Retrieved:
        """Compare the answer to the request of this number with what the version that it names answers.

        Raises:
            WrongAnswerError: it is another, or names no version that is known.
        """
        answer = retrieved_from(pb.RetrieveResponse.FromString(content))
        place = number % len(self._requests)
        if answer.snapshot_version not in self._known:
            raise WrongAnswerError(f"request {place}: {answer.snapshot_version} is no version that was published")
        expected = self._known[answer.snapshot_version][place]
        count = expected.count
        right = (
            answer.source is expected.source
            and answer.shortfall == self._requests[place].k - count
            and len(set(answer.items)) == len(answer.items) == len(answer.scores) == count
            and np.allclose(answer.scores, expected.scores[:count], rtol=0, atol=_ROUNDING)
        )
        score_of = dict(zip(expected.ids.tolist(), expected.scores.tolist(), strict=True))
        for item, score in zip(answer.items, answer.scores, strict=True):
            right = right and abs(score_of.get(item, np.inf) - score) <= _ROUNDING
        if not right:
            raise WrongAnswerError(f"request {place}: {answer} is not what exact search answers: {expected}")
        return answer


def _expected(snapshot: Snapshot, vectors: NDArray[np.float32], request: RetrieveRequest) -> _Expected:
    ids, events = snapshot.vocabulary.ids.to_numpy(), snapshot.vocabulary.attributes["events"].to_numpy()
    open_, source = np.ones(len(ids), bool), Source.MODEL
    if request.filter is not None:
        assert isinstance(request.filter, Compare)
        open_ &= events >= request.filter.value
    if isinstance(request.user, Embedding):
        query = np.array(request.user.values, np.float64)
        scores = vectors @ (query / np.linalg.norm(query)).astype(np.float32)
    else:
        assert isinstance(request.user, History)
        rows = snapshot.vocabulary.rows_of(request.user.items)
        if request.exclude_seen:
            open_[rows[rows >= 0]] = False
        if (rows >= 0).any():
            scores = vectors @ _embedding(snapshot, rows, request)
        else:
            popularity = snapshot.vocabulary.attributes["popularity"].to_numpy().astype(np.float64)
            scores, source = (popularity / popularity.sum()).astype(np.float32), Source.POPULARITY
    if len(request.exclude):
        rows = snapshot.vocabulary.rows_of(request.exclude)
        open_[rows[rows >= 0]] = False
    rows = np.flatnonzero(open_)
    if source is Source.POPULARITY:
        best = rows[np.lexsort((ids[rows], -events[rows], -scores[rows]))][: request.k + _BEYOND]
    else:
        best = rows[np.lexsort((ids[rows], -scores[rows]))][: request.k + _BEYOND]
    return _Expected(ids[best], scores[best], source, min(request.k, len(rows)))


def _embedding(snapshot: Snapshot, rows: NDArray[np.int64], request: RetrieveRequest) -> NDArray[np.float32]:
    assert isinstance(request.user, History)
    assert isinstance(snapshot.encoder, HSTUEncoder)
    assert request.request_time is not None
    snapshot.encoder.backend = "reference"
    known = rows >= 0
    events = EventColumns(
        items=rows[known],
        actions=np.zeros(int(known.sum()), np.uint8),
        timestamps=np.array(request.user.timestamps, np.int64)[known],
    )
    begin, end, now = (np.array([value]) for value in (0, int(known.sum()), request.request_time))
    length = snapshot.encoder.config.max_length
    return embed_users(snapshot.encoder, gather_histories(events, begin, end, now, length))[0]
