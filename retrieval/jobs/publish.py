"""A trained encoder becomes the live snapshot: embed items, build the index, measure it, write, switch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.popularity import recent_popularity
from retrieval.data.sequences import user_histories
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint
from retrieval.encoder.inference import embed_users
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import CheckpointError, NoSnapshotError
from retrieval.evaluation.ann import ann_recall
from retrieval.evaluation.gates import GateResult
from retrieval.index.choice import AutoIndex
from retrieval.index.lists import Report
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.jobs.embedded import Embedded, embed_items
from retrieval.jobs.index_choice import BuiltIndex, Chosen, built_index
from retrieval.snapshot.manifest import GateVerdict, Interval
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import searcher_of, served_rows, write_snapshot

__all__ = [
    "Candidate",
    "build_candidate",
    "current_user_embeddings",
    "load_trained",
    "publish_candidate",
    "publish_snapshot",
]

_RECALL_QUERIES = 1000


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
        embedded: its item embeddings, in files that publishing removes.
        built: the index over those of items that may be answers.
        searcher: searches it.
        ann_recall: recall@100 of the index against exact search, for real users' embeddings.
        trained_on: times of the events that the encoder was trained on.
    """

    encoder: UserEncoder
    info: CheckpointInfo
    vocabulary: Vocabulary
    embedded: Embedded
    built: BuiltIndex
    searcher: Searcher
    ann_recall: float
    trained_on: Interval


def build_candidate(
    dataset: Dataset,
    run_dir: Path,
    spec: IndexSpec | AutoIndex,
    *,
    expired: NDArray[np.bool_] | None = None,
    before: Chosen | None = None,
    on_choice: Callable[[str], None] = lambda line: None,
    on_progress: Report = lambda done, total: None,
) -> Candidate:
    """Embed the items of a training run's encoder, build the index and measure it.

    Embeddings lie in files: beside the encoder only the index itself is held in memory. Killed, it goes on from there.

    Args:
        dataset: what the encoder was trained on.
        run_dir: the training run.
        spec: the index to build, or what a chosen one has to reach. A choice is kept in the run's folder: doing this
            again builds the same index.
        before: the choice that the live index rests on.
        expired: items that the index leaves out, bool `[N]`; None: none.
        on_choice: told of each step of choosing.
        on_progress: told how many items are in the index, and of how many.

    Raises:
        CheckpointError: the run holds no encoder of this dataset.
        ConfigError: the index cannot be built.
    """
    encoder, info = load_trained(dataset, run_dir)
    users = current_user_embeddings(dataset, encoder)
    known = {"events": pa.array(dataset.item_counts), "popularity": pa.array(recent_popularity(dataset).counts)}
    if expired is not None and expired.any():
        known["expired"] = pa.array(expired)
    counted = Vocabulary(dataset.vocabulary.ids, {**_published(dataset.vocabulary.attributes, info), **known})
    served = served_rows(counted)
    embedded = embed_items(encoder, info.weights_sha256, served, run_dir)
    built = built_index(
        embedded.answers, users, spec, run_dir, on_choice, before=before, work=embedded.folder, on_progress=on_progress
    )
    searcher = searcher_of(built.index, embedded.items, counted)
    return Candidate(
        encoder=encoder,
        info=info,
        vocabulary=counted,
        embedded=embedded,
        built=built,
        searcher=searcher,
        ann_recall=ann_recall(searcher, embedded.answers, users),
        trained_on=_trained_on(dataset, info),
    )


def _published(attributes: Mapping[str, pa.Array], info: CheckpointInfo) -> dict[str, pa.Array]:
    """Attributes that filters can ask for: not the vectors, which are in the item embeddings, nor what ingest notes."""
    learned = (info.training.get("item_features") or {}).get("attributes", {})
    left_out = {name for name in attributes if learned.get(name, {}).get("kind") == "vector"} | {"listed"}
    return {name: one for name, one in attributes.items() if name not in left_out}


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
    report = {**report, "tables": candidate.info.training.get("tables", {})}
    table = candidate.built.table
    if table:
        report = {**report, "index_choice": [measured.model_dump(mode="json") for measured in table]}

    def write(folder: Path) -> bytes:
        return write_snapshot(
            folder,
            encoder=candidate.encoder,
            info=candidate.info,
            vocabulary=candidate.vocabulary,
            index=candidate.built.index,
            ann_recall=candidate.ann_recall,
            report=report,
            parent=parent,
            trained_on=candidate.trained_on,
            gates=[GateVerdict(**gate.model_dump()) for gate in gates],
        )

    version = registry.publish(write)
    candidate.embedded.remove()
    return version


def publish_snapshot(
    dataset: Dataset,
    run_dir: Path,
    registry: Registry,
    spec: IndexSpec | AutoIndex,
    report: Mapping[str, Any],
    *,
    on_choice: Callable[[str], None] = lambda line: None,
    on_progress: Report = lambda done, total: None,
) -> str:
    """`build_candidate`, then `publish_candidate`."""
    candidate = build_candidate(dataset, run_dir, spec, on_choice=on_choice, on_progress=on_progress)
    return publish_candidate(candidate, registry, report)
