"""Nights of a real stream: each night's snapshot is asked for the next day's clicks.

    python -m benchmarks.nights_globo --clicks globo/ --work /tmp/nights [--nights 9]

One Parquet file a day. Every night `rebuild` runs on all days so far from the live weights, and every few nights also
from scratch, each with a registry of its own. The next day's clicks are asked for as `globo_asked` says: of each user
the first one, and a sample of all. Items that a snapshot cannot know count as not found.

Beside the two: on the second and the fifth night another seed from scratch ("seed"); on the second the default encoder
and training of `rebuild`, as many epochs from scratch over the same events and without gates ("default"); the snapshot
of the night before; popularity at midnight (with the half-life that predicted best until then, of the last hour, of the
last six), item-kNN over all until midnight, and what one list for everybody could reach in hindsight.

`warm_ahead` is the warm snapshot's recall less this ranker's over the same queries, with its 95% interval over queries;
`scratch_ahead` the same of that from scratch.
Items are few where it counts: a day's ten most asked for are a third of its targets, so nights differ by more than the
intervals say. Rows of "first 3 hours" ask only for targets until three in the morning.

Nights that were rebuilt are not rebuilt again, and those that have rows not evaluated again; a rebuild that was stopped
goes on, and what it took is added up. `train_cpu` is processor time of the two trainings. With `--do` the chains of
rebuilds may run beside each other, and questions wait for them.
"""

import argparse
import contextlib
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.globo_asked import (
    early,
    every_click,
    first_clicks,
    first_time,
    hindsight,
    popularities,
    read_clicks,
    recalls,
    scored,
    training,
)
from benchmarks.harness import append_rows, environment
from retrieval.data.dataset import Dataset
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.presets import PRESETS
from retrieval.errors import GateRefusedError
from retrieval.evaluation.baselines import ItemKNN
from retrieval.evaluation.gates import GateConfig
from retrieval.index.spec import IndexSpec
from retrieval.jobs.rebuild import RebuildConfig, rebuild
from retrieval.jobs.warm_start import live_ranks, live_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "nights_globo.csv"
_ABOUT = ("seconds", "train_cpu", "published", "items", "new", "gone", "peak_memory_mb")
_KINDS = ("warm", "scratch", "seed", "default")
_PARTS = (*_KINDS, "ask")
_SEED_NIGHTS = (1, 4)


def main() -> None:
    """Run the nights that were not run yet, and ask those that have no rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=Path, required=True, help="folder of one Parquet file a day")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, registries and training runs")
    parser.add_argument("--nights", type=int, default=9, help="how many nights (default: 9)")
    parser.add_argument("--preset", default="stream", choices=sorted(PRESETS), help="encoder (default: stream)")
    parser.add_argument("--epochs", type=int, default=4, help="of a night from scratch (default: 4)")
    parser.add_argument("--warm-epochs", type=int, default=1, help="of a night from live weights (default: 1)")
    parser.add_argument("--scratch-every", type=int, default=3, help="nights between those from scratch (default: 3)")
    parser.add_argument("--first", type=int, default=6000, help="users asked for first clicks (default: 6000)")
    parser.add_argument("--every", type=int, default=20_000, help="clicks asked for of all (default: 20000)")
    parser.add_argument("--do", nargs="+", default=_PARTS, choices=_PARTS, help="rebuilds of which kind, and questions")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    days = sorted(parsed.clicks.glob("*.parquet"))
    chains = {name: _Chain(parsed, days, name) for name in _KINDS}
    for night in range(min(parsed.nights, len(days) - 1)):
        runs = (True, night % parsed.scratch_every == 1, night in _SEED_NIGHTS, night == 1)
        names = [name for name, is_run in zip(_KINDS, runs, strict=True) if is_run]
        for name in names:
            if name in parsed.do:
                chains[name].run(night)
        ready = all(str(night) in chains[name].notes() for name in names)
        if "ask" in parsed.do and ready and str(night) not in _done(parsed.out):
            rows = _evaluate(parsed, days[: night + 2], night, {name: chains[name] for name in names})
            append_rows(parsed.out, [row | environment(torch.device("cpu")) for row in rows])
            for row in rows:
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def _done(file: Path) -> set[str]:
    if not file.exists():
        return set()
    with file.open(encoding="utf-8", newline="") as opened:
        return {row["night"] for row in csv.DictReader(opened)}


class _Chain:
    """Nights of one kind, and what each came to, in a file."""

    def __init__(self, parsed: argparse.Namespace, days: list[Path], name: str) -> None:
        self._parsed, self._days, self.name = parsed, days, name
        self._folder = parsed.work / name
        self._notes = self._folder / "nights.json"
        self.registry = Registry(self._folder / "registry")

    def notes(self) -> dict[str, dict[str, Any]]:
        """Of each night that was run: the version that was live after it, and what a row tells of it."""
        found: dict[str, dict[str, Any]] = {}
        if self._notes.exists():
            found = json.loads(self._notes.read_text(encoding="utf-8"))
        return found

    def snapshot(self, night: int) -> Snapshot | None:
        """What was live after a night; None if that was not run."""
        note = self.notes().get(str(night))
        return None if note is None else open_snapshot(self.registry.folder(note["version"]))

    def run(self, night: int) -> None:
        """Run a night, unless that was done."""
        notes = self.notes()
        if str(night) in notes:
            return
        is_default, epochs = self.name == "default", self._parsed.epochs
        preset = "ml1m" if is_default else self._parsed.preset
        log = _log(self._folder / f"log-{night}", self._days[: night + 1])
        config = RebuildConfig(
            training=TrainConfig(epochs=epochs) if is_default else training(epochs, seed=int(self.name == "seed")),
            index=IndexSpec(),
            gates=GateConfig(worse_by=0.99) if is_default else GateConfig(),
            full=self.name != "warm",
            warm_epochs=self._parsed.warm_epochs,
            keep=99,
        )
        about: dict[str, object] = {"published": "yes"}
        with self._spent(night) as spent:
            try:
                report = rebuild(
                    log,
                    self.registry,
                    self._folder / "work",
                    config,
                    ingest=lambda out, known: read_clicks(log, out, known=known),
                    encoder_config=lambda dataset: stream(preset, dataset),
                    on_stage=spent.stage,
                ).report
                about |= {name: report["vocabulary"][name] for name in ("items", "new", "gone")}
                about["peak_memory_mb"] = max(report["memory_mb"].values())
            except GateRefusedError as error:
                about["published"] = f"no: {error}"
        about |= {"seconds": round(spent.seconds), "train_cpu": round(spent.of("train") + spent.of("finish"))}
        notes[str(night)] = about | {"version": self.registry.current()}
        self._notes.write_text(json.dumps(notes), encoding="utf-8")
        print(f"{self.name} {night}: {about}", flush=True)

    @contextlib.contextmanager
    def _spent(self, night: int) -> Iterator["_Spent"]:
        """Count what a night takes, together with what was counted before it was stopped."""
        file = self._folder / f"spent-{night}.json"
        spent = _Spent(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else _Spent()
        begun, spent.mark = time.perf_counter(), time.process_time()
        try:
            yield spent
        finally:
            spent.stage("")
            spent.seconds += time.perf_counter() - begun
            file.write_text(json.dumps({"seconds": spent.seconds, "cpu": spent.cpu}), encoding="utf-8")


@dataclass(slots=True)
class _Spent:
    """Seconds, and processor seconds by stage."""

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    mark: float = 0.0
    current: str = ""

    def stage(self, name: str) -> None:
        """A stage begins."""
        now = time.process_time()
        self.cpu[self.current] = self.of(self.current) + now - self.mark
        self.current, self.mark = name, now

    def of(self, name: str) -> float:
        """Processor seconds of a stage."""
        return self.cpu.get(name, 0.0)


def _log(folder: Path, days: list[Path]) -> Path:
    """A folder of those days."""
    folder.mkdir(parents=True, exist_ok=True)
    for day in days:
        if not (folder / day.name).exists():
            (folder / day.name).symlink_to(day.resolve())
    return folder


def _evaluate(
    parsed: argparse.Namespace, days: list[Path], night: int, chains: dict[str, _Chain]
) -> list[dict[str, object]]:
    folder = parsed.work / "tomorrow"
    dataset = read_clicks(_log(parsed.work / f"tomorrow-{night}", days), folder, replace=folder.exists())
    midnight = first_time(days[-1])
    split = split_dataset(dataset, SplitInfo(protocol="global-time", time=midnight))
    snapshots = {name: chain.snapshot(night) for name, chain in chains.items()}
    snapshots["the night before"] = chains["warm"].snapshot(night - 1)
    constants = popularities(dataset, split, midnight)
    knn = ItemKNN(dataset, split)
    rows = []
    for words, asked in (
        ("first clicks", first_clicks(split, parsed.first)),
        ("every click", every_click(dataset, midnight, parsed.every)),
    ):
        targets = dataset.events.items[asked.targets].astype(np.int64)
        there = {name: one for name, one in snapshots.items() if one is not None}
        ranks = {name: live_ranks(dataset, asked, one) for name, one in there.items()}
        others = constants | {"item-kNN": knn} | hindsight(dataset, asked, midnight)
        ranks |= {name: scored(dataset, asked, score) for name, score in others.items()}
        unknown = {name: round(float((live_rows(dataset, one)[targets] < 0).mean()), 4) for name, one in there.items()}

        def about(name: str, unknown: dict[str, float] = unknown) -> dict[str, object]:
            note = chains[name].notes()[str(night)] if name in chains else {}
            return {"unknown_targets": unknown.get(name, "")} | {column: note.get(column, "") for column in _ABOUT}

        for when, part in (("day", np.ones(len(asked), bool)), ("first 3 hours", early(dataset, asked, midnight))):
            what = {"night": night, "asked": words, "when": when}
            rows += [what | row for row in recalls(ranks, part, ["warm", "scratch"], about)]
    return rows


def stream(preset: str, dataset: Dataset) -> EncoderConfig:
    """A preset that reads all that the clicks tell."""
    kinds = tuple(kind.rows for kind in dataset.info.kinds)
    return PRESETS[preset](num_items=len(dataset.vocabulary)).model_copy(update={"kinds": kinds})


if __name__ == "__main__":
    main()
