"""Nights of a real stream: each night's snapshot is asked for the next day's clicks.

    python -m benchmarks.nights_globo --clicks globo/ --work /tmp/nights [--nights 9]

One Parquet file a day. Every night `rebuild` runs on all days so far, once from the live weights and once from scratch,
each with a registry of its own. The next day's clicks are asked for as they come in service: a user's first click of
that day with everything before it as history; items that a snapshot cannot know count as not found. Beside the two: the
snapshot of the night before, popularity of the last hours before midnight, and item-kNN over all until midnight.

Users without a click before that day are not asked for. Nights that have rows are not evaluated again; rebuilds go on
where they were stopped.
"""

import argparse
import csv
import resource
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.splits import Queries, SplitInfo, split_dataset
from retrieval.encoder.presets import PRESETS
from retrieval.errors import GateRefusedError
from retrieval.evaluation.baselines import ItemKNN, Scorer
from retrieval.evaluation.metrics import evaluate_ranks
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


def main() -> None:
    """Run the nights that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=Path, required=True, help="folder of one Parquet file a day")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, registries and training runs")
    parser.add_argument("--nights", type=int, default=9, help="how many nights (default: 9)")
    parser.add_argument("--preset", default="demo", choices=sorted(PRESETS), help="encoder (default: demo)")
    parser.add_argument("--epochs", type=int, default=6, help="of a night from scratch (default: 6)")
    parser.add_argument("--warm-epochs", type=int, default=1, help="of a night from live weights (default: 1)")
    parser.add_argument("--queries", type=int, default=5000, help="users asked per day (default: 5000)")
    parser.add_argument("--hours", type=float, default=6, help="of recent popularity (default: 6)")
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
        runs = {name: _rebuild(parsed, log, name) for name in ("warm", "scratch")}
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


def _rebuild(parsed: argparse.Namespace, log: Path, name: str) -> tuple[Night | None, float]:
    """Run a night, and the seconds that it took; None if a gate refused."""
    training = TrainConfig(epochs=parsed.epochs, negatives="uniform", num_negatives=1024)
    # Two of everything: tonight's and the one before it.
    config = RebuildConfig(
        training=training, index=IndexSpec(), full=name == "scratch", warm_epochs=parsed.warm_epochs, keep=2
    )
    begun = time.perf_counter()
    try:
        night = rebuild(
            log,
            Registry(parsed.work / name / "registry"),
            parsed.work / name / "work",
            config,
            ingest=lambda out, known: ingest(log, out, schema=SCHEMA, known=known),
            encoder_config=lambda dataset: PRESETS[parsed.preset](num_items=len(dataset.vocabulary)),
        )
    except GateRefusedError as error:
        print(f"{name}: refused: {error}", flush=True)
        night = None
    return night, time.perf_counter() - begun


def _evaluate(
    parsed: argparse.Namespace, days: list[Path], night: int, runs: dict[str, tuple[Night | None, float]]
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

    rows = []
    for name, (found, seconds) in runs.items():
        registry = Registry(parsed.work / name / "registry")
        live = open_snapshot(registry.folder(registry.current()))
        rows.append(
            _row(night, name, live_ranks(dataset, asked, live)) | _of_night(found, seconds, dataset, live, targets)
        )
        versions = registry.versions()
        if name == "warm" and len(versions) > 1:
            before = open_snapshot(registry.folder(versions[-2]))
            rows.append(_row(night, "the night before", live_ranks(dataset, asked, before)))
    recent = dataset.events.timestamps >= midnight - parsed.hours * 3600
    recent &= dataset.events.timestamps < midnight
    counts = np.bincount(dataset.events.items[recent], minlength=len(dataset.vocabulary)).astype(np.float32)
    rows.append(_row(night, f"popularity of {parsed.hours:g} hours", _scored(dataset, asked, _constant(counts))))
    rows.append(_row(night, "item-kNN", _scored(dataset, asked, ItemKNN(dataset, split))))
    return rows


def _first_time(day: Path) -> int:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    return int(pc.min(pq.read_table(day, columns=["timestamp_ms"])["timestamp_ms"]).as_py()) // 1000


def _constant(counts: NDArray[np.float32]) -> Scorer:
    return lambda histories: np.tile(counts, (len(histories), 1))


def _scored(dataset: Dataset, asked: Queries, score: Scorer) -> NDArray[np.int64]:
    ranks = np.empty(len(asked), np.int64)
    for batch in query_batches(dataset, asked, 200):
        ranks[batch.place] = rank_by_scores(
            batch,
            len(dataset.vocabulary),
            lambda part, batch=batch: score(batch.histories[part]),  # type: ignore[misc]
        )
    return ranks


def _row(night: int, name: str, ranks: NDArray[np.int64]) -> dict[str, object]:
    found = evaluate_ranks(ranks, KS)
    recall = {f"recall@{k}": found[f"recall@{k}"] for k in KS}
    shown = {name: f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in recall.items()}
    columns = ("seconds", "published", "items", "new", "unknown_targets", "peak_memory_mb")
    return {"night": night, "ranker": name, "queries": len(ranks)} | shown | dict.fromkeys(columns, "")


def _of_night(
    night: Night | None, seconds: float, dataset: Dataset, live: Snapshot, targets: NDArray[np.int64]
) -> dict[str, object]:
    unknown = float(np.mean(live_rows(dataset, live)[targets] < 0))
    vocabulary = night.report.get("vocabulary", {}) if night is not None else {}
    return {
        "seconds": round(seconds),
        "published": "yes" if night is not None and night.version else "no",
        "items": len(live.vocabulary),
        "new": vocabulary.get("new", ""),
        "unknown_targets": round(unknown, 4),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
