"""Cold items on MovieLens-1M: what attributes find of items whose events were hidden from training, and what they cost.

    python -m benchmarks.features --ratings ml-1m/ratings.parquet --movies ml-1m/movies.dat --work /tmp/features

A tenth of the items has no event in the training log. Cold: each user's last event on such an item is to be found among
the hidden items alone, from the user's other events before it; the encoder has learned from later ones of this and
other users too, as in leave-one-out. Beside it a random order, and popularity in the whole log, which no rebuild could
know. Warm: the protocol `stable` on the log without them; differences are to ids alone with the same seed over the same
users. Intervals are 95% over users. `--every n` takes the users whose id is a multiple of n.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from benchmarks.ranks import columns_of, ranks_of
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ItemSchema, ingest
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.data.sequences import gather_histories
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.presets import PRESETS
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import train

__all__ = ["ColdQueries", "last_events"]

RESULTS = Path(__file__).parent / "results" / "features.csv"
KS = (10, 50)


def _schema(**values: object) -> ItemFeatureSchema:
    attributes = {"genres": {"kind": "set"}, "title": {"kind": "text", "buckets": 8192}}
    return ItemFeatureSchema.model_validate({"attributes": attributes} | values)


VARIANTS = {
    "id alone": None,
    "id, genres, title": _schema(),
    "id_dropout 0": _schema(id_dropout=0),
    "id_dropout 0.3": _schema(id_dropout=0.3),
    "min_count 20": _schema(min_count=20),
    "min_count 20, overflow 256": _schema(min_count=20, overflow=256),
}


def main() -> None:
    """Train each variant for each seed and write a row for each, and one for popularity and a random order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="the recovered Parquet file")
    parser.add_argument("--movies", type=Path, required=True, help="movies.dat")
    parser.add_argument("--work", type=Path, required=True, help="folder for datasets and training runs")
    parser.add_argument("--preset", default="ml1m", choices=tuple(PRESETS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--every", type=int, default=1, help="takes one user in so many (default: 1)")
    parser.add_argument("--variants", nargs="+", type=int, default=list(range(len(VARIANTS))), help="by their places")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    log = pq.read_table(parsed.ratings)
    log = log.filter(np.asarray(log["user_id"]) % parsed.every == 0)
    items, counts = np.unique(log["item_id"].to_numpy(), return_counts=True)
    hidden = np.sort(np.random.default_rng(0).choice(items, len(items) // 10, replace=False))
    is_hidden = np.isin(log["item_id"].to_numpy(), hidden)
    pq.write_table(log.filter(~is_hidden), parsed.work / "warm.parquet")
    movies = ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1")
    schema = EventSchema(order="seq_pos")
    warm_log, folder = parsed.work / "warm.parquet", parsed.work / "warm"
    dataset = ingest(warm_log, folder, schema=schema, items=parsed.movies, item_schema=movies, replace=True)
    split = split_dataset(dataset, SplitInfo(protocol="stable"))
    cold = ColdQueries(dataset, *last_events(log.filter(is_hidden), "seq_pos"), hidden)
    popular = cold.popularity_ranks(counts[np.searchsorted(items, hidden)])
    common: dict[str, object] = {"users": f"one in {parsed.every}", "preset": parsed.preset, "epochs": parsed.epochs}
    common |= {"batch": parsed.batch_size, "unmet_items": "no negatives"}
    same = np.ones(len(split.test), np.int64)
    none = dict.fromkeys(columns_of(same, same, KS), "")
    found: dict[str, object] = {"cold_queries": len(popular), "warm_queries": len(split.test)}
    chance = {f"cold_recall@{k}": f"{min(1, k / len(hidden)):.4f}" for k in KS}
    for name, row in (("random order", chance), ("popularity in the whole log", _cold_columns(popular))):
        _write(parsed.out, common | {"items": name, "seed": ""} | found | row | none)
    for seed in parsed.seeds:
        base = None
        for name in (list(VARIANTS)[place] for place in parsed.variants):
            config = TrainConfig(
                epochs=parsed.epochs,
                batch_size=parsed.batch_size,
                learning_rate=0.002,
                schedule="cosine",
                seed=seed,
                item_features=VARIANTS[name],
            )
            shape = PRESETS[parsed.preset](num_items=len(dataset.vocabulary))
            run = parsed.work / f"{list(VARIANTS).index(name)}-{seed}"
            kept = train(dataset, split, shape, config, run, resume=True)
            ranks = ranks_of(dataset, split.test, kept)
            base = ranks if base is None else base
            row = _cold_columns(cold.ranks(kept)) | columns_of(ranks, base, KS)
            _write(parsed.out, common | {"items": name, "seed": seed} | found | row)


def last_events(log: pa.Table, order: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """User, item and time of each user's last event by a column."""
    log = log.sort_by([("user_id", "ascending"), (order, "ascending")])
    users, items, times = (log[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    last = np.append(np.flatnonzero(users[1:] != users[:-1]), len(users) - 1)
    return users[last], items[last], times[last]


def _write(out: Path, row: dict[str, object]) -> None:
    print(row, flush=True)
    append_rows(out, [row | environment(torch.device("cpu"))])


def _cold_columns(ranks: NDArray[np.int64]) -> dict[str, object]:
    found = {k: evaluate_ranks(ranks, KS)[f"recall@{k}"] for k in KS}
    return {f"cold_recall@{k}": f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]" for k, one in found.items()}


class ColdQueries:
    """Users' last events on hidden items, those with an event before it.

    Args:
        dataset: the log without hidden items.
        users, items, times: whose event, on what, when: ids and seconds, `[Q]`.
        candidates: ids among which they are to be found, ascending, `[H]`.
    """

    def __init__(
        self,
        dataset: Dataset,
        users: NDArray[np.int64],
        items: NDArray[np.int64],
        times: NDArray[np.int64],
        candidates: NDArray[np.int64],
    ) -> None:
        known = dataset.users_named(users.tolist())
        users, items, times, known = (one[known >= 0] for one in (users, items, times, known))
        starts, ends = dataset.offsets[known], dataset.offsets[known + 1]
        stamps = dataset.events.timestamps
        spans = zip(starts, ends, times, strict=True)
        ends = np.array([start + np.searchsorted(stamps[start:end], time) for start, end, time in spans])
        asked = ends > starts
        self._dataset, self._candidates = dataset, candidates
        self._starts, self._ends, self._times = starts[asked], ends[asked], times[asked].astype(np.int64)
        self._targets = np.searchsorted(candidates, items[asked])

    def ranks(self, encoder: UserEncoder) -> NDArray[np.int64]:
        """Rank of each item to find among the candidates; ties count against it."""
        candidates = item_vectors(encoder)[self._dataset.vocabulary.rows_of(self._candidates)]
        ranks = []
        for at in range(0, len(self._targets), 128):
            part = slice(at, at + 128)
            span = (self._starts[part], self._ends[part], self._times[part])
            batch = gather_histories(self._dataset.events, *span, encoder.config.max_length)
            scores = embed_users(encoder, batch) @ candidates.T
            target = scores[np.arange(len(scores)), self._targets[part]]
            ranks.append((scores >= target[:, None]).sum(1))
        return np.concatenate(ranks)

    def popularity_ranks(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rank of each item to find by events of the candidates, int64 `[H]`; ties count against it."""
        found: NDArray[np.int64] = (counts >= counts[self._targets, None]).sum(1)
        return found


if __name__ == "__main__":
    main()
