"""One night: ingest, train from last night's weights, judge, build, judge again, publish.

Two trainings. The first stops at a moment T, so that the events after it can tell whether tonight's model is as good as
the live one, which has not seen them either. If it is, a second, short one goes on over everything, and its encoder is
what is published. T lies in the middle of what is new since the live snapshot was trained; on the first night, and with
`full`, where the last events begin that `hold_out` names.

Rows of the item table are appended to and never given to another item; what the optimiser knows of a row moves with it.
Only a night from scratch begins a new table.

Everything that a stage makes lies in a folder named by what went in (the log's files, the settings, the live version):
a rerun after a crash goes on where it stopped, and a rerun after success does nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.splits import Split, SplitInfo, split_dataset
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import DataError, GateRefusedError
from retrieval.evaluation.gates import GateConfig, GateResult
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories
from retrieval.index.choice import AutoIndex
from retrieval.index.lists import Report
from retrieval.index.spec import IndexSpec
from retrieval.jobs.expiry import Expiry, expired_items
from retrieval.jobs.index_choice import Chosen
from retrieval.jobs.judge import asked_of, held_out_ranks, quality_gates, snapshot_gates
from retrieval.jobs.night import (
    FINAL,
    JUDGED,
    Clock,
    alone,
    explained,
    live_snapshot,
    made_by,
    name_of_night,
    night_folder,
    state_of_live,
)
from retrieval.jobs.publish import build_candidate, publish_candidate
from retrieval.jobs.report import keep_report, keep_report_of_live, night_report
from retrieval.jobs.warm_start import carried_over, check_shape, moved_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot
from retrieval.training.batches import Fresh
from retrieval.training.config import TrainConfig
from retrieval.training.optimizer import updates_by_rows
from retrieval.training.state import read_state
from retrieval.training.trainer import TRAINING_STATE, StepReport, train

__all__ = ["Night", "RebuildConfig", "rebuild"]


class RebuildConfig(Config):
    """How a night goes.

    Attributes:
        training: hyperparameters; its epochs are those of a night from scratch.
        index: the index to build.
        gates: limits.
        expiry: which items are no answers any more.
        full: train from scratch instead of from the live snapshot's weights, and forget rows that neither the log nor
            the metadata needs.
        warm_epochs: epochs of the first training when it starts from the live weights.
        finish_epochs: epochs of the second training.
        history_share: users without new events that a night from the live weights trains on, as a share of those with:
            see `training.batches.Fresh`.
        hold_out: share of all events, the latest, that the gates are measured on where no live snapshot says what is
            new.
        keep: snapshots that stay in the registry, beside the live one.
        inputs: whatever else decides what `ingest` and `encoder_config` make: another one is another night.
    """

    training: TrainConfig
    index: IndexSpec | AutoIndex
    gates: GateConfig = Field(default_factory=GateConfig)
    expiry: Expiry = Field(default_factory=Expiry)
    full: bool = False
    warm_epochs: int = Field(default=3, ge=1)
    finish_epochs: int = Field(default=1, ge=1)
    history_share: float = Field(default=0.25, ge=0)
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


def rebuild(
    sources: Path,
    registry: Registry,
    work: Path,
    config: RebuildConfig,
    *,
    ingest: Callable[[Path, pa.Array], Dataset],
    encoder_config: Callable[[Dataset], EncoderConfig],
    histories: RecordedHistories | None = None,
    dry_run: bool = False,
    device: torch.device | str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    on_step: Callable[[StepReport], None] | None = None,
    on_indexed: Report = lambda done, total: None,
) -> Night:
    """Run a night, or go on with one that did not end.

    Args:
        sources: the event log, a file or a folder of files: all events, old and new.
        registry: where the live snapshot is and where the new one goes.
        work: folder of this job; the files of one night, and what the live snapshot's had learned, stay in it.
        config: how.
        ingest: reads the log into a dataset at the path that it is given, with the item ids known before.
        encoder_config: shape of the encoder for a dataset.
        histories: a store that is given the log's events; whatever the gates say, since events are no model's.
        dry_run: do everything but fill the store, publish and prune.
        device: where to train.
        on_stage: called with a stage's name as it begins.
        on_note: called with a sentence that an operator should read.
        on_step: called after every step of training.
        on_indexed: told how many items are in the index, and of how many.

    Raises:
        InputError: the log, the settings or the folders cannot be used, or another rebuild is at work in `work`.
        RegistryBusyError: another rebuild is at work in the registry.
        GateRefusedError: a gate refused; the live snapshot stays. The report lies in the night's folder.
        HistoryStoreError: the store of histories cannot be written.
        TrainingError: training diverged.
        RetrievalError: a file cannot be written; run again it goes on.
    """
    if not sources.exists():
        # Before there are folders of a job that was called with a mistake.
        raise DataError(f"{sources}: no such file or folder")
    clock = Clock(on_stage)
    with explained(work), alone(work), registry.lease():
        live = live_snapshot(registry)
        last = made_by(registry, live)
        if live is not None and last and last["night"] == name_of_night(sources, config, last["live"]):
            folder = work / f"night-{last['night']}"
            keep_report_of_live(work, folder, last, live.version)
            return Night(version=live.version, report=last, folder=folder)
        key = name_of_night(sources, config, live.version if live is not None else None)
        folder = night_folder(work, key, last.get("night"))
        base = live if not config.full else None
        with clock.stage("ingest"):
            known = base.vocabulary.ids if base is not None else pa.array([], pa.int64())
            there = (folder / "dataset").exists()
            dataset = Dataset(folder / "dataset") if there else ingest(folder / "dataset", known)
        if histories is not None and not dry_run:
            with clock.stage("histories"):
                fill_histories(dataset, histories)
        last_event = last.get("last_event")
        moment = _moment(dataset, last_event, config)
        if moment is None:
            return Night(version=None, report={}, folder=folder)
        expired = expired_items(dataset, config.expiry)
        trainings = _Trainings(
            dataset, encoder_config(dataset), config, folder, base, last_event, moment, device=device, on_step=on_step
        )
        with clock.stage("train"):
            learned, optimiser = _learned(work, trainings.shape, dataset, base, last.get("night"), config)
            if base is not None and learned.state is None:
                on_note(optimiser)
            judged = trainings.judged(learned)
        with clock.stage("evaluate"):
            queries = asked_of(trainings.split.test, config.gates, len(dataset.vocabulary))
            ranks = held_out_ranks(dataset, trainings.split, queries, judged, live, expired)
            results = quality_gates(ranks, config.gates)
        with clock.stage("finish"):
            # Read again from its run if need be: two encoders of millions of items are gigabytes.
            del judged
            trainings.final()
        with clock.stage("index"):
            chosen = last.get("index", {}).get("chosen") if base is not None else None
            before = Chosen.model_validate(chosen) if chosen is not None else None
            candidate = build_candidate(
                dataset, folder / FINAL, config.index, expired=expired, before=before, on_progress=on_indexed
            )
            results += snapshot_gates(dataset, candidate, live, config.gates)
        report = night_report(
            dataset,
            candidate,
            live,
            last,
            night=key,
            start="live weights" if base is not None else "scratch",
            optimiser=optimiser,
            held_out_since=moment,
            ranks=ranks,
            results=results,
            k=config.gates.k,
            trainings={"train": folder / JUDGED, "finish": folder / FINAL},
            clock=clock,
        )
        refused = [result for result in results if not result.passed]
        if refused:
            keep_report(work, folder, report, "refused")
            raise GateRefusedError(_refusal(refused, live, folder))
        if dry_run:
            keep_report(work, folder, report, "not published: a dry run")
            return Night(version=None, report=report, folder=folder)
        with clock.stage("publish"):
            version = publish_candidate(candidate, registry, report, results)
            registry.prune(config.keep)
        # The snapshot's own report cannot tell how long it took to publish it.
        report |= {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "memory_mb": clock.memory_mb}
        keep_report(work, folder, report, f"published as {version}")
        return Night(version=version, report=report, folder=folder)


def _refusal(refused: list[GateResult], live: Snapshot | None, folder: Path) -> str:
    stays = f"{live.version} stays live" if live is not None else "nothing is published"
    reasons = "; ".join(f"{result.gate}: {result.note}" for result in refused)
    return f"{reasons}. {stays}; report: {folder / 'report.html'}"


class _Trainings:
    """A night's two trainings.

    Args:
        dataset: tonight's events.
        shape: of the encoder.
        config: of the night.
        folder: of the night.
        base: the snapshot that training goes on from; None from scratch.
        last_event: time of the last event that this had seen, seconds; None if unknown.
        moment: T, seconds.
        device: where to train.
        on_step: called after every step.
    """

    def __init__(
        self,
        dataset: Dataset,
        shape: EncoderConfig,
        config: RebuildConfig,
        folder: Path,
        base: Snapshot | None,
        last_event: int | None,
        moment: int,
        *,
        device: torch.device | str,
        on_step: Callable[[StepReport], None] | None,
    ) -> None:
        self.shape, self.split = shape, split_dataset(dataset, SplitInfo(protocol="global-time", time=moment))
        self._dataset, self._config, self._folder = dataset, config, folder
        self._device, self._on_step = device, on_step
        self._epochs = config.warm_epochs if base is not None else config.training.epochs
        # What was learned before each of the two; from scratch both meet everything.
        self._since = (last_event + 1, moment) if base is not None and last_event is not None else (None, None)

    def judged(self, learned: "_Learned") -> UserEncoder:
        """Train on what came before T."""
        return self._run(self.split, JUDGED, self._epochs, self._since[0], learned)

    def final(self) -> None:
        """Go on from `judged` with everything."""
        run = self._folder / JUDGED
        if (run / TRAINING_STATE).exists():
            learned = _Learned(state=lambda: read_state(run / TRAINING_STATE))
        else:
            learned = _Learned(initial=load_checkpoint(run)[0].state_dict())
        everything = split_dataset(self._dataset, SplitInfo(protocol="all"))
        self._run(everything, FINAL, self._config.finish_epochs, self._since[1], learned)

    def _run(self, split: Split, name: str, epochs: int, since: int | None, learned: "_Learned") -> UserEncoder:
        fresh = Fresh(since=since, history_share=self._config.history_share) if since is not None else None
        return train(
            self._dataset,
            split,
            self.shape,
            self._config.training.model_copy(update={"epochs": epochs}),
            self._folder / name,
            initial=learned.initial,
            learned=learned.state,
            fresh=fresh,
            resume=True,
            device=self._device,
            on_step=self._on_step,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """What a training goes on from: a whole training state, read when it is wanted, or weights alone, or neither."""

    initial: dict[str, Tensor] | None = None
    state: Callable[[], dict[str, Tensor]] | None = None


def _learned(
    work: Path,
    shape: EncoderConfig,
    dataset: Dataset,
    base: Snapshot | None,
    live_night: str | None,
    config: RebuildConfig,
) -> tuple[_Learned, str]:
    """What tonight's training goes on from, and a sentence on the optimiser."""
    if base is None:
        return _Learned(), "the optimiser starts anew"
    check_shape(shape, dataset, base)
    training = config.training
    features = training.item_features.model_dump(mode="json") if training.item_features is not None else None
    by_rows = updates_by_rows(training, shape.num_items)
    settings = {"item_features": features, "sparse_items": by_rows, "ema_decay": training.ema_decay}
    state, found = state_of_live(work, base, live_night, settings)
    if state is None:
        return _Learned(initial=carried_over(shape, dataset, base)), found
    return _Learned(state=lambda: moved_rows(state(), dataset, base)), found


def _moment(dataset: Dataset, last_event: int | None, config: RebuildConfig) -> int | None:
    """The moment T in seconds; None if there is no event after `last_event`."""
    times = np.asarray(dataset.events.timestamps)
    if last_event is None or config.full:
        return int(np.quantile(times, 1 - config.hold_out)) + 1
    new = times[times > last_event]
    return int(np.quantile(new, 0.5, method="higher")) if len(new) else None
