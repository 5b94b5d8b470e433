"""What context and auxiliary series bring: the same encoder with and without them, on the same users, and its speed.

    python -m benchmarks.sequence_features --datasets DIR --data ml1m --work /tmp/sequence [--every 2] [--seeds 0 1 2]

ml1m: MovieLens-1M recovered, in the order of `seq_pos`; ratings are actions, those from 4 on positive; context is sex,
age and occupation; genres and title words are attributes of items, with which unrated ones are candidates too.
Protocol `stable`, without choosing a checkpoint.

new-users: a tenth of the users of ml1m have no event in training; asked for is the first event of each, if positive,
from context alone. Differences are to popularity in training.

globo: the first days of Globo.com's clicks; auxiliary series are region, device and referrer, the hour of the day (UTC)
by itself and with them, and as a control one that never changes: what a further token brings by itself. The last of
these days is asked for (`global-time`): the first click of each user on it, from what came before. Items that first
appear on that day cannot be found.

`--every n` takes the users whose id is a multiple of n. Differences are to the first variant with the same seed, over
the same users; intervals are 95% over users. `tokens/s` is of training, batches included, the variants' steps taken in
turns in one process; `speed` is its ratio to the first variant's.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from retrieval.data.dataset import Dataset
from retrieval.data.features import FeatureSchema, SideColumn
from retrieval.data.ingest import EventSchema, ItemSchema, UserSchema, ingest
from retrieval.data.item_features import ItemFeatureSchema, item_features
from retrieval.data.splits import Queries, Split, SplitInfo, split_dataset, training_counts
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import PRESETS
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.gates import paired_difference
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.training.batches import Batches
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner
from retrieval.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "sequence_features.csv"
KS = (10, 50, 200)
_CONTEXT = ("sex", "age", "occupation")
_SERIES = dict.fromkeys(("region", "device_group", "referrer_type"), SideColumn(min_count=5))
_HOUR = {"hour": SideColumn()}
_ITEMS = ItemFeatureSchema.model_validate(
    {"attributes": {"genres": {"kind": "set"}, "title": {"kind": "text", "buckets": 8192}}}
)
VARIANTS: dict[str, dict[str, FeatureSchema]] = {
    "ml1m": {
        "items, ratings": FeatureSchema(),
        "and context": FeatureSchema(context=dict.fromkeys(_CONTEXT, SideColumn())),
        "and context, genres, title": FeatureSchema(context=dict.fromkeys(_CONTEXT, SideColumn()), items=_ITEMS),
    },
    "new-users": {"context alone": FeatureSchema(context=dict.fromkeys(_CONTEXT, SideColumn()))},
    "globo": {
        "items": FeatureSchema(),
        "and a constant": FeatureSchema(auxiliary={"constant": SideColumn()}),
        "and region, device, referrer": FeatureSchema(auxiliary=_SERIES),
        "and hour": FeatureSchema(auxiliary=_HOUR),
        "and region, device, referrer, hour": FeatureSchema(auxiliary=_SERIES | _HOUR),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A dataset, its split, the encoder's shape, and what items are made of beside their ids."""

    dataset: Dataset
    split: Split
    shape: EncoderConfig
    items: ItemFeatureSchema | None

    def config(self, parsed: argparse.Namespace, seed: int) -> TrainConfig:
        """Hyperparameters."""
        return TrainConfig(
            epochs=parsed.epochs,
            batch_size=parsed.batch_size,
            learning_rate=parsed.learning_rate,
            schedule=parsed.schedule,
            seed=seed,
            item_features=self.items,
        )


def main() -> None:
    """Train and rank each variant for each seed, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=Path, required=True, help="folder with ml-1m/ and globo/")
    parser.add_argument("--data", choices=tuple(VARIANTS), required=True)
    parser.add_argument("--work", type=Path, required=True, help="new folder for datasets and training runs")
    parser.add_argument("--preset", default="demo", choices=tuple(PRESETS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--schedule", default="constant", choices=("constant", "cosine"), help="of the learning rate")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="none: speeds alone")
    parser.add_argument("--every", type=int, default=8, help="takes one user in so many (default: 8)")
    parser.add_argument("--days", type=int, default=4, help="of globo (default: 4)")
    parser.add_argument("--steps", type=int, default=30, help="of each variant that are timed (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True)
    variants = {name: _prepared(parsed, name, schema) for name, schema in VARIANTS[parsed.data].items()}
    speeds = _speeds(variants, parsed)
    first = next(iter(variants))
    print({name: f"{speed:,.0f} tokens/s, {speed / speeds[first]:.2f}" for name, speed in speeds.items()}, flush=True)
    for seed in parsed.seeds:
        base = _popularity_ranks(variants[first]) if parsed.data == "new-users" else None
        for name, variant in variants.items():
            config = variant.config(parsed, seed)
            run = parsed.work / f"{list(variants).index(name)}-{seed}"
            kept = train(variant.dataset, variant.split, variant.shape, config, run)
            ranks = _ranks(variant, kept)
            base = ranks if base is None else base
            found = evaluate_ranks(ranks, KS)
            row: dict[str, object] = {
                "data": parsed.data,
                "users": f"one in {parsed.every}",
                "preset": parsed.preset,
                "epochs": parsed.epochs,
                "schedule": parsed.schedule,
                "batch": parsed.batch_size,
                "rate": parsed.learning_rate,
                "variant": name,
                "seed": seed,
                "queries": len(ranks),
            }
            for k in KS:
                one = found[f"recall@{k}"]
                row[f"recall@{k}"] = f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"
                difference = paired_difference((ranks <= k).astype(float), (base <= k).astype(float))
                row[f"difference@{k}"] = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
            row |= {"tokens_per_second": round(speeds[name]), "speed": f"{speeds[name] / speeds[first]:.2f}"}
            print(row, flush=True)
            append_rows(parsed.out, [row | environment(torch.device("cpu"))])


def _prepared(parsed: argparse.Namespace, name: str, features: FeatureSchema) -> Variant:
    folder = parsed.work / f"data-{list(VARIANTS[parsed.data]).index(name)}"
    if parsed.data != "globo":
        log = pq.read_table(parsed.datasets / "ml-1m/ratings.parquet")
        users, columns = parsed.datasets / "ml-1m/users.dat", ("user_id", *_CONTEXT, "zip")
        schema = EventSchema(action="rating", positive=(">=4",), order="seq_pos")
        split = SplitInfo(protocol="stable")
    else:
        days = sorted((parsed.datasets / "globo").glob("*.parquet"))[: parsed.days]
        log = pa.concat_tables([pq.read_table(day) for day in days])
        log = log.append_column("constant", pa.array(np.zeros(len(log), np.int32)))
        log = log.append_column("hour", pa.array(log["timestamp_ms"].to_numpy() // 3_600_000 % 24))
        users, columns = None, None
        schema = EventSchema(time="timestamp_ms", time_unit="ms")
        midnight = int(pc.min(pq.read_table(days[-1], columns=["timestamp_ms"])["timestamp_ms"]).as_py()) // 1000
        split = SplitInfo(protocol="global-time", time=midnight)
    file = parsed.work / "log.parquet"
    pq.write_table(log.filter(np.asarray(log["user_id"]) % parsed.every == 0), file)
    dataset = ingest(
        file,
        folder,
        schema=schema,
        items=parsed.datasets / "ml-1m/movies.dat" if features.items is not None else None,
        item_schema=ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1"),
        users=users if features.context else None,
        user_schema=UserSchema(columns=columns),
        features=features,
    )
    actions = len(dataset.info.actions)
    shape = PRESETS[parsed.preset](num_items=len(dataset.vocabulary), num_actions=actions if actions > 1 else 0)
    shape = shape.model_copy(update={"kinds": tuple(kind.rows for kind in dataset.info.kinds)})
    found = split_dataset(dataset, split)
    if parsed.data == "new-users":
        found = _without_new_users(dataset, found)
    return Variant(dataset=dataset, split=found, shape=shape, items=features.items)


def _without_new_users(dataset: Dataset, split: Split) -> Split:
    """Every tenth user has no training events and is asked for the first one, if that is positive."""
    starts = dataset.offsets[:-1]
    new = np.arange(len(dataset)) % 10 == 0
    users = np.flatnonzero(new & dataset.positive[dataset.events.actions[starts]])
    asked = Queries(users=users, targets=starts[users])
    return replace(split, train_ends=np.where(new, starts, split.train_ends), test=asked)


def _ranks(variant: Variant, encoder: UserEncoder) -> NDArray[np.int64]:
    """Exact rank of each query's target, `[Q]`."""
    vectors = item_vectors(encoder)
    ranks = np.empty(len(variant.split.test), np.int64)
    for batch in query_batches(variant.dataset, variant.split.test, variant.shape.max_length):
        users = embed_users(encoder, batch.histories)
        ranks[batch.place] = rank_by_scores(batch, len(vectors), partial(_scores, users, vectors))
    return ranks


def _popularity_ranks(variant: Variant) -> NDArray[np.int64]:
    """Rank of each query's target by training events; equal counts count against it."""
    counts = training_counts(variant.dataset, variant.split)
    targets = counts[variant.dataset.events.items[variant.split.test.targets]]
    ranks: NDArray[np.int64] = (counts >= targets[:, None]).sum(1)
    return ranks


def _scores(users: NDArray[np.float32], vectors: NDArray[np.float32], part: slice) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = users[part] @ vectors.T
    return scores


def _speeds(variants: dict[str, Variant], parsed: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of each variant: all tokens of a step over the median of their times, by steps in turns."""
    runs = {name: _steps(variant, parsed) for name, variant in variants.items()}
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _, (name, run) in itertools.product(range(parsed.steps), runs.items()):
        begun = time.perf_counter()
        tokens = next(run)
        speeds[name].append(tokens / (time.perf_counter() - begun))
    # The first steps of each warm the machine up.
    return {name: float(np.median(found[3:])) for name, found in speeds.items()}


def _steps(variant: Variant, parsed: argparse.Namespace) -> Iterator[int]:
    """Tokens of each step of training, which is done when they are told."""
    config = variant.config(parsed, 0).model_copy(update={"epochs": 1000})
    torch.manual_seed(0)
    encoder = build_encoder(variant.shape)
    batches = Batches(
        variant.dataset, variant.split, config, objective=encoder.objective, max_length=variant.shape.max_length
    )
    counts = training_counts(variant.dataset, variant.split)
    features = None if variant.items is None else item_features(variant.dataset.vocabulary, variant.items, counts)
    learner = Learner(encoder, config, counts, batches.per_epoch, features)
    for step, batch in batches.from_step(0):
        learner.step(batch, step)
        yield len(batch.targets)


if __name__ == "__main__":
    main()
