"""Speed of training: tokens per second, where a step's time goes, and how near that is to the machine's limit.

    python -m benchmarks.train_speed [--quick] [--threads 2] [--series depth catalogue length]

Three series: 2 and 8 layers on sequences like MovieLens-1M's, with bfloat16 products too; catalogues up to 5 million
items; sequences up to 4096 tokens. Every configuration's loss is compared with the reference kernels' before it is
timed.

The limit is the model's arithmetic over the measured rate of a large matrix product. Counted are the products of the
linear layers, of attention over the pairs that a token really sees, and of the loss over what it contrasts with: once
forward and twice backward, as is usual. What is computed anew in the backward pass is not counted, nor are
exponentials, look-ups and the optimiser.
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import WrongAnswerError, append_rows, environment, limits
from retrieval.data.sequences import TrainingBatch, gather_training
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.presets import hstu_large_ml1m, hstu_ml1m
from retrieval.training.config import Precision, TrainConfig
from retrieval.training.learner import Learner
from retrieval.types import EventColumns

RESULTS = Path(__file__).parent / "results" / "train_speed.csv"
PARTS = ("attention", "loss", "embedding", "optimiser")
# What the profiler calls the operations of each part.
NAMES = {
    "attention": (
        "retrieval::hstu_attention",
        "retrieval::hstu_attention_backward",
        "retrieval::hstu_attention_prepare",
    ),
    "loss": ("retrieval::softmax_loss", "retrieval::softmax_loss_backward", "retrieval::softmax_loss_rows"),
    "embedding": ("aten::embedding", "aten::embedding_dense_backward", "aten::_unique2"),
    "optimiser": ("Optimizer.step#AdamW.step",),
}


@dataclass(frozen=True)
class Case:
    """One configuration; `length` None has the lengths of MovieLens-1M.

    With bfloat16 the fraction of the limit is of float32's, as all others are.
    """

    series: str
    layers: int
    items: int
    negatives: str
    count: int
    length: int | None = None
    precision: Precision = "float32"

    def encoder(self) -> HSTUConfig:
        """The encoder that is trained."""
        preset = hstu_ml1m if self.layers == 2 else hstu_large_ml1m
        config = preset(num_items=self.items)
        return config.model_copy(update={"num_layers": self.layers, "max_length": self.length or config.max_length})

    def rows(self) -> int:
        """Users per step: about as many tokens whatever their length."""
        return 128 if self.length is None else max(1, 14_000 // self.length)


CASES = (
    *(Case("depth", layers, 3883, "uniform", 128) for layers in (2, 8)),
    *(Case("depth", layers, 3883, "full", 0) for layers in (2, 8)),
    *(Case("depth", layers, 3883, "full", 0, precision="bfloat16") for layers in (2, 8)),
    *(Case("catalogue", 2, items, "uniform", 512) for items in (4_000, 100_000, 5_000_000)),
    *(Case("length", 2, 3883, "uniform", 128, length) for length in (50, 200, 1024, 4096)),
)


def main() -> None:
    """Measure every case in a process of its own, so that peak memory is the case's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, small catalogues, no rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--series", nargs="+", choices=(series := ("depth", "catalogue", "length")), default=series)
    parser.add_argument("--note", default="", help="state of the machine, kept with the rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    if parsed.case is not None:
        row = _measure(CASES[parsed.case], quick=parsed.quick) | {"note": parsed.note}
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if not parsed.quick:
            append_rows(parsed.out, [row | environment(torch.device("cpu"))])
        return
    for index, case in enumerate(CASES):
        if case.series in parsed.series and not (parsed.quick and case.items > 200_000):
            subprocess.run(
                [sys.executable, "-m", "benchmarks.train_speed", *sys.argv[1:], "--case", str(index)], check=True
            )


def _measure(case: Case, *, quick: bool) -> dict[str, object]:
    config = case.encoder()
    training = TrainConfig(negatives=case.negatives, num_negatives=max(1, case.count), precision=case.precision)
    torch.manual_seed(0)
    encoder = build_encoder(config)
    batches = [_batch(case, seed) for seed in range(3 if quick else 10)]
    _check(config, batches[0])
    learner = Learner(encoder, training, np.ones(case.items, np.int64), 1000)
    for step, batch in enumerate(batches[:2]):
        learner.step(batch, step)
    begun = time.perf_counter()
    for step, batch in enumerate(batches):
        learner.step(batch, step)
    seconds = time.perf_counter() - begun
    tokens = sum(len(batch.targets) for batch in batches)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        learner.step(batches[0], 0)
    flops = sum(_flops(config, batch, case.items if case.negatives == "full" else case.count) for batch in batches)
    peak = limits(torch.device("cpu"), torch.float32, quick).gemm_tflops * 1e12
    return {
        "series": case.series,
        "layers": case.layers,
        "items": case.items,
        "negatives": case.negatives if case.negatives == "full" else f"{case.negatives} {case.count}",
        "length": case.length or "ml-1m",
        "precision": case.precision,
        "tokens_per_step": tokens // len(batches),
        "tokens_per_second": round(tokens / seconds),
        "step_ms": round(1000 * seconds / len(batches), 1),
        "gflop_per_step": round(flops / len(batches) / 1e9, 2),
        "fraction_of_gemm": round(flops / seconds / peak, 3),
        **{f"{part}_share": share for part, share in _shares(profiled).items()},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _batch(case: Case, seed: int) -> TrainingBatch:
    """Sequences of items drawn by a power law, a few hours apart."""
    rng = np.random.default_rng(seed)
    if case.length is None:
        # Median 96, mean 112 after cutting: MovieLens-1M's histories cut at 200.
        lengths = np.clip(rng.lognormal(np.log(96), 0.95, case.rows()).astype(np.int64), 19, 200)
    else:
        lengths = np.full(case.rows(), case.length)
    ends = np.cumsum(lengths + 1)
    total = int(ends[-1])
    items = np.minimum(case.items * rng.random(total) ** 3, case.items - 1).astype(np.int64)
    gaps = rng.exponential(3600, total).astype(np.int64)
    events = EventColumns(items=items, actions=np.zeros(total, np.uint8), timestamps=np.cumsum(gaps))
    return gather_training(events, ends - lengths - 1, ends, np.ones(1, bool), case.encoder().max_length)


def _check(config: HSTUConfig, batch: TrainingBatch) -> None:
    """Embeddings of some rows by the production kernels against the reference's, from the same weights."""
    small = config.model_copy(update={"num_items": min(config.num_items, 10_000)})
    inputs = batch.inputs[:4]
    inputs = replace(inputs, items=inputs.items % small.num_items)
    answers = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        encoder = build_encoder(small, backend="reference" if backend == "reference" else "cpu").eval()
        with torch.no_grad():
            answers.append(encoder(JaggedTensors.of(inputs, torch.device("cpu"))))
    error = float((answers[0] - answers[1]).abs().max())
    if not error < 1e-4:
        raise WrongAnswerError(f"embeddings are off by {error:.3g}")


def _flops(config: HSTUConfig, batch: TrainingBatch, contrasts: int) -> float:
    lengths = batch.inputs.lengths.astype(np.float64)
    tokens, pairs = float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
    inner = config.num_heads * (config.qk_dim + config.v_dim)
    linear = 2 * tokens * config.width * (2 * inner + config.num_heads * config.v_dim)
    attention = 2 * pairs * inner
    return 3 * (config.num_layers * (linear + attention) + 2 * tokens * contrasts * config.width)


def _shares(profiled: profile) -> dict[str, float]:
    """Share of a step's time in each part; what is left is linear layers, gates and norms."""
    averages = {event.key: event.cpu_time_total for event in profiled.key_averages()}
    whole = sum(event.self_cpu_time_total for event in profiled.key_averages())
    return {part: round(sum(averages.get(name, 0.0) for name in NAMES[part]) / whole, 3) for part in PARTS}


if __name__ == "__main__":
    main()
