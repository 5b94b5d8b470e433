"""One night: ingest, train from last night's weights, judge, build, judge again, publish.

Two trainings. The first stops at a moment T, so that the events after it can tell whether tonight's model is as good as
the live one, which has not seen them either. If it is, a second, short one goes on over everything, and its encoder is
what is published. T lies in the middle of what is new since the live snapshot was trained; on the first night, and with
`full`, where the last events begin that `hold_out` names.

Everything that a stage makes lies in a folder named by what went in (the log's files, the settings, the live version):
a rerun after a crash goes on where it stopped, and a rerun after success does nothing.
"""

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.config import EncoderConfig
from retrieval.errors import GateRefusedError
from retrieval.evaluation.gates import GateConfig
from retrieval.files import write_atomically
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories
from retrieval.index.choice import AutoIndex
from retrieval.index.spec import IndexSpec
from retrieval.jobs.judge import figures, held_out_ranks, quality_gates, snapshot_gates
from retrieval.jobs.night import Clock, alone, live_snapshot, made_by, name_of_night, night_folder
from retrieval.jobs.publish import build_candidate, publish_candidate
from retrieval.jobs.warm_start import carried_over, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot
from retrieval.training.batches import Fresh
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import StepReport, train

__all__ = ["Night", "RebuildConfig", "rebuild"]


class RebuildConfig(Config):
    """How a night goes.

    Attributes:
        training: hyperparameters; its epochs are those of a night from scratch.
        index: the index to build.
        gates: limits.
        full: train from scratch instead of from the live snapshot's weights.
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
    clock = Clock(on_stage)
    with alone(work), registry.lease():
        live = live_snapshot(registry)
        last = made_by(registry, live)
        if live is not None and last and last["night"] == name_of_night(sources, config, last["live"]):
            return Night(version=live.version, report=last, folder=work / f"night-{last['night']}")
        key = name_of_night(sources, config, live.version if live is not None else None)
        folder = night_folder(work, key)
        with clock.stage("ingest"):
            dataset = Dataset(folder / "dataset") if (folder / "dataset").exists() else ingest(folder / "dataset")
        if histories is not None and not dry_run:
            with clock.stage("histories"):
                fill_histories(dataset, histories)
        last_event = last.get("last_event")
        moment = _moment(dataset, last_event, config)
        if moment is None:
            return Night(version=None, report={}, folder=folder)
        shape = encoder_config(dataset)
        split = split_dataset(dataset, SplitInfo(protocol="global-time", time=moment))
        warm = live is not None and not config.full
        # What was learned before each of the two trainings; a night from scratch meets everything in both.
        known = (last_event + 1, moment) if warm and last_event is not None else (None, None)
        share = config.history_share
        fresh = [Fresh(since=since, history_share=share) if since is not None else None for since in known]
        with clock.stage("train"):
            epochs = config.warm_epochs if warm else config.training.epochs
            judged = train(
                dataset,
                split,
                shape,
                config.training.model_copy(update={"epochs": epochs}),
                folder / "judged",
                initial=carried_over(shape, dataset, live) if live is not None and warm else None,
                fresh=fresh[0],
                resume=True,
                device=device,
                on_step=on_step,
            )
        with clock.stage("evaluate"):
            ranks = held_out_ranks(dataset, split, judged, live)
            results = quality_gates(ranks, config.gates)
        with clock.stage("finish"):
            train(
                dataset,
                split_dataset(dataset, SplitInfo(protocol="all")),
                shape,
                config.training.model_copy(update={"epochs": config.finish_epochs}),
                folder / "final",
                initial=judged.state_dict(),
                fresh=fresh[1],
                resume=True,
                device=device,
                on_step=on_step,
            )
        with clock.stage("index"):
            candidate = build_candidate(dataset, folder / "final", config.index)
            results += snapshot_gates(dataset, candidate, live, config.gates)
        report = {
            "night": key,
            "live": live.version if live is not None else None,
            "start": "live weights" if warm else "scratch",
            "held_out_since": moment,
            "last_event": int(dataset.events.timestamps.max()),
            "events": dataset.info.events,
            "vocabulary": _vocabulary(dataset, live),
            "gates": [result.model_dump() for result in results],
            "held_out": {name: figures(found, config.gates.k) for name, found in ranks.items()},
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
