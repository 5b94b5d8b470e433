"""What the parts of an event bring: its action, its time, which events are predicted, and how it is laid out in tokens.

    python -m benchmarks.token_parts --ratings ml-1m/ratings.parquet --work /tmp/parts [--every 2] [--seeds 0 1 2]

MovieLens-1M recovered, in the order of `seq_pos`; ratings are actions. Every variant is asked the same: the last event
of each user that was rated 4 or 5, from what came before it, and trains on the same events, all before the last but one
such event (protocol `stable`, without choosing a checkpoint). What differs is which of them are predicted and what is
read. Differences are to the first variant with the same seed over the same users; intervals are 95% over users.

`--exact` takes only users all of whose times are the real ones, for claims on time. With `--query-actions` the encoder
that can be asked for an action is asked for any, and for the rating that the item to find was given: an oracle that
shows what the query token carries.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.harness import append_rows, environment
from benchmarks.ranks import columns_of, ranks_of
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.splits import Split, SplitInfo, split_dataset
from retrieval.encoder.presets import PRESETS
from retrieval.training.config import TrainConfig
from retrieval.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "token_parts.csv"
KS = (10, 50, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Which events are predicted, whether actions are read, and changes to the encoder's shape."""

    positive: tuple[str, ...] = (">=4",)
    actions: bool = True
    shape: dict[str, object] | None = None


_DEEPER: dict[str, object] = {"num_layers": 4, "num_heads": 2, "qk_dim": 25, "v_dim": 25}
VARIANTS = {
    "all predicted, ratings not read": Variant(positive=(), actions=False),
    "all predicted, ratings read": Variant(positive=()),
    "4 and 5 predicted, ratings not read": Variant(actions=False),
    "4 and 5 predicted, ratings read": Variant(),
    "and asked for a rating": Variant(shape={"query_actions": True}),
    "and no time bias": Variant(shape={"time_bias": False}),
    "and items and actions interleaved": Variant(shape={"layout": "interleaved"}),
    "4 layers of 2 heads": Variant(shape=_DEEPER),
    "4 layers of 2 heads, items and actions interleaved": Variant(shape=_DEEPER | {"layout": "interleaved"}),
}


def main() -> None:
    """Train and rank each variant for each seed, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=Path, required=True, help="the recovered Parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder for datasets and training runs")
    parser.add_argument("--preset", default="demo", choices=tuple(PRESETS))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.002)
    parser.add_argument("--schedule", default="cosine", choices=("constant", "cosine"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--every", type=int, default=2, help="takes one user in so many (default: 2)")
    parser.add_argument("--exact", action="store_true", help="only users whose times are all real")
    parser.add_argument("--variants", nargs="+", type=int, default=list(range(len(VARIANTS))), help="by their places")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    parsed.work.mkdir(parents=True, exist_ok=True)
    log = parsed.work / "log.parquet"
    pq.write_table(_log(parsed.ratings, parsed.every, exact=parsed.exact), log)
    rules: tuple[tuple[str, ...], ...] = ((), (">=4",))
    datasets = {
        positive: ingest(
            log,
            parsed.work / f"data-{len(positive)}",
            schema=EventSchema(action="rating", positive=positive, order="seq_pos"),
            replace=True,
        )
        for positive in rules
    }
    split = split_dataset(datasets[(">=4",)], SplitInfo(protocol="stable"))
    names = [list(VARIANTS)[place] for place in parsed.variants]
    for seed in parsed.seeds:
        base = None
        for name in names:
            config = TrainConfig(
                epochs=parsed.epochs,
                batch_size=parsed.batch_size,
                learning_rate=parsed.learning_rate,
                schedule=parsed.schedule,
                seed=seed,
            )
            for label, ranks in _ranked(datasets, split, name, config, parsed):
                base = ranks if base is None else base
                row: dict[str, object] = {
                    "users": f"one in {parsed.every}" + (", exact times" if parsed.exact else ""),
                    "preset": parsed.preset,
                    "epochs": parsed.epochs,
                    "batch": parsed.batch_size,
                    "rate": f"{parsed.learning_rate} {parsed.schedule}",
                    "variant": label,
                    "seed": seed,
                    "queries": len(ranks),
                    **columns_of(ranks, base, KS),
                }
                print(row, flush=True)
                append_rows(parsed.out, [row | environment(torch.device("cpu"))])


def _log(ratings: Path, every: int, *, exact: bool) -> pa.Table:
    log = pq.read_table(ratings)
    if exact:
        estimated = pc.unique(log.filter(pc.greater(log["timestamp_source"], 1))["user_id"])
        log = log.filter(pc.invert(pc.is_in(log["user_id"], estimated)))
    return log.filter(np.asarray(log["user_id"]) % every == 0)


def _ranked(
    datasets: dict[tuple[str, ...], Dataset], split: Split, name: str, config: TrainConfig, parsed: argparse.Namespace
) -> Iterator[tuple[str, np.ndarray]]:
    """Train a variant; its ranks, and where it can be asked for a rating, those too, each under its label."""
    variant = VARIANTS[name]
    dataset = datasets[variant.positive]
    shape = PRESETS[parsed.preset](
        num_items=len(dataset.vocabulary), num_actions=len(dataset.info.actions) if variant.actions else 0
    )
    shape = type(shape).parse(shape.model_dump() | (variant.shape or {}), name)
    run = parsed.work / f"{list(VARIANTS).index(name)}-{config.seed}"
    kept = train(dataset, split, shape, config, run, resume=True)
    yield name, ranks_of(dataset, split.test, kept)
    if shape.query_actions:
        codes = dataset.events.actions[split.test.targets].astype(np.int64)
        yield f"{name}: the target's", ranks_of(dataset, split.test, kept, codes)


if __name__ == "__main__":
    main()
