"""What a shorter interval gains on a real stream: rebuilds every hour against the snapshot of midnight.

    python -m benchmarks.hours_globo --clicks globo/ --work /tmp/hours [--day 3] [--hours 12 13 14 15]

A snapshot of all clicks until midnight before a day, from scratch; then at each of the hours, UTC, a rebuild from the
live weights on all clicks until then, without finishing epochs of history. Asked for are the clicks of the hour after
it: each user's first one, with everything before it as history. An hour that has rows is not evaluated again.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from benchmarks.nights_globo import KS, SCHEMA, brief, constant, scored
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import ingest
from retrieval.data.popularity import recent_popularity
from retrieval.data.splits import Queries, Split, SplitInfo, split_dataset
from retrieval.encoder.presets import PRESETS
from retrieval.evaluation.gates import GateConfig, paired_difference
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.index.spec import IndexSpec
from retrieval.jobs.rebuild import RebuildConfig, rebuild
from retrieval.jobs.warm_start import live_ranks, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from retrieval.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "hours_globo.csv"
_HOUR = 3600


def main() -> None:
    """Rebuild at midnight and at the hours; evaluate the hours that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=Path, required=True, help="folder of one Parquet file a day")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, registry and training runs")
    parser.add_argument("--day", type=int, default=3, help="place of the day among the files (default: 3)")
    parser.add_argument("--hours", type=int, nargs="+", default=[12, 13, 14, 15], help="of rebuilds, UTC")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    days = sorted(parsed.clicks.glob("*.parquet"))[: parsed.day + 1]
    clicks = pa.concat_tables([pq.read_table(day, columns=["user_id", "item_id", "timestamp_ms"]) for day in days])
    first = int(pc.min(pq.read_table(days[-1], columns=["timestamp_ms"])["timestamp_ms"]).as_py())
    midnight = first // (24 * _HOUR * 1000) * 24 * _HOUR
    registry = Registry(parsed.work / "registry")
    done: set[tuple[str, str]] = set()
    if parsed.out.exists():
        with parsed.out.open(encoding="utf-8", newline="") as file:
            done = {(row["day"], row["hour"]) for row in csv.DictReader(file)}
    versions = []
    for hour in (0, *parsed.hours):
        seconds = _rebuilt(parsed.work, registry, clicks, midnight + _HOUR * hour)
        versions.append(registry.current())
        if hour and (str(parsed.day), str(hour)) not in done:
            rows = _asked(
                parsed.work, registry, clicks, midnight + _HOUR * hour, (versions[0], versions[-2], versions[-1])
            )
            about = {"day": parsed.day, "hour": hour, "rebuild_seconds": round(seconds)}
            append_rows(parsed.out, [about | row | environment(torch.device("cpu")) for row in rows])
            for row in rows:
                print(about | row, flush=True)


def _rebuilt(work: Path, registry: Registry, clicks: pa.Table, moment: int) -> float:
    """Publish a snapshot of the clicks before a moment, seconds; what it took."""
    log = work / "logs" / str(moment)
    if not log.exists():
        log.mkdir(parents=True)
        pq.write_table(clicks.filter(pc.less(clicks["timestamp_ms"], moment * 1000)), log / "clicks.parquet")
    training = TrainConfig(epochs=2, negatives="in-batch", num_negatives=1024, visit_order="time", learning_rate=0.002)
    begun = time.perf_counter()
    rebuild(
        log,
        registry,
        work / "nights" / str(moment),
        # The gates' answer is no part of the question.
        RebuildConfig(training=training, index=IndexSpec(), gates=GateConfig(worse_by=1.0), warm_epochs=1, keep=99),
        ingest=lambda out, known: ingest(log, out, schema=SCHEMA, known=known),
        encoder_config=lambda dataset: PRESETS["stream"](num_items=len(dataset.vocabulary)),
    )
    return time.perf_counter() - begun


def _asked(
    work: Path, registry: Registry, clicks: pa.Table, moment: int, versions: tuple[str, str, str]
) -> list[dict[str, object]]:
    """Recall of three snapshots (of midnight, of the rebuild before, of now) and of popularity now."""
    log, folder = work / "asked.parquet", work / "asked"
    pq.write_table(clicks.filter(pc.less(clicks["timestamp_ms"], (moment + _HOUR) * 1000)), log)
    dataset = ingest(log, folder, schema=SCHEMA, replace=folder.exists())
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=moment))
    names = ("midnight", "the rebuild before", "now")
    snapshots = {name: open_snapshot(registry.folder(one)) for name, one in zip(names, versions, strict=True)}
    ranks = {name: live_ranks(dataset, split.test, one) for name, one in snapshots.items()}
    ranks["popularity now"] = _popularity(dataset, split, split.test)
    targets = dataset.events.items[split.test.targets].astype(np.int64)
    rows = []
    for name, found in ranks.items():
        row: dict[str, object] = {"ranker": name, "queries": len(found)}
        row |= {f"recall@{k}": brief(evaluate_ranks(found, KS)[f"recall@{k}"]) for k in KS}
        for k in KS:
            ahead = paired_difference((ranks["now"] <= k).astype(float), (found <= k).astype(float))
            row[f"now_ahead@{k}"] = "" if name == "now" else brief(ahead)
        known = snapshots.get(name)
        row["unknown_targets"] = (
            "" if known is None else round(float((live_rows(dataset, known)[targets] < 0).mean()), 4)
        )
        rows.append(row)
    return rows


def _popularity(dataset: Dataset, split: Split, asked: Queries) -> NDArray[np.int64]:
    return scored(dataset, asked, constant(recent_popularity(dataset, split).counts))


if __name__ == "__main__":
    main()
