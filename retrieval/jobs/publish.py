"""A trained encoder becomes the live snapshot: embed items, build the index, measure it, write, switch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.popularity import recent_popularity
from retrieval.data.sequences import user_histories
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import CheckpointError, NoSnapshotError
from retrieval.evaluation.ann import ann_recall
from retrieval.evaluation.gates import GateResult
from retrieval.files import write_atomically
from retrieval.index.backend import FaissBackend
from retrieval.index.builder import build_index
from retrieval.index.choice import AutoIndex, Measured, choose_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import GateVerdict, Interval
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import write_snapshot

__all__ = [
    "Candidate",
    "build_candidate",
    "built_index",
    "current_user_embeddings",
    "load_trained",
    "publish_candidate",
    "publish_snapshot",
]

_RECALL_QUERIES = 1000
_CHOICE = "index-choice.json"


def load_trained(dataset: Dataset, run_dir: Path) -> tuple[UserEncoder, CheckpointInfo]:
    """The encoder of a training run and what it is, checked to belong to the dataset.

    Raises:
        CheckpointError: there is none, or it was trained on another dataset.
    """
    encoder, info = load_checkpoint(run_dir)
    if info.dataset != dataset.info.fingerprint:
        raise CheckpointError(f"{run_dir}: was trained on another dataset than {dataset.path}")
    return encoder, info


def current_user_embeddings(dataset: Dataset, encoder: UserEncoder) -> NDArray[np.float32]:
    """Embeddings of a fixed sample of users as they stand after all their events, `[B, D]`."""
    count = min(_RECALL_QUERIES, len(dataset))
    users = np.sort(np.random.default_rng(0).choice(len(dataset), count, replace=False))
    ends = dataset.offsets[users + 1]
    times = dataset.events.timestamps[ends - 1].astype(np.int64)
    batch = user_histories(dataset, users, ends, times, encoder.config.max_length)
    return embed_users(encoder, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """All that a snapshot is made of, not published yet.

    Attributes:
        encoder, info: the trained encoder and what it is.
        vocabulary: ids and attributes, with each item's number of events and recent popularity.
        vectors: item embeddings `[N, D]`.
        index, spec: the index over them.
        searcher: searches it.
        ann_recall: recall@100 of the index against exact search, for real users' embeddings.
        choice: what was measured to choose the index; empty where it was given.
        trained_on: times of the events that the encoder was trained on.
    """

    encoder: UserEncoder
    info: CheckpointInfo
    vocabulary: Vocabulary
    vectors: NDArray[np.float32]
    index: faiss.Index
    spec: IndexSpec
    searcher: Searcher
    ann_recall: float
    choice: tuple[Measured, ...]
    trained_on: Interval


def build_candidate(
    dataset: Dataset,
    run_dir: Path,
    spec: IndexSpec | AutoIndex,
    *,
    on_choice: Callable[[str], None] = lambda line: None,
) -> Candidate:
    """Embed the items of a training run's encoder, build the index and measure it.

    Args:
        dataset: what the encoder was trained on.
        run_dir: the training run.
        spec: the index to build, or what a chosen one has to reach. A choice is kept in the run's folder: doing this
            again builds the same index.
        on_choice: told of each step of choosing.

    Raises:
        CheckpointError: the run holds no encoder of this dataset.
        ConfigError: the index cannot be built.
    """
    encoder, info = load_trained(dataset, run_dir)
    vectors = item_vectors(encoder)
    users = current_user_embeddings(dataset, encoder)
    index, spec, table = built_index(vectors, users, spec, run_dir, on_choice)
    known = {"events": pa.array(dataset.item_counts), "popularity": pa.array(recent_popularity(dataset).counts)}
    counted = Vocabulary(dataset.vocabulary.ids, {**_published(dataset.vocabulary.attributes, info), **known})
    searcher = Searcher(FaissBackend(index, vectors, spec), counted.rank_by_id)
    return Candidate(
        encoder=encoder,
        info=info,
        vocabulary=counted,
        vectors=vectors,
        index=index,
        spec=spec,
        searcher=searcher,
        ann_recall=ann_recall(searcher, vectors, users),
        choice=table,
        trained_on=_trained_on(dataset, info),
    )


def _published(attributes: Mapping[str, pa.Array], info: CheckpointInfo) -> dict[str, pa.Array]:
    """Attributes that filters can ask for: not the vectors, which are in the item embeddings."""
    learned = (info.training.get("item_features") or {}).get("attributes", {})
    return {name: one for name, one in attributes.items() if learned.get(name, {}).get("kind") != "vector"}


class _Kept(Config):
    """Contents of `index-choice.json`: what was chosen for which embeddings."""

    vectors: str
    auto: AutoIndex
    spec: IndexSpec
    table: tuple[Measured, ...]


def built_index(
    vectors: NDArray[np.float32],
    users: NDArray[np.float32],
    spec: IndexSpec | AutoIndex,
    run_dir: Path,
    on_choice: Callable[[str], None] = lambda line: None,
) -> tuple[faiss.Index, IndexSpec, tuple[Measured, ...]]:
    """The index that is asked for, what it is, and what was measured to choose it.

    Args:
        vectors: item embeddings `[N, D]`.
        users: users' embeddings `[B, D]`, to choose by.
        spec: as of `build_candidate`.
        run_dir: the training run, whose folder keeps the choice.
        on_choice: told of each step of choosing.

    Raises:
        ConfigError: the index cannot be built, or nothing reaches what is asked for.
    """
    if isinstance(spec, IndexSpec):
        return build_index(vectors, spec), spec, ()
    file, digest = run_dir / _CHOICE, hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
    if file.exists():
        kept = _Kept.model_validate_json(file.read_bytes())
        if (kept.vectors, kept.auto) == (digest, spec):
            return build_index(vectors, kept.spec), kept.spec, kept.table
    choice = choose_index(vectors, users, spec, report=on_choice)
    kept = _Kept(vectors=digest, auto=spec, spec=choice.spec, table=choice.table)
    write_atomically(file, kept.model_dump_json(indent=2).encode())
    return choice.index, choice.spec, choice.table


def _trained_on(dataset: Dataset, info: CheckpointInfo) -> Interval:
    times = dataset.events.timestamps
    end = info.split.get("time")
    last = int(times.max())
    return Interval(first=int(times.min()), last=last if end is None else min(last, end - 1))


def publish_candidate(
    candidate: Candidate, registry: Registry, report: Mapping[str, Any], gates: Sequence[GateResult] = ()
) -> str:
    """Write a candidate as the live snapshot, with a report to keep beside it; return its version.

    Args:
        candidate: what to publish.
        registry: where.
        report: for people.
        gates: verdicts that the manifest tells.
    """
    try:
        parent = registry.current()
    except NoSnapshotError:
        parent = None
    if candidate.choice:
        report = {**report, "index_choice": [measured.model_dump(mode="json") for measured in candidate.choice]}

    def write(folder: Path) -> bytes:
        return write_snapshot(
            folder,
            encoder=candidate.encoder,
            info=candidate.info,
            vocabulary=candidate.vocabulary,
            index=candidate.index,
            spec=candidate.spec,
            ann_recall=candidate.ann_recall,
            report=report,
            parent=parent,
            trained_on=candidate.trained_on,
            gates=[GateVerdict(**gate.model_dump()) for gate in gates],
        )

    return registry.publish(write)


def publish_snapshot(
    dataset: Dataset,
    run_dir: Path,
    registry: Registry,
    spec: IndexSpec | AutoIndex,
    report: Mapping[str, Any],
    *,
    on_choice: Callable[[str], None] = lambda line: None,
) -> str:
    """`build_candidate`, then `publish_candidate`."""
    return publish_candidate(build_candidate(dataset, run_dir, spec, on_choice=on_choice), registry, report)
