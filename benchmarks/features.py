"""Cold items on MovieLens-1M: what attributes find of items whose events were hidden from training, and what they cost.

    python -m benchmarks.features --ratings ml-1m/ratings.parquet --movies ml-1m/movies.dat --work /tmp/features

A tenth of the items has no event in the training log. Cold: each user's last event on such an item is to be found among
the hidden items alone, from the user's other events before it; the encoder has learned from later ones of this and
other users too, as in leave-one-out. Among them a random order finds K / items, and popularity in training tells
nothing. Warm: the protocol `stable` on the log without them. `--quick` takes an eighth of the users.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ItemSchema, ingest
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.data.sequences import gather_histories
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import PRESETS
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.offline import evaluate
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "features.csv"
ATTRIBUTES = ItemFeatureSchema.model_validate(
    {"attributes": {"genres": {"kind": "set"}, "title": {"kind": "text", "buckets": 8192}}}
)


def main() -> None:
    """Train with and without attributes and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="the recovered Parquet file")
    parser.add_argument("--movies", type=Path, required=True, help="movies.dat")
    parser.add_argument("--work", type=Path, required=True, help="new folder for datasets and training runs")
    parser.add_argument("--preset", default="ml1m", choices=tuple(PRESETS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the users")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True)
    log = pq.read_table(parsed.ratings)
    if parsed.quick:
        log = log.filter(pc.equal(pc.bit_wise_and(log["user_id"], 7), 0))
    items = pc.unique(log["item_id"]).to_numpy()
    hidden = np.sort(np.random.default_rng(0).choice(items, len(items) // 10, replace=False))
    is_hidden = np.isin(log["item_id"].to_numpy(), hidden)
    pq.write_table(log.filter(~is_hidden), parsed.work / "warm.parquet")
    movies = ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1")
    schema = EventSchema(order="seq_pos")
    warm_log, folder = parsed.work / "warm.parquet", parsed.work / "warm"
    dataset = ingest(warm_log, folder, schema=schema, items=parsed.movies, item_schema=movies)
    asked = log.filter(is_hidden).sort_by([("user_id", "ascending"), ("seq_pos", "ascending")])
    users, item, times = (asked[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    last = np.flatnonzero(np.diff(users, append=-1))
    for seed in parsed.seeds:
        for name, features in (("id alone", None), ("id, genres, title", ATTRIBUTES)):
            config = TrainConfig(epochs=parsed.epochs, seed=seed, item_features=features)
            split = split_dataset(dataset, SplitInfo(protocol="stable"))
            shape = PRESETS[parsed.preset](num_items=len(dataset.vocabulary))
            kept = train(dataset, split, shape, config, parsed.work / f"{name.replace(', ', '-')}-{seed}")
            vectors, embed = item_vectors(kept), partial(embed_users, kept)
            warm = evaluate(dataset, split, embed, vectors, shape.max_length).row(shape.title).metrics
            ranks = _cold_ranks(dataset, kept, users[last], item[last], times[last], hidden)
            row = {
                "data": "an eighth of the users" if parsed.quick else "all users",
                "preset": parsed.preset,
                "epochs": parsed.epochs,
                "items": name,
                "seed": seed,
                "cold_queries": len(ranks),
                "cold_recall@10": f"{(ranks <= 10).mean():.4f}",
                "cold_recall@50": f"{(ranks <= 50).mean():.4f}",
                "random_recall@10": f"{10 / len(hidden):.4f}",
                "random_recall@50": f"{50 / len(hidden):.4f}",
                "warm_queries": len(split.test),
                "warm_recall@10": f"{warm['recall@10'].mean:.4f}",
                "warm_recall@50": f"{warm['recall@50'].mean:.4f}",
            }
            print(row, flush=True)
            append_rows(parsed.out, [row | environment(torch.device("cpu"))])


def _cold_ranks(
    dataset: Dataset,
    encoder: UserEncoder,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.int64],
    hidden: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Rank of each item to find among the hidden ones, for users with an event before it; ties count against it."""
    known = dataset.users_named(users.tolist())
    users, items, times, known = (one[known >= 0] for one in (users, items, times, known))
    starts, ends = dataset.offsets[known], dataset.offsets[known + 1]
    stamps = dataset.events.timestamps
    spans = zip(starts, ends, times, strict=True)
    ends = np.array([start + np.searchsorted(stamps[start:end], time) for start, end, time in spans])
    starts, ends, items, times = (one[ends > starts] for one in (starts, ends, items, times))
    candidates = item_vectors(encoder)[dataset.vocabulary.rows_of(hidden)]
    ranks = []
    for at in range(0, len(items), 128):
        part = slice(at, at + 128)
        times_B = times[part].astype(np.int64)
        batch = gather_histories(dataset.events, starts[part], ends[part], times_B, encoder.config.max_length)
        scores = embed_users(encoder, batch) @ candidates.T
        target = scores[np.arange(len(scores)), np.searchsorted(hidden, items[part])]
        ranks.append((scores >= target[:, None]).sum(1))
    return np.concatenate(ranks)


if __name__ == "__main__":
    main()
