"""Quality on MovieLens-1M: HSTU, its rivals and baselines under one harness, beside the published figures.

    python -m benchmarks.quality_ml1m --ratings ml-1m/ratings.parquet --movies ml-1m/movies.dat --work /tmp/ml1m

Runs take minutes to hours each. Finished ones are rows of the results file and are not run again; one that was stopped
goes on where it was. `--quick` is a smoke run of one epoch that writes no rows.

With `--against MODEL` nothing is trained: finished runs in the work folder are compared with that model's, over the
same users, and over those whose times are the real ones and the others by themselves.
"""

import argparse
import csv
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from benchmarks.ranks import ranks_of
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ItemSchema, ingest
from retrieval.data.splits import Protocol, Split, SplitInfo, split_dataset
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import PRESETS
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.baselines import ItemKNN
from retrieval.evaluation.gates import paired_difference
from retrieval.evaluation.metrics import Estimate
from retrieval.evaluation.offline import KS, evaluate, mean_ndcg
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import StepReport, train

RESULTS = Path(__file__).parent / "results" / "quality_ml1m.csv"
PAIRS = RESULTS.with_name("quality_ml1m_pairs.csv")
METRICS = (*(f"{name}@{k}" for k in KS for name in ("recall", "ndcg")), "mrr")


@dataclass(frozen=True)
class Entry:
    """An encoder and how it is trained.

    Attributes:
        preset: the encoder.
        training: what differs from TrainConfig's defaults.
        changes: what differs from the preset.
    """

    preset: str
    training: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


# 101 epochs of the public tables are not needed with the full softmax, which gets there sooner.
CONSTANT = {"negatives": "full", "epochs": 50, "validate_every": 2}
# More and longer steps for the same tokens: see docs/quality.md.
BRISK = {
    "negatives": "full",
    "precision": "bfloat16",
    "batch_size": 64,
    "learning_rate": 0.004,
    "schedule": "cosine",
    "warmup_steps": 200,
    "clip_norm": 1.0,
    "validate_every": 4,
    "epochs": 40,
}
ABLATION = BRISK | {"epochs": 24}
ENTRIES: dict[str, Entry] = {
    "HSTU": Entry("ml1m", BRISK),
    "HSTU, constant rate": Entry("ml1m", CONSTANT),
    "HSTU, 512 shared negatives": Entry("ml1m", {"epochs": 50}),
    "HSTU, 128 negatives of each position (published)": Entry(
        "ml1m", {"epochs": 101, "num_negatives": 128, "shared_negatives": False}
    ),
    "HSTU-large, 24 epochs": Entry("large-ml1m", BRISK | {"epochs": 24}, {"dropout": 0.1}),
    "HSTU-large": Entry("large-ml1m", BRISK, {"dropout": 0.1}),
    "HSTU-best, 18 epochs": Entry("best-ml1m", BRISK | {"epochs": 18, "validate_every": 6}),
    "HSTU-best, last windows": Entry("best-ml1m", BRISK | {"validate_every": 8}),
    "HSTU-best": Entry("best-ml1m", BRISK | {"epochs": 28, "validate_every": 7, "windows": "all"}),
    "SASRec": Entry("sasrec-ml1m", BRISK),
    "SASRec, constant rate": Entry("sasrec-ml1m", CONSTANT),
    "GRU4Rec": Entry("gru4rec-ml1m", BRISK),
    "GRU4Rec, constant rate": Entry("gru4rec-ml1m", CONSTANT),
    "BERT4Rec": Entry("bert4rec-ml1m", BRISK),
    "ablation, both biases": Entry("ml1m", ABLATION),
    "ablation, no biases": Entry("ml1m", ABLATION, {"position_bias": False, "time_bias": False}),
    "ablation, position bias": Entry("ml1m", ABLATION, {"time_bias": False}),
    "ablation, time bias": Entry("ml1m", ABLATION, {"position_bias": False}),
    "ablation, softmax attention": Entry("ml1m", ABLATION, {"attention": "softmax"}),
    "ablation, softmax attention, no biases": Entry(
        "ml1m", ABLATION, {"attention": "softmax", "position_bias": False, "time_bias": False}
    ),
    "ablation, visible keys": Entry("ml1m", ABLATION, {"normalizer": "visible"}),
    "ablation, dropout 0.1": Entry("ml1m", ABLATION, {"dropout": 0.1}),
    "ablation, all windows": Entry("ml1m", ABLATION | {"windows": "all"}),
    "ablation, constant rate": Entry("ml1m", ABLATION | {"schedule": "constant", "learning_rate": 0.001}),
}
BASELINES = ("popularity", "item-kNN")


def main() -> None:
    """Run what is asked for and has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ratings", type=Path, required=True, help="ratings: the recovered Parquet file or ratings.dat"
    )
    parser.add_argument("--movies", type=Path, required=True, help="movies.dat")
    parser.add_argument("--work", type=Path, required=True, help="folder for datasets and training runs")
    parser.add_argument("--protocols", nargs="+", default=["paper", "stable"], choices=["paper", "stable"])
    parser.add_argument("--models", nargs="+", default=[*BASELINES, *ENTRIES], choices=[*BASELINES, *ENTRIES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--exact-times", action="store_true", help="only users all of whose times are the real ones")
    parser.add_argument("--against", choices=list(ENTRIES), help="compare finished runs with this model's")
    parser.add_argument("--quick", action="store_true", help="one epoch each, no rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    data = "exact times" if parsed.exact_times else "recovered"
    done = _done(parsed.out)
    for protocol in parsed.protocols:
        dataset = _dataset(parsed, protocol)
        split = split_dataset(dataset, SplitInfo(protocol=protocol))
        if parsed.against is not None:
            key = {"data": data, "protocol": protocol}
            append_rows(PAIRS, [key | row for row in _pairs(parsed, dataset, split, protocol, data)])
            continue
        for name in parsed.models:
            for seed in parsed.seeds if name in ENTRIES else [0]:
                key = {"data": data, "protocol": protocol, "model": name, "seed": str(seed)}
                if tuple(key.values()) in done and not parsed.quick:
                    continue
                folder = _folder(parsed.work, protocol, data, name, seed)
                figures = _run(dataset, split, name, seed, folder, quick=parsed.quick)
                print(f"{protocol}, {name}, seed {seed}: {figures}", flush=True)
                if not parsed.quick:
                    append_rows(parsed.out, [key | figures | environment(torch.device("cpu"))])


def _folder(work: Path, protocol: str, data: str, name: str, seed: int) -> Path:
    return work / "-".join([protocol, data, name, str(seed)]).replace(" ", "_").replace(",", "")


def _pairs(
    parsed: argparse.Namespace, dataset: Dataset, split: Split, protocol: Protocol, data: str
) -> Iterator[dict[str, object]]:
    """Differences of NDCG@10 and recall@10 between finished runs of one seed, over the same users."""
    groups = {"all": np.ones(len(split.test), bool)}
    if not parsed.exact_times and parsed.ratings.suffix == ".parquet":
        estimated = np.isin(split.test.users, dataset.users_named(_users_with_estimates(parsed.ratings).tolist()))
        groups |= {"times exact": ~estimated, "times estimated": estimated}
    for seed in parsed.seeds:
        names = [name for name in (parsed.against, *parsed.models) if name in ENTRIES]
        folders = {name: _folder(parsed.work, protocol, data, name, seed) for name in names}
        ranks = {
            name: ranks_of(dataset, split.test, load_checkpoint(folder)[0])
            for name, folder in folders.items()
            if (folder / "encoder.json").exists()
        }
        for name in [name for name in ranks if name != parsed.against]:
            for group, users in groups.items():
                row: dict[str, object] = {"seed": seed, "model": name, "against": parsed.against, "users": group}
                ours, theirs = ranks[name][users], ranks[parsed.against][users]
                for metric, of in (("recall@10", _hit), ("ndcg@10", _gain)):
                    row |= {metric: f"{of(ours).mean():.4f}"}
                    row |= {f"{metric} difference": _shown(paired_difference(of(ours), of(theirs)), sign="+")}
                print(row, flush=True)
                yield row


def _hit(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return (ranks <= 10).astype(float)


def _gain(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    return _hit(ranks) / np.log2(ranks + 1.0)


def _done(file: Path) -> set[tuple[str, ...]]:
    if not file.exists():
        return set()
    with file.open(encoding="utf-8", newline="") as opened:
        return {(row["data"], row["protocol"], row["model"], row["seed"]) for row in csv.DictReader(opened)}


def _dataset(parsed: argparse.Namespace, protocol: Protocol) -> Dataset:
    """The ratings in the protocol's order of equal times: `seq_pos` for `paper`, the file's for `stable`."""
    folder = parsed.work / f"dataset-{protocol}{'-exact' if parsed.exact_times else ''}"
    if folder.exists():
        return Dataset(folder)
    text = {} if parsed.ratings.suffix == ".parquet" else {"columns": ("user_id", "item_id", "rating", "timestamp")}
    ratings = _exact_users(parsed.ratings, parsed.work) if parsed.exact_times else parsed.ratings
    schema = EventSchema(order="seq_pos" if protocol == "paper" and not text else None, **text)
    movies = ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1")
    return ingest(ratings, folder, schema=schema, items=parsed.movies, item_schema=movies)


def _exact_users(ratings: Path, work: Path) -> Path:
    """A copy of the recovered ratings with only those users that have no estimated time."""
    table = pq.read_table(ratings)
    work.mkdir(parents=True, exist_ok=True)
    out = work / "ratings-exact.parquet"
    estimated = pa.array(_users_with_estimates(ratings))
    pq.write_table(table.filter(pc.invert(pc.is_in(table["user_id"], estimated))), out)
    return out


def _users_with_estimates(ratings: Path) -> NDArray[np.integer]:
    """Users of the recovered ratings who have an estimated time."""
    table = pq.read_table(ratings, columns=["user_id", "timestamp_source"])
    users: NDArray[np.integer] = table.filter(pc.greater(table["timestamp_source"], 1))["user_id"].to_numpy()
    return np.unique(users)


def _run(dataset: Dataset, split: Split, name: str, seed: int, folder: Path, *, quick: bool) -> dict[str, object]:
    """Train if there is something to train, and evaluate on the test targets, once."""
    begun, clock = time.perf_counter(), _Clock()
    if name in BASELINES:
        nothing = np.zeros((len(dataset.vocabulary), 1), np.float32)
        knn = {"item-kNN": ItemKNN(dataset, split)} if name == "item-kNN" else None
        report = evaluate(dataset, split, lambda batch: nothing[: len(batch)], nothing, 200, name="", baselines=knn)
        metrics, epochs, chosen = report.row(name).metrics, "", ""
    else:
        entry = ENTRIES[name]
        config = PRESETS[entry.preset](num_items=len(dataset.vocabulary)).model_copy(update=entry.changes)
        training = TrainConfig.parse(entry.training | {"seed": seed} | ({"epochs": 1} if quick else {}), name)
        validate = _validation(dataset, split) if len(split.validation) else None
        encoder = train(dataset, split, config, training, folder, validate=validate, resume=True, on_step=clock.count)
        embed, vectors = partial(embed_users, encoder), item_vectors(encoder)
        metrics = evaluate(dataset, split, embed, vectors, config.max_length, name=name).row(name).metrics
        epochs, chosen = str(training.epochs), "best of validation" if validate else "last"
    shown: dict[str, object] = {metric: _shown(metrics[metric]) for metric in METRICS}
    return shown | {
        "epochs": epochs,
        "weights": chosen,
        "seconds": round(time.perf_counter() - begun),
        "tokens_per_second": clock.speed,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _validation(dataset: Dataset, split: Split) -> Callable[[UserEncoder], float]:
    def ndcg(encoder: UserEncoder) -> float:
        vectors: NDArray[np.float32] = item_vectors(encoder)
        embed = partial(embed_users, encoder)
        return mean_ndcg(dataset, split.validation, embed, vectors, encoder.config.max_length)

    return ndcg


class _Clock:
    """Tokens per second of training in this process; also says where a run is, now and then."""

    def __init__(self) -> None:
        self._begun = self._said = time.perf_counter()
        self._tokens = 0

    def count(self, report: StepReport) -> None:
        self._tokens += report.tokens
        now = time.perf_counter()
        if now - self._said > 60:
            self._said = now
            print(
                f"  step {report.step} of {report.steps}, loss {report.loss:.3f}, {self.speed} tokens/s",
                file=sys.stderr,
            )

    @property
    def speed(self) -> int:
        return round(self._tokens / (time.perf_counter() - self._begun))


def _shown(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.4f} [{estimate.low:{sign}.4f}, {estimate.high:{sign}.4f}]"


if __name__ == "__main__":
    main()
