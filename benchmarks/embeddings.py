"""Embeddings to search: items of an HSTU trained for a while on a large synthetic world, its users as queries.

    python -m benchmarks.embeddings WORK --items 1000000 --users 40000 --out FOLDER
    python -m benchmarks.embeddings WORK --users 20000 --variants 10 --out FOLDER
    python -m benchmarks.embeddings WORK --dataset DATASET --out FOLDER

Writes `items.npy` float32 `[N, D]` and `queries.npy` float32 `[1000, D]`, all of unit length, for `benchmarks.ann
--embeddings`. Items that no event names have the embedding of their attributes (category, words of the title). One pass
over the users is far from what training could reach; it is enough that items lie by what they are and users where they
ask. What is done in WORK is not done again.

A world has a million items at most. With `--variants V` items also have a content vector of 32 numbers (their
category's, that of the series of eight that they belong to, and noise), which training learns to project, and the
catalogue is V times as large: V − 1 variants of each item, like it but for a content vector of their own, through the
projection that was learned: e' = e + (v' − v)·W. Items are written in shards, never all in memory.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open

from retrieval.data.dataset import Dataset
from retrieval.data.synthetic import WorldConfig, generate_world
from retrieval.encoder.inference import item_vectors
from retrieval.jobs.publish import current_user_embeddings, load_trained
from retrieval.training.trainer import TRAINING_STATE

FEATURES = '[items.attributes.category]\nkind = "category"\n[items.attributes.title]\nkind = "text"\nbuckets = 4096\n'
CONTENT = '[items.attributes.content]\nkind = "vector"\n'
_CONTENT_WIDTH, _SERIES = 32, 8


def main() -> None:
    """Generate, ingest, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--variants", type=int, default=1, help="of each item of a world")
    parser.add_argument("--dataset", type=Path, help="of `retrieval ingest`, in place of a world")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    dataset, options = parsed.dataset, list[str]()
    if dataset is None:
        dataset, features = _world(parsed)
        options = ["--features", str(features)]
    run = parsed.work / "run"
    if not (run / "encoder.json").exists():
        shape = ["--preset", "books", "--epochs", str(parsed.epochs), "--num-negatives", "1024"]
        _retrieval("train", str(dataset), *options, *shape, "--resume", "--out", str(run))
    opened = Dataset(dataset)
    encoder, _ = load_trained(opened, run)
    parsed.out.mkdir(parents=True, exist_ok=True)
    np.save(parsed.out / "queries.npy", _unit(current_user_embeddings(opened, encoder)))
    items = item_vectors(encoder)
    shape_ = (len(items) * parsed.variants, items.shape[1])
    out = np.lib.format.open_memmap(parsed.out / "items.npy", "w+", np.float32, shape_)
    out[: len(items)] = _unit(items)
    if parsed.variants > 1:
        _write_variants(opened, run, out)
    print(f"{parsed.out}: items {out.shape}")


def _world(parsed: argparse.Namespace) -> tuple[Path, Path]:
    """The dataset and the schema of its features."""
    world, dataset, features = parsed.work / "world", parsed.work / "data", parsed.work / "features.toml"
    config = WorldConfig(seed=0, users=parsed.users, items=parsed.items, categories=250, days=90, events_per_user=60)
    if not world.exists():
        generate_world(config, world)
    file = world / "items.parquet"
    features.write_text(FEATURES + (CONTENT if parsed.variants > 1 else ""), encoding="utf-8")
    if parsed.variants > 1:
        file = parsed.work / "items.parquet"
        if not dataset.exists():
            table = pq.read_table(world / "items.parquet")
            content = _contents(*_numbers_and_categories(table["item_id"], table["category"]), variant=0)
            column = pa.FixedSizeListArray.from_arrays(pa.array(content.ravel()), _CONTENT_WIDTH)
            pq.write_table(table.append_column("content", column), file)
    if not dataset.exists():
        columns = ["--items", str(file), "--positive", "view,like,purchase", "--features", str(features)]
        _retrieval("ingest", f"{world}/events", *columns, "--out", str(dataset))
    return dataset, features


def _numbers_and_categories(ids: pa.ChunkedArray, categories: pa.ChunkedArray) -> tuple[NDArray, NDArray]:
    """Of each item: its number in the world, and the place of its category among all by name."""
    numbers = pc.cast(pc.utf8_slice_codeunits(ids, 1), pa.int64()).to_numpy()
    return numbers, np.unique(categories.to_numpy(zero_copy_only=False), return_inverse=True)[1]


def _contents(numbers: NDArray[np.int64], categories: NDArray[np.int64], *, variant: int) -> NDArray[np.float32]:
    """Content vectors `[n, 32]` of the items with these numbers, of unit length."""
    centres, rng = np.random.default_rng(1), np.random.default_rng((0, variant))
    made = centres.normal(size=(int(categories.max()) + 1, _CONTENT_WIDTH)).astype(np.float32)[categories]
    series = rng.standard_normal((int(numbers.max()) // _SERIES + 1, _CONTENT_WIDTH), np.float32)
    made += 0.7 * series[numbers // _SERIES]
    made += 0.5 * rng.standard_normal((int(numbers.max()) + 1, _CONTENT_WIDTH), np.float32)[numbers]
    return _unit(made)


def _write_variants(dataset: Dataset, run: Path, out: NDArray[np.float32]) -> None:
    """All rows of `out` after the items themselves."""
    with safe_open(run / TRAINING_STATE, "np") as state:
        projection = state.get_tensor("model.1.projection")
    with safe_open(run / "encoder.safetensors", "np") as weights:
        learned = weights.get_tensor("item_embedding.weight")
    vocabulary = dataset.vocabulary
    count = len(learned)
    of = _numbers_and_categories(
        pa.chunked_array([vocabulary.ids]), pa.chunked_array([vocabulary.attributes["category"]])
    )
    without = learned - _contents(*of, variant=0) @ projection
    for variant in range(1, len(out) // count):
        out[variant * count : (variant + 1) * count] = _unit(without + _contents(*of, variant=variant) @ projection)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _retrieval(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "retrieval.cli.main", *arguments], check=True)


if __name__ == "__main__":
    main()
