"""The synthetic world's items that only metadata can explain: are they found?

    python -m benchmarks.cold_world --work /tmp/cold [--seeds 0 1 2]

The world is the demo's, with a twentieth of its items born on the last two days. All events on these are hidden from
training; each user's last event on one of them is to be found among the whole catalogue from the events before it. The
encoder knows items by their ids alone, or also by category, title words and the time at which they were published.
Beside it a random order, and the world's own probabilities: how often the item is among the K likeliest of all, for
users whose very last positive event it is. Differences are 95% intervals over users.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.features import ColdQueries, last_events
from benchmarks.harness import append_rows, environment
from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.data.synthetic import POSITIVE_ACTIONS, WorldConfig, generate_world, small
from retrieval.data.synthetic_catalogue import DAY, START
from retrieval.encoder.presets import hstu_demo
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "cold_world.csv"
KS = (10, 50)
ATTRIBUTES = ItemFeatureSchema.model_validate(
    {
        "attributes": {
            "category": {"kind": "category"},
            "title": {"kind": "text", "buckets": 8192},
            "published": {"kind": "number", "buckets": 32},
        }
    }
)


def main() -> None:
    """Train with and without attributes for each seed, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--users", type=int, default=3_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    changes = {"cold": 0.05, "cold_days": 2, "users": parsed.users}
    config = WorldConfig.model_validate(small().model_dump() | changes)
    world = generate_world(config, parsed.work / "world")
    items = pq.read_table(world.items_file)
    born = items["published"].to_numpy() >= START + (config.days - config.cold_days) * DAY
    hidden, everything = items["item_id"].to_numpy()[born], np.sort(items["item_id"].to_numpy())
    log = pq.read_table(world.events_folder)
    is_hidden = np.isin(log["item_id"].to_numpy(), hidden)
    warm = parsed.work / "warm.parquet"
    pq.write_table(log.filter(~is_hidden), warm)
    schema = EventSchema(positive=POSITIVE_ACTIONS)
    dataset = ingest(warm, parsed.work / "dataset", schema=schema, items=world.items_file)
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    positive = np.isin(log["action"].to_numpy(zero_copy_only=False), POSITIVE_ACTIONS)
    cold = ColdQueries(dataset, *last_events(log.filter(is_hidden & positive), "timestamp"), everything)
    oracle = pq.read_table(world.folder / "oracle.parquet")
    asked = np.isin(oracle["item_id"].to_numpy(), hidden)
    ranks = oracle["oracle_rank"].to_numpy()[asked]
    _write(parsed.out, "the world's probabilities", "", ranks)
    _write(parsed.out, "random order", "", np.random.default_rng(0).integers(1, len(everything) + 1, 100_000))
    for seed in parsed.seeds:
        for name, features in (("id alone", None), ("id and metadata", ATTRIBUTES)):
            training = TrainConfig(
                epochs=parsed.epochs, seed=seed, learning_rate=0.003, batch_size=32, item_features=features
            )
            shape = hstu_demo(num_items=len(dataset.vocabulary), num_actions=len(dataset.info.actions))
            kept = train(dataset, split, shape, training, parsed.work / f"{name.replace(' ', '-')}-{seed}")
            _write(parsed.out, name, seed, cold.ranks(kept))


def _write(out: Path, name: str, seed: object, ranks: np.ndarray) -> None:
    found = evaluate_ranks(ranks, KS)
    row: dict[str, object] = {"items": name, "seed": seed, "queries": len(ranks)}
    row |= {
        f"recall@{k}": f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]" for k in KS for one in (found[f"recall@{k}"],)
    }
    print(row, flush=True)
    append_rows(out, [row | environment(torch.device("cpu"))])


if __name__ == "__main__":
    main()
