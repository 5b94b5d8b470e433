"""Histories of up to 16,384 events: memory and time of a training step and of serving one user.

    python -m benchmarks.long_histories [--quick] [--threads 2]

Training: two layers of width 50 on rows of 1,024, 4,096 and 16,384 events. "same tokens": 16,384 tokens in each step,
so that memory shows what a long row costs beyond its tokens. "one row": a single row, so that it shows growth with the
tokens (a row of 16,384 is both). "stochastic": rows of 16,384 thinned by stochastic length, alpha 1.6. Serving: one
user's embedding from 16,384 events, read whole, or the 2,048 latest, or 2,048 of which half are spread over what is
older; beside it the bytes of the request that carries them.

Every case runs in a process of its own. Memory is the growth of the resident set over what it was after a small step.
Before figures are taken a row's embedding is compared with the reference kernels', in float32, on the row's last 1,024
events.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import WrongAnswerError, append_rows, environment
from retrieval.data.sequences import TrainingBatch, gather_histories, gather_training
from retrieval.data.stochastic_length import keep_tokens, stochastic_length
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.inference import as_read, embed_users
from retrieval.rpc.convert import retrieve_request_to
from retrieval.rpc.requests import History, RetrieveRequest
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner
from retrieval.types import EventColumns, JaggedBatch

RESULTS = Path(__file__).parent / "results" / "long_histories.csv"
LONGEST, ITEMS, READ = 16_384, 20_000, 2_048


@dataclass(frozen=True)
class Case:
    """One configuration: rows of so many events; `how` is what is done with them."""

    series: str
    length: int
    rows: int = 1
    how: str = "whole"


CASES = (
    *(Case("same tokens", length, LONGEST // length) for length in (1_024, 4_096, LONGEST)),
    *(Case("one row", length) for length in (1_024, 4_096)),
    Case("stochastic", LONGEST, 4, "alpha 1.6"),
    Case("serving", LONGEST),
    Case("serving", LONGEST, 1, "latest"),
    Case("serving", LONGEST, 1, "spread"),
)
QUICK = (*(Case("same tokens", length, 2_048 // length) for length in (256, 2_048)), *CASES[-2:])


def main() -> None:
    """Measure every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rows, no rows in the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    cases = QUICK if parsed.quick else CASES
    if parsed.case is None:
        _check()
        for index in range(len(cases)):
            command = [sys.executable, "-m", "benchmarks.long_histories", *sys.argv[1:], "--case", str(index)]
            subprocess.run(command, check=True)
        return
    case = cases[parsed.case]
    row = _serving(case) if case.series == "serving" else _training(case)
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if not parsed.quick:
        append_rows(parsed.out, [row | environment(torch.device("cpu"))])


def _config(how: str = "whole") -> HSTUConfig:
    read = {} if how not in ("latest", "spread") else {"read_length": READ, "read": how}
    return HSTUConfig.model_validate({"num_items": ITEMS, "max_length": LONGEST, "dropout": 0.0} | read)


def _events(total: int, seed: int) -> EventColumns:
    """Items drawn by a power law, an hour apart."""
    rng = np.random.default_rng(seed)
    items = np.minimum(ITEMS * rng.random(total) ** 3, ITEMS - 1).astype(np.int64)
    times = np.cumsum(rng.exponential(3600, total).astype(np.int64))
    return EventColumns(items=items, actions=np.zeros(total, np.uint8), timestamps=times)


def _rows(length: int, rows: int, seed: int = 0) -> TrainingBatch:
    ends = (np.arange(rows) + 1) * (length + 1)
    return gather_training(_events(int(ends[-1]), seed), ends - length - 1, ends, np.ones(1, np.float32), LONGEST)


def _history(length: int, seed: int = 0) -> JaggedBatch:
    events = _events(length, seed)
    return gather_histories(events, np.zeros(1, np.int64), np.array([length]), events.timestamps[-1:] + 60, LONGEST)


def _check() -> None:
    """Embeddings by the production kernels against the reference's, from the same weights."""
    answers = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        encoder = build_encoder(_config(), backend="reference" if backend == "reference" else "cpu").eval()
        answers.append(embed_users(encoder, _history(1_024)))
    error = float(np.abs(answers[0] - answers[1]).max())
    if not error < 1e-4:
        raise WrongAnswerError(f"embeddings are off by {error:.3g}")


def _reset_peak() -> float:
    """MB of the resident set now, from which its peak is counted anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory_mb("VmRSS")


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _training(case: Case) -> dict[str, object]:
    torch.manual_seed(0)
    encoder = build_encoder(_config())
    training = TrainConfig(num_negatives=512, sparse_items=True)
    learner = Learner(encoder, training, np.ones(ITEMS, np.int64), 1000)
    batch = _rows(case.length, case.rows)
    if case.series == "stochastic":
        inputs = batch.inputs
        rng = np.random.default_rng(0)
        batch = keep_tokens(batch, stochastic_length(inputs.offsets, inputs.timestamps, LONGEST, 1.6, rng))
    learner.step(_rows(64, 2), 0)
    before = _reset_peak()
    taken = []
    for step in range(1, 3):
        begun = time.perf_counter()
        learner.step(batch, step)
        taken.append(time.perf_counter() - begun)
    return _row(case, len(batch.targets), _memory_mb("VmHWM") - before, min(taken), 0)


def _serving(case: Case) -> dict[str, object]:
    torch.manual_seed(0)
    encoder = build_encoder(_config(case.how)).eval()
    history = _history(case.length)
    embed_users(encoder, _history(64))
    before = _reset_peak()
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        embed_users(encoder, history)
        taken.append(time.perf_counter() - begun)
    sent = History(history.items.tolist(), history.timestamps.tolist(), ["click"] * case.length)
    size = len(retrieve_request_to(RetrieveRequest(user=sent, k=100)).SerializeToString())
    return _row(case, len(as_read(encoder, history).items), _memory_mb("VmHWM") - before, sorted(taken)[1], size)


def _row(case: Case, tokens: int, memory: float, seconds: float, request: int) -> dict[str, object]:
    return {
        "series": case.series,
        "events_per_row": case.length,
        "rows": case.rows,
        "read": case.how,
        "tokens": tokens,
        "memory_mb": round(memory, 1),
        "bytes_per_token": round(1024 * 1024 * memory / tokens),
        "ms": round(1000 * seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "request_bytes": request or "",
    }


if __name__ == "__main__":
    main()
