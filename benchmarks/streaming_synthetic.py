"""A vocabulary that moves: pointwise against softmax attention on one pass over a synthetic stream.

    python -m benchmarks.streaming_synthetic [--records 60000] [--seeds 0 1 2] [--quick]

After arXiv 2402.17152, section 4.1.1, on a smaller scale: a record is a user with `--length` events in one to five of
100 categories. Each event takes a category of the record, then, by a Dirichlet process of concentration α ~ U(1, 500)
drawn per record, a new item of that category with probability α / (n + α), else one of the n items already taken
there: what was taken often is taken again. At the start 40% of the items exist; their number grows linearly to all of
them over the stream. Records come in order and each is seen once; the last tenth is not learned from, and asked for
the last event of each record. Items seen before are candidates, as events repeat. Biases are off: events have no times.

HR@10 of chance is 10 / items.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import append_rows, environment
from retrieval.data.sequences import gather_histories, gather_training
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import EncoderConfig, HSTUConfig, SASRecConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner
from retrieval.types import EventColumns

RESULTS = Path(__file__).parent / "results" / "streaming_synthetic.csv"
CATEGORIES, MOST_CATEGORIES, CONCENTRATION = 100, 5, (1.0, 500.0)
FIRST = 0.4
HELD_OUT = 0.1
BATCH = 128


def stream(records: int, length: int, items: int, seed: int) -> NDArray[np.int32]:
    """Items of every event, `[records, length]`, in the order in which records come.

    Item i is of category i mod 100; items are born in the order of their numbers.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((records, length), np.int32)
    for record in range(records):
        alive = int(items * (FIRST + (1 - FIRST) * record / max(1, records - 1)))
        categories = rng.choice(CATEGORIES, rng.integers(1, MOST_CATEGORIES + 1), replace=False)
        alpha = rng.uniform(*CONCENTRATION)
        drawn, uniform = rng.integers(0, len(categories), length), rng.random((2, length))
        taken: list[list[int]] = [[] for _ in categories]
        for place, (which, fresh, pick) in enumerate(zip(drawn.tolist(), *uniform.tolist(), strict=True)):
            before = taken[which]
            if fresh * (len(before) + alpha) < alpha:
                category = int(categories[which])
                item = category + CATEGORIES * int(pick * ((alive - category + CATEGORIES - 1) // CATEGORIES))
            else:
                item = before[int(pick * len(before))]
            before.append(item)
            out[record, place] = item
    return out


def _columns(rows: NDArray[np.int32]) -> tuple[EventColumns, NDArray[np.int64]]:
    """Records as events laid end to end, and where each begins, `[B + 1]`."""
    flat = rows.ravel()
    events = EventColumns(items=flat, actions=np.zeros(len(flat), np.uint8), timestamps=np.arange(len(flat)))
    return events, np.arange(len(rows) + 1) * rows.shape[1]


def measure(config: EncoderConfig, rows: NDArray[np.int32], training: TrainConfig) -> dict[str, object]:
    """One pass over the stream, then hit rates on its last tenth."""
    learned = int(len(rows) * (1 - HELD_OUT)) // BATCH * BATCH
    torch.manual_seed(training.seed)
    encoder = build_encoder(config)
    learner = Learner(encoder, training, np.ones(config.num_items, np.int64), learned // BATCH)
    begun = time.perf_counter()
    losses = []
    for step in range(learned // BATCH):
        events, offsets = _columns(rows[step * BATCH : (step + 1) * BATCH])
        batch = gather_training(events, offsets[:-1], offsets[1:], np.ones(1, np.float32), config.max_length)
        losses.append(learner.step(batch, step).loss)
        if step % 100 == 99:
            print(f"  step {step + 1} of {learned // BATCH}, loss {np.mean(losses[-100:]):.3f}", flush=True)
    seconds = time.perf_counter() - begun
    encoder.eval()
    vectors, ranks = item_vectors(encoder), []
    for start in range(learned, len(rows), BATCH):
        events, offsets = _columns(rows[start : start + BATCH])
        ends = offsets[1:] - 1
        histories = gather_histories(events, offsets[:-1], ends, events.timestamps[ends], config.max_length)
        scores = embed_users(encoder, histories) @ vectors.T
        wanted = np.take_along_axis(scores, events.items[ends, None].astype(np.int64), axis=1)
        ranks.append((scores >= wanted).sum(axis=1))
    result = evaluate_ranks(np.concatenate(ranks), (10, 50))
    shown = {name: result[name] for name in ("recall@10", "recall@50", "ndcg@10")}
    return {
        **{
            name.replace("recall", "hr"): f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"
            for name, one in shown.items()
        },
        "last_loss": float(np.mean(losses[-50:])),
        "queries": sum(map(len, ranks)),
        "seconds": round(seconds),
    }


def main() -> None:
    """Learn the stream once with each encoder and write its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="2,000 records of 32 events over 2,000 items, no rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.records, parsed.length, parsed.items = 2_000, 32, 2_000
    shape = {"num_items": parsed.items, "max_length": parsed.length - 1}
    plain = HSTUConfig(**shape, position_bias=False, time_bias=False)
    encoders: dict[str, EncoderConfig] = {
        "Transformer (SASRec)": SASRecConfig(**shape),
        "HSTU, no bias, softmax": plain.model_copy(update={"attention": "softmax"}),
        "HSTU, no bias, pointwise": plain,
    }
    for seed in parsed.seeds:
        rows = stream(parsed.records, parsed.length, parsed.items, seed)
        for name, config in encoders.items():
            print(f"{name}, seed {seed}", flush=True)
            figures = measure(config, rows, TrainConfig(seed=seed))
            print(f"{name}, seed {seed}: {figures}", flush=True)
            if not parsed.quick:
                size = {"records": parsed.records, "length": parsed.length, "items": parsed.items}
                row = {"model": name, "seed": seed} | size | figures
                append_rows(parsed.out, [row | environment(torch.device("cpu"))])


if __name__ == "__main__":
    main()
