"""Nights of a real stream: each night's snapshot is asked for the next day's clicks.

    python -m benchmarks.nights_globo --clicks globo/ --work /tmp/nights [--nights 9]

One Parquet file a day. Every night `rebuild` runs on all days so far from the live weights, and every few nights also
from scratch, each with a registry of its own. The next day's clicks are asked for as they come in service: a user's
first click of that day with everything before it as history; items that a snapshot cannot know count as not found.
Beside the two: the snapshot of the night before, popularity at midnight (of the last hour, and with the half-life that
predicted best until then), and item-kNN over all until midnight.

`warm_ahead` is the warm snapshot's recall less this ranker's over the same users, with its 95% interval over users.
Items are few where it counts: a day's ten most asked for are a third of its targets, so nights differ by more than the
intervals say. `rows` of "first 3 hours" ask only for targets until three in the morning.

Users without a click before that day are not asked for. Nights that have rows are not evaluated again; rebuilds go on
where they were stopped, and seconds are then of the last run only; `train_cpu` is processor time of the two trainings.
"""

import argparse
import csv
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.popularity import recent_popularity
from retrieval.data.splits import Queries, SplitInfo, split_dataset
from retrieval.encoder.presets import PRESETS
from retrieval.errors import GateRefusedError
from retrieval.evaluation.baselines import ItemKNN, Scorer
from retrieval.evaluation.gates import paired_difference
from retrieval.evaluation.metrics import Estimate, evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.index.spec import IndexSpec
from retrieval.jobs.rebuild import Night, RebuildConfig, rebuild
from retrieval.jobs.warm_start import live_ranks, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "nights_globo.csv"
KS = (10, 50, 200)
SCHEMA = EventSchema(time="timestamp_ms", time_unit="ms")
_ABOUT = ("seconds", "train_cpu", "published", "items", "new", "gone", "unknown_targets", "peak_memory_mb")


@dataclass(frozen=True, slots=True)
class _Run:
    """A night (None if a gate refused), its seconds, and processor seconds of its trainings."""

    night: Night | None
    seconds: float
    train_cpu: float


def main() -> None:
    """Run the nights that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=Path, required=True, help="folder of one Parquet file a day")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, registries and training runs")
    parser.add_argument("--nights", type=int, default=9, help="how many nights (default: 9)")
    parser.add_argument("--preset", default="stream", choices=sorted(PRESETS), help="encoder (default: stream)")
    parser.add_argument("--epochs", type=int, default=2, help="of a night from scratch (default: 2)")
    parser.add_argument("--warm-epochs", type=int, default=1, help="of a night from live weights (default: 1)")
    parser.add_argument("--queries", type=int, default=5000, help="users asked per day (default: 5000)")
    parser.add_argument("--scratch-every", type=int, default=3, help="nights between those from scratch (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    days = sorted(parsed.clicks.glob("*.parquet"))
    done = _done(parsed.out)
    log = parsed.work / "log"
    log.mkdir(parents=True, exist_ok=True)
    for night in range(min(parsed.nights, len(days) - 1)):
        for day in days[: night + 1]:
            if not (log / day.name).exists():
                (log / day.name).symlink_to(day.resolve())
        names = ("warm", "scratch") if night % parsed.scratch_every == 1 else ("warm",)
        runs = {name: _rebuild(parsed, log, name) for name in names}
        if str(night) in done:
            continue
        rows = _evaluate(parsed, days[: night + 2], night, runs)
        append_rows(parsed.out, [row | environment(torch.device("cpu")) for row in rows])
        for row in rows:
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _done(file: Path) -> set[str]:
    if not file.exists():
        return set()
    with file.open(encoding="utf-8", newline="") as opened:
        return {row["night"] for row in csv.DictReader(opened)}


def _rebuild(parsed: argparse.Namespace, log: Path, name: str) -> _Run:
    """Run a night; its time."""
    training = TrainConfig(
        epochs=parsed.epochs, negatives="in-batch", num_negatives=1024, visit_order="time", learning_rate=0.002
    )
    # Two of everything: tonight's and the one before it.
    config = RebuildConfig(
        training=training, index=IndexSpec(), full=name == "scratch", warm_epochs=parsed.warm_epochs, keep=2
    )
    begun, marks = time.perf_counter(), [("", 0.0)]
    try:
        night = rebuild(
            log,
            Registry(parsed.work / name / "registry"),
            parsed.work / name / "work",
            config,
            ingest=lambda out, known: ingest(log, out, schema=SCHEMA, known=known),
            encoder_config=lambda dataset: PRESETS[parsed.preset](num_items=len(dataset.vocabulary)),
            on_stage=lambda stage: marks.append((stage, time.process_time())),
        )
    except GateRefusedError as error:
        print(f"{name}: refused: {error}", flush=True)
        night = None
    ends = [*(mark for _, mark in marks[1:]), time.process_time()]
    taken = {stage: end - start for (stage, start), end in zip(marks, ends, strict=True)}
    return _Run(night, time.perf_counter() - begun, taken.get("train", 0.0) + taken.get("finish", 0.0))


def _evaluate(
    parsed: argparse.Namespace, days: list[Path], night: int, runs: dict[str, _Run]
) -> list[dict[str, object]]:
    folder = parsed.work / "tomorrow"
    days_so_far = parsed.work / "tomorrow-log"
    days_so_far.mkdir(exist_ok=True)
    for day in days:
        if not (days_so_far / day.name).exists():
            (days_so_far / day.name).symlink_to(day.resolve())
    dataset = ingest(days_so_far, folder, schema=SCHEMA, replace=folder.exists())
    midnight = _first_time(days[-1])
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=midnight))
    chosen = np.random.default_rng(0).permutation(len(split.test))[: parsed.queries]
    chosen.sort()
    asked = Queries(users=split.test.users[chosen], targets=split.test.targets[chosen])
    targets = dataset.events.items[asked.targets].astype(np.int64)

    ranks: dict[str, NDArray[np.int64]] = {}
    about: dict[str, dict[str, object]] = {}
    for name, run in runs.items():
        registry = Registry(parsed.work / name / "registry")
        live = open_snapshot(registry.folder(registry.current()))
        ranks[name] = live_ranks(dataset, asked, live)
        about[name] = _of_night(run, dataset, live, targets)
        versions = registry.versions()
        if name == "warm" and len(versions) > 1:
            before = open_snapshot(registry.folder(versions[-2]))
            ranks["the night before"] = live_ranks(dataset, asked, before)
    recent = dataset.events.timestamps >= midnight - 3600
    recent &= dataset.events.timestamps < midnight
    counts = np.bincount(dataset.events.items[recent], minlength=len(dataset.vocabulary)).astype(np.float32)
    ranks["popularity of 1 hour"] = scored(dataset, asked, constant(counts))
    ranks["popularity"] = scored(dataset, asked, constant(recent_popularity(dataset, split).counts))
    ranks["item-kNN"] = scored(dataset, asked, ItemKNN(dataset, split))
    early = dataset.events.timestamps[asked.targets] < midnight + 3 * 3600
    rows = []
    for when, part in (("day", np.ones(len(asked), bool)), ("first 3 hours", early)):
        for name, found in ranks.items():
            row = _row(night, name, found[part], ranks["warm"][part]) | {"asked": when}
            rows.append(row | about.get(name, dict.fromkeys(_ABOUT, "")))
    return rows


def _first_time(day: Path) -> int:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return int(pc.min(pq.read_table(day, columns=["timestamp_ms"])["timestamp_ms"]).as_py()) // 1000


def constant(counts: NDArray[np.float32]) -> Scorer:
    """Scores that are the same for everybody."""
    return lambda histories: np.tile(counts, (len(histories), 1))


def scored(dataset: Dataset, asked: Queries, score: Scorer) -> NDArray[np.int64]:
    """Exact rank of each query's target, `[Q]`."""
    ranks = np.empty(len(asked), np.int64)
    for batch in query_batches(dataset, asked, 200):
        ranks[batch.place] = rank_by_scores(
            batch,
            len(dataset.vocabulary),
            lambda part, batch=batch: score(batch.histories[part]),  # type: ignore[misc]
        )
    return ranks


def _row(night: int, name: str, ranks: NDArray[np.int64], warm: NDArray[np.int64]) -> dict[str, object]:
    found = evaluate_ranks(ranks, KS)
    row: dict[str, object] = {"night": night, "ranker": name, "queries": len(ranks)}
    row |= {f"recall@{k}": brief(found[f"recall@{k}"]) for k in KS}
    ahead = {k: paired_difference((warm <= k).astype(float), (ranks <= k).astype(float)) for k in KS}
    return row | {f"warm_ahead@{k}": "" if name == "warm" else brief(ahead[k]) for k in KS}


def brief(one: Estimate) -> str:
    """A mean and its interval, for a table."""
    return f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"


def _of_night(run: _Run, dataset: Dataset, live: Snapshot, targets: NDArray[np.int64]) -> dict[str, object]:
    unknown = float(np.mean(live_rows(dataset, live)[targets] < 0))
    report = run.night.report if run.night is not None else {}
    vocabulary = report.get("vocabulary", {})
    values = (
        round(run.seconds),
        round(run.train_cpu),
        "yes" if run.night is not None and run.night.version else "no",
        len(live.vocabulary),
        vocabulary.get("new", ""),
        vocabulary.get("gone", ""),
        round(unknown, 4),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    )
    return dict(zip(_ABOUT, values, strict=True))


if __name__ == "__main__":
    main()
