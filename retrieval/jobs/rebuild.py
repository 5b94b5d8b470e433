"""One night: ingest, train from last night's weights, judge, build, judge again, publish.

Two trainings. The first stops at a moment T, so that the events after it can tell whether tonight's model is as good as
the live one, which has not seen them either. If it is, a second, short one goes on over everything, and its encoder is
what is published. T lies in the middle of what is new since the live snapshot was trained; on the first night, and with
`full`, where the last events begin that `hold_out` names.

Everything that a stage makes lies in a folder named by what went in (the log's files, the settings, the live version):
a rerun after a crash goes on where it stopped, and a rerun after success does nothing.
"""

import contextlib
import fcntl
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.sequences import user_histories
from retrieval.data.splits import Queries, SplitInfo, split_dataset, training_counts
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import DataError, GateRefusedError, InputError, NoSnapshotError
from retrieval.evaluation.gates import GateConfig, GateResult, at_least, at_most, not_worse
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.files import remove_temporary_files, write_atomically
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories
from retrieval.index.choice import AutoIndex
from retrieval.index.spec import IndexSpec
from retrieval.jobs.publish import Candidate, build_candidate, current_user_embeddings, publish_candidate
from retrieval.jobs.warm_start import carried_over, live_histories, live_ranks, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import StepReport, train

__all__ = ["Night", "RebuildConfig", "rebuild"]

_SAMPLE = 500
_DEPTH = 100
_SEARCHES = 50


class RebuildConfig(Config):
    """How a night goes.

    Attributes:
        training: hyperparameters; its epochs are those of a night from scratch.
        index: the index to build.
        gates: limits.
        full: train from scratch instead of from the live snapshot's weights.
        warm_epochs: epochs of the first training when it starts from the live weights.
        finish_epochs: epochs of the second training.
        hold_out: share of all events, the latest, that the gates are measured on where no live snapshot says what is
            new.
        keep: snapshots that stay in the registry, beside the live one.
        inputs: whatever else decides what `ingest` and `encoder_config` make: another one is another night.
    """

    training: TrainConfig
    index: IndexSpec | AutoIndex
    gates: GateConfig = Field(default_factory=GateConfig)
    full: bool = False
    warm_epochs: int = Field(default=3, ge=1)
    finish_epochs: int = Field(default=1, ge=1)
    hold_out: float = Field(default=0.05, gt=0, lt=1)
    keep: int = Field(default=7, ge=1)
    inputs: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What a night came to.

    Attributes:
        version: the version that was published, tonight or by an earlier run of the same night; None in a dry run, or
            if there was nothing new.
        report: what was found, as `report.json` has it; empty if there was nothing new.
        folder: where the night's files lie.
    """

    version: str | None
    report: dict[str, Any]
    folder: Path


@dataclass(slots=True)
class _Clock:
    """Seconds by stage; says what begins."""

    on_stage: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.on_stage(name)
        begun = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begun, 2)


def rebuild(
    sources: Path,
    registry: Registry,
    work: Path,
    config: RebuildConfig,
    *,
    ingest: Callable[[Path], Dataset],
    encoder_config: Callable[[Dataset], EncoderConfig],
    histories: RecordedHistories | None = None,
    dry_run: bool = False,
    device: torch.device | str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Night:
    """Run a night, or go on with one that did not end.

    Args:
        sources: the event log, a file or a folder of files: all events, old and new.
        registry: where the live snapshot is and where the new one goes.
        work: folder of this job; one night's files stay in it.
        config: how.
        ingest: reads the log into a dataset at the path that it is given.
        encoder_config: shape of the encoder for a dataset.
        histories: a store that is given the log's events; whatever the gates say, since events are no model's.
        dry_run: do everything but fill the store, publish and prune.
        device: where to train.
        on_stage: called with a stage's name as it begins.
        on_step: called after every step of training.

    Raises:
        InputError: the log, the settings or the folders cannot be used, or another rebuild is at work in `work`.
        RegistryBusyError: another rebuild is at work in the registry.
        GateRefusedError: a gate refused; the live snapshot stays. The report lies in the night's folder.
        HistoryStoreError: the store of histories cannot be written.
        TrainingError: training diverged.
    """
    clock = _Clock(on_stage)
    with _alone(work), registry.lease():
        live = _live(registry)
        made_by = _made_by(registry, live)
        if live is not None and made_by and made_by["night"] == _name_of_night(sources, config, made_by["live"]):
            return Night(version=live.version, report=made_by, folder=work / f"night-{made_by['night']}")
        key = _name_of_night(sources, config, live.version if live is not None else None)
        folder = work / f"night-{key}"
        for other in work.glob("night-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        remove_temporary_files(folder)
        with clock.stage("ingest"):
            dataset = Dataset(folder / "dataset") if (folder / "dataset").exists() else ingest(folder / "dataset")
        if histories is not None and not dry_run:
            with clock.stage("histories"):
                fill_histories(dataset, histories)
        moment = _moment(dataset, made_by.get("last_event"), config)
        if moment is None:
            return Night(version=None, report={}, folder=folder)
        shape = encoder_config(dataset)
        split = split_dataset(dataset, SplitInfo(protocol="global-time", time=moment))
        warm = live is not None and not config.full
        with clock.stage("train"):
            epochs = config.warm_epochs if warm else config.training.epochs
            judged = train(
                dataset,
                split,
                shape,
                config.training.model_copy(update={"epochs": epochs}),
                folder / "judged",
                initial=carried_over(shape, dataset, live) if live is not None and warm else None,
                resume=True,
                device=device,
                on_step=on_step,
            )
        with clock.stage("evaluate"):
            popularity = training_counts(dataset, split).astype(np.float32)
            ranks = {"candidate": _ranks(dataset, split.test, judged)}
            ranks["popularity"] = _popularity_ranks(dataset, split.test, shape.max_length, popularity)
            if live is not None:
                ranks["live"] = live_ranks(dataset, split.test, live)
            results = _quality_gates(ranks, config.gates)
        with clock.stage("finish"):
            train(
                dataset,
                split_dataset(dataset, SplitInfo(protocol="all")),
                shape,
                config.training.model_copy(update={"epochs": config.finish_epochs}),
                folder / "final",
                initial=judged.state_dict(),
                resume=True,
                device=device,
                on_step=on_step,
            )
        with clock.stage("index"):
            candidate = build_candidate(dataset, folder / "final", config.index)
            results += _snapshot_gates(dataset, candidate, live, config.gates)
        report = {
            "night": key,
            "live": live.version if live is not None else None,
            "start": "live weights" if warm else "scratch",
            "held_out_since": moment,
            "last_event": int(dataset.events.timestamps.max()),
            "events": dataset.info.events,
            "vocabulary": _vocabulary(dataset, live),
            "gates": [result.model_dump() for result in results],
            "held_out": {name: _figures(found, config.gates.k) for name, found in ranks.items()},
            "seconds": clock.seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        write_atomically(folder / "report.json", json.dumps(report, indent=2).encode())
        refused = [result for result in results if not result.passed]
        if refused:
            stays = f"{live.version} stays live" if live is not None else "nothing is published"
            reasons = "; ".join(f"{result.gate}: {result.note}" for result in refused)
            raise GateRefusedError(f"{reasons}. {stays}; report: {folder / 'report.json'}")
        if dry_run:
            return Night(version=None, report=report, folder=folder)
        with clock.stage("publish"):
            version = publish_candidate(candidate, registry, report, results)
            registry.prune(config.keep)
        return Night(version=version, report=report, folder=folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which the system releases however this process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "rebuild.lock").open("a")
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another rebuild is at work there") from None
        yield


def _live(registry: Registry) -> Snapshot | None:
    try:
        return open_snapshot(registry.folder(registry.current()))
    except NoSnapshotError:
        return None


def _name_of_night(sources: Path, config: RebuildConfig, live: str | None) -> str:
    """What goes into a night, as 16 hex digits."""
    if not sources.exists():
        raise DataError(f"{sources}: no such file or folder")
    files = sorted(path for path in (sources.rglob("*") if sources.is_dir() else [sources]) if path.is_file())
    # By size and time of writing: reading a log of months to hash it would take longer than ingest.
    stats = [(str(path.relative_to(sources)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([stats, config.model_dump(mode="json"), live])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _made_by(registry: Registry, live: Snapshot | None) -> dict[str, Any]:
    """The report that the live snapshot was published with; empty if it is not a rebuild's."""
    if live is None:
        return {}
    found = json.loads((registry.folder(live.version) / "report.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) and "night" in found else {}


def _moment(dataset: Dataset, last_event: int | None, config: RebuildConfig) -> int | None:
    """The moment T in seconds; None if there is no event after `last_event`."""
    times = np.asarray(dataset.events.timestamps)
    if last_event is None or config.full:
        return int(np.quantile(times, 1 - config.hold_out)) + 1
    new = times[times > last_event]
    return int(np.quantile(new, 0.5, method="higher")) if len(new) else None


def _vocabulary(dataset: Dataset, live: Snapshot | None) -> dict[str, int]:
    """Items tonight, those that are new, and those of the live snapshot that the log has no more."""
    if live is None:
        return {"items": len(dataset.vocabulary), "new": len(dataset.vocabulary), "gone": 0}
    known = int(np.count_nonzero(live_rows(dataset, live) >= 0))
    return {
        "items": len(dataset.vocabulary),
        "new": len(dataset.vocabulary) - known,
        "gone": len(live.vocabulary) - known,
    }


def _ranks(dataset: Dataset, queries: Queries, encoder: UserEncoder) -> NDArray[np.int64]:
    """Exact rank of each query's target, `[Q]`."""
    vectors = item_vectors(encoder)
    ranks = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, encoder.config.max_length):
        users = embed_users(encoder, batch.histories)
        ranks[batch.place] = rank_by_scores(
            batch,
            len(vectors),
            lambda part, users=users: users[part] @ vectors.T,  # type: ignore[misc]
        )
    return ranks


def _popularity_ranks(
    dataset: Dataset, queries: Queries, max_length: int, counts: NDArray[np.float32]
) -> NDArray[np.int64]:
    ranks = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, max_length):
        ranks[batch.place] = rank_by_scores(
            batch, len(counts), lambda part: np.tile(counts, (part.stop - part.start, 1))
        )
    return ranks


def _figures(ranks: NDArray[np.int64], k: int) -> dict[str, Any]:
    return {name: estimate.model_dump() for name, estimate in evaluate_ranks(ranks, sorted({10, k, 200})).items()}


def _quality_gates(ranks: dict[str, NDArray[np.int64]], config: GateConfig) -> list[GateResult]:
    """Recall and NDCG on the held-out events against the live snapshot, or on a first night against popularity."""
    rival, words = ("live", "the live snapshot") if "live" in ranks else ("popularity", "popularity")
    hits = {name: (found <= config.k).astype(float) for name, found in ranks.items()}
    gains = {name: hits[name] / np.log2(found + 1.0) for name, found in ranks.items()}
    return [
        not_worse(f"recall@{config.k}", hits["candidate"], hits[rival], words, config),
        not_worse(f"ndcg@{config.k}", gains["candidate"], gains[rival], words, config),
    ]


def _snapshot_gates(
    dataset: Dataset, candidate: Candidate, live: Snapshot | None, config: GateConfig
) -> list[GateResult]:
    """What the snapshot itself must show."""
    users = current_user_embeddings(dataset, candidate.encoder)[:_SAMPLE]
    norms = np.linalg.norm(np.concatenate([candidate.vectors, users]), axis=1)
    worst = float(np.abs(norms - 1).max()) if np.isfinite(norms).all() else -1.0
    results = [
        GateResult(
            gate="norms", passed=0 <= worst < 1e-3, figure=worst, limit=1e-3, note="every embedding has length 1"
        ),
        at_least(
            "ann-recall",
            candidate.ann_recall,
            config.min_ann_recall,
            f"recall@100 of the index against exact search: {candidate.ann_recall:.4f}",
        ),
    ]
    if not results[0].passed:
        return results
    seconds = _search_seconds(candidate, users)
    note = f"median of single searches: {1000 * seconds:.2f} ms"
    results.append(at_most("latency", 1000 * seconds, config.max_search_ms, note))
    if live is None:
        return results
    share = len(candidate.vocabulary) / len(live.vocabulary)
    note = f"{len(candidate.vocabulary):,} items, the live snapshot has {len(live.vocabulary):,}"
    results.append(at_least("catalogue", share, config.min_catalogue, note))
    ours, theirs = _answers(dataset, candidate, live)
    coverage = len(set().union(*ours)) / max(1, len(set().union(*theirs)))
    note = f"{coverage:.2f} times as many different items in the first {_DEPTH} of {len(ours)} users"
    results.append(at_least("coverage", coverage, config.min_coverage, note))
    overlap = float(np.mean([len(mine & old) / max(1, len(old)) for mine, old in zip(ours, theirs, strict=True)]))
    note = f"{overlap:.3f} of the live snapshot's first {_DEPTH} come up again"
    results.append(at_least("overlap", overlap, config.min_overlap, note))
    return results


def _search_seconds(candidate: Candidate, users: NDArray[np.float32]) -> float:
    k = min(_DEPTH, len(candidate.vectors))
    seconds = []
    candidate.searcher.search(users[:1], [k])
    for user in users[:_SEARCHES]:
        begun = time.perf_counter()
        candidate.searcher.search(user[None], [k])
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def _answers(
    dataset: Dataset, candidate: Candidate, live: Snapshot
) -> tuple[list[set[int | str]], list[set[int | str]]]:
    """Ids of the first items for some users as they stand now: the candidate's and the live snapshot's."""
    users = np.arange(len(dataset))[:: max(1, len(dataset) // _SAMPLE)][:_SAMPLE]
    # A request right after each user's last event, which is then the end of the history.
    ends = dataset.offsets[users + 1]
    times = dataset.events.timestamps[ends - 1].astype(np.int64)
    histories = user_histories(dataset, users, ends, times, candidate.encoder.config.max_length)
    found = candidate.searcher.search(
        embed_users(candidate.encoder, histories), [min(_DEPTH, len(candidate.vectors))] * len(users)
    )
    ours: list[set[int | str]] = [set(candidate.vocabulary.ids_of(rows[rows >= 0])) for rows in found.rows]
    past, known = live_histories(dataset, live, users, ends, times)
    found = live.searcher.search(embed_users(live.encoder, past), [min(_DEPTH, len(live.vocabulary))] * len(past))
    theirs: list[set[int | str]] = [set(live.vocabulary.ids_of(rows[rows >= 0])) for rows in found.rows]
    return [ours[place] for place in known], theirs
