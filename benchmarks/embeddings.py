"""Embeddings to search: items of an HSTU trained for a while on a large synthetic world, its users as queries.

    python -m benchmarks.embeddings WORK --items 1000000 --users 40000 --out embeddings.npz
    python -m benchmarks.embeddings WORK --dataset DATASET --out embeddings.npz

Writes `items` float32 `[N, 64]` and `queries` float32 `[1000, 64]`, for `benchmarks.ann --embeddings`. Items that no
event names have the embedding of their attributes (category, words of the title). One pass over the users is far from
what training could reach; it is enough that items lie by what they are and users where they ask. What is done in WORK
is not done again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from retrieval.data.dataset import Dataset
from retrieval.data.synthetic import WorldConfig, generate_world
from retrieval.encoder.inference import item_vectors
from retrieval.jobs.publish import current_user_embeddings, load_trained

FEATURES = '[items.attributes.category]\nkind = "category"\n[items.attributes.title]\nkind = "text"\nbuckets = 4096\n'


def main() -> None:
    """Generate, ingest, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--dataset", type=Path, help="of `retrieval ingest`, in place of a world")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    features, dataset = parsed.work / "features.toml", parsed.dataset or parsed.work / "data"
    options: list[str] = []
    if parsed.dataset is None:
        features.write_text(FEATURES, encoding="utf-8")
        options = ["--features", str(features)]
        world = parsed.work / "world"
        if not world.exists():
            config = WorldConfig(
                seed=0, users=parsed.users, items=parsed.items, categories=250, days=90, events_per_user=60
            )
            generate_world(config, world)
        if not dataset.exists():
            columns = ["--items", f"{world}/items.parquet", "--positive", "view,like,purchase"]
            _retrieval("ingest", f"{world}/events", *columns, *options, "--out", str(dataset))
    run = parsed.work / "run"
    if not (run / "encoder.json").exists():
        shape = ["--preset", "books", "--epochs", str(parsed.epochs), "--num-negatives", "1024"]
        _retrieval("train", str(dataset), *options, *shape, "--out", str(run))
    opened = Dataset(dataset)
    encoder, _ = load_trained(opened, run)
    items, queries = item_vectors(encoder), current_user_embeddings(opened, encoder)
    np.savez(parsed.out, items=items, queries=queries)
    print(f"{parsed.out}: items {items.shape}, queries {queries.shape}")


def _retrieval(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "retrieval.cli.main", *arguments], check=True)


if __name__ == "__main__":
    main()
