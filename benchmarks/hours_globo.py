"""What a shorter interval gains on a real stream: rebuilds every hour against the snapshot of midnight.

    python -m benchmarks.hours_globo --clicks globo/ --work /tmp/hours [--day 3] [--hours 12 13 14 15] [--nights DIR]

A snapshot of all clicks until midnight before a day, from scratch, or the one that `nights_globo` made of them; then
at each of the hours, UTC, a rebuild from the live weights on all clicks until then. Asked for are the clicks of the
hour after it, as `globo_asked` says. Hours that were rebuilt are not rebuilt again, and those that have rows not
evaluated again.
"""

import argparse
import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.globo_asked import (
    READ_BESIDE,
    every_click,
    first_clicks,
    first_time,
    popularities,
    read_clicks,
    recalls,
    scored,
    training,
)
from benchmarks.harness import append_rows, environment
from benchmarks.nights_globo import stream
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.evaluation.gates import GateConfig
from retrieval.index.spec import IndexSpec
from retrieval.jobs.rebuild import RebuildConfig, rebuild
from retrieval.jobs.warm_start import live_ranks, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot

RESULTS = Path(__file__).parent / "results" / "hours_globo.csv"
_HOUR = 3600


def main() -> None:
    """Rebuild at midnight and at the hours; evaluate the hours that have no rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=Path, required=True, help="folder of one Parquet file a day")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, registry and training runs")
    parser.add_argument("--day", type=int, default=3, help="place of the day among the files (default: 3)")
    parser.add_argument("--hours", type=int, nargs="+", default=[12, 13, 14, 15], help="of rebuilds, UTC")
    parser.add_argument("--nights", type=Path, help="--work of nights_globo; the snapshot of midnight is from there")
    parser.add_argument("--queries", type=int, default=6000, help="asked of each kind an hour (default: 6000)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    days = sorted(parsed.clicks.glob("*.parquet"))[: parsed.day + 1]
    clicks = pa.concat_tables(
        [pq.read_table(day, columns=["user_id", "item_id", "timestamp_ms", *READ_BESIDE]) for day in days]
    )
    midnight = first_time(days[-1]) // (24 * _HOUR) * 24 * _HOUR
    registry = Registry(parsed.work / "registry")
    done: set[tuple[str, str]] = set()
    if parsed.out.exists():
        with parsed.out.open(encoding="utf-8", newline="") as file:
            done = {(row["day"], row["hour"]) for row in csv.DictReader(file)}
    notes = parsed.work / "versions.json"
    # Version and seconds of each moment.
    built: dict[str, tuple[str, float]] = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    if parsed.nights is not None and not built:
        built[str(midnight)] = _of_nights(parsed.nights, parsed.work, parsed.day - 1), 0.0
    moments = [midnight + _HOUR * hour for hour in (0, *parsed.hours)]
    for before, moment in zip([moments[0], *moments], moments, strict=False):
        if str(moment) not in built:
            seconds = _rebuilt(parsed.work, registry, clicks, moment)
            built[str(moment)] = registry.current(), seconds
            notes.write_text(json.dumps(built), encoding="utf-8")
        hour = (moment - midnight) // _HOUR
        if hour and (str(parsed.day), str(hour)) not in done:
            seconds = built[str(moment)][1]
            first, previous, now = (built[str(one)][0] for one in (midnight, before, moment))
            rows = _asked(parsed.work, registry, clicks, moment, (first, previous, now), parsed.queries)
            about = {"day": parsed.day, "hour": hour, "rebuild_seconds": round(seconds)}
            append_rows(parsed.out, [about | row | environment(torch.device("cpu")) for row in rows])
            for row in rows:
                print(about | row, flush=True)


def _of_nights(nights: Path, work: Path, night: int) -> str:
    """Begin with the registry of nights from live weights as it stood after one; that one's version."""
    found = json.loads((nights / "warm" / "nights.json").read_text(encoding="utf-8"))[str(night)]
    shutil.copytree(nights / "warm" / "registry", work / "registry", dirs_exist_ok=True)
    Registry(work / "registry").activate(found["version"])
    return str(found["version"])


def _rebuilt(work: Path, registry: Registry, clicks: pa.Table, moment: int) -> float:
    """Publish a snapshot of the clicks before a moment, seconds; what it took."""
    log = work / "logs" / str(moment)
    if not log.exists():
        log.mkdir(parents=True)
        pq.write_table(clicks.filter(pc.less(clicks["timestamp_ms"], moment * 1000)), log / "clicks.parquet")
    begun = time.perf_counter()
    rebuild(
        log,
        registry,
        work / "rebuilds",
        # The gates' answer is no part of the question.
        RebuildConfig(training=training(4), index=IndexSpec(), gates=GateConfig(worse_by=0.99), warm_epochs=1, keep=99),
        ingest=lambda out, known: read_clicks(log, out, known=known),
        encoder_config=lambda dataset: stream("stream", dataset),
    )
    return time.perf_counter() - begun


def _asked(
    work: Path, registry: Registry, clicks: pa.Table, moment: int, versions: tuple[str, str, str], count: int
) -> list[dict[str, object]]:
    """Recall of three snapshots (of midnight, of the rebuild before, of now) and of popularity now."""
    log, folder = work / "asked.parquet", work / "asked"
    pq.write_table(clicks.filter(pc.less(clicks["timestamp_ms"], (moment + _HOUR) * 1000)), log)
    dataset = read_clicks(log, folder, replace=folder.exists())
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=moment))
    names = ("midnight", "the rebuild before", "now")
    snapshots = {name: open_snapshot(registry.folder(one)) for name, one in zip(names, versions, strict=True)}
    rows = []
    for words, asked in (
        ("first clicks", first_clicks(split, count)),
        ("every click", every_click(dataset, moment, count)),
    ):
        ranks = {name: live_ranks(dataset, asked, one) for name, one in snapshots.items()}
        ranks |= {
            f"{name}, now": scored(dataset, asked, score)
            for name, score in popularities(dataset, split, moment).items()
        }
        targets = dataset.events.items[asked.targets].astype(np.int64)

        def unknown(name: str, targets: NDArray[np.int64] = targets) -> dict[str, object]:
            known = snapshots.get(name)
            share = "" if known is None else round(float((live_rows(dataset, known)[targets] < 0).mean()), 4)
            return {"unknown_targets": share}

        rows += [{"asked": words} | row for row in recalls(ranks, np.ones(len(asked), bool), ["now"], unknown)]
    return rows


if __name__ == "__main__":
    main()
