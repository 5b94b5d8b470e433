"""Recall against throughput of indexes and of what else a user could pick, in one run.

    python -m benchmarks.ann --glove glove/glove50_100k_ann.npz [--threads 1]
    python -m benchmarks.ann --embeddings FOLDER --kept KEPT --build-only
    python -m benchmarks.ann --embeddings FOLDER --kept KEPT --libraries ours scann
    python -m benchmarks.ann --items 1000000 --width 64

Data: word vectors with queries of their own kind; embeddings of a trained encoder and of its users
(`benchmarks.embeddings`), memory-mapped; or a synthetic catalogue: items around cluster centres that themselves lie
around fewer centres, and users between two of them, since users' embeddings are not distributed like items. Ours are
indexes as `retrieval.index` builds them, searched through the backend, and through `Searcher`. Rivals: Faiss's
defaults, hnswlib, usearch, ScaNN and SVS, as far as they are installed (`benchmarks.ann_libraries`). What `--kept`
names keeps indexes that were built, with the seconds that it took, so that a run can be cut into pieces.

Recall@100 is compared by score with exact search, for every library by the item vectors themselves. Each library's
search parameters are raised until recall reaches .99. Per setting: queries per second one at a time and in batches of
8, 64 and 256 (the best of three passes), seconds to build, bytes of the index's file, or of the index where it is not
kept, and memory that the process took on to build or open it. Exact search is also set against this run's measured
limit of float32: bytes read over the memory's bandwidth for one query, the products' arithmetic over the rate of a
large matrix product for batches of 256.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.ann_libraries import LIBRARIES, K, Search, Setting, Vectors, kept_bytes, opened
from benchmarks.harness import WrongAnswerError, append_rows, environment, limits

RESULTS = Path(__file__).parent / "results" / "ann.csv"
TARGETS, ROUNDING = (0.9, 0.95, 0.99), 1e-5
_WORTH_A_ROW = 0.8
BATCHES = (1, 8, 64, 256)
_PASSES, _PASS_SECONDS = 3, 0.12
_BLOCK = 1 << 17


def main() -> None:
    """Build, check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glove", type=Path, help="glove50_100k_ann.npz")
    parser.add_argument("--embeddings", type=Path, help="folder of benchmarks.embeddings")
    parser.add_argument("--items", type=int, default=100_000, help="of a synthetic catalogue")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--skip", nargs="*", default=[], help="beginnings of indexes not to build")
    parser.add_argument("--kept", type=Path, help="folder of indexes that are built once")
    parser.add_argument("--build-only", action="store_true", help="fill that folder")
    parser.add_argument("--quick", action="store_true", help="5,000 items, no rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.items, parsed.queries = 5_000, 256
    faiss.omp_set_num_threads(parsed.threads)
    torch.set_num_threads(parsed.threads)
    name, items, queries = _data(parsed)
    thresholds = _thresholds(items, queries, parsed.kept)
    for library in (one for chosen in parsed.libraries for one in LIBRARIES[chosen]):
        index = library.index(*items.shape)
        if index.startswith(tuple(parsed.skip)):
            continue
        if importlib.util.find_spec(library.module) is None:
            print(f"{library.name}: is not installed, no rows", flush=True)
            continue
        before = _memory()
        built, seconds = opened(library, items, parsed.threads, parsed.kept)
        if parsed.build_only:
            print(f"{name}, {library.name} {index}: built in {seconds:.1f} s", flush=True)
            continue
        about = {
            "build_seconds": round(seconds, 1),
            "index_mb": _megabytes(kept_bytes(library, index, parsed.kept) or library.size(built)),
            "memory_mb": _megabytes(_memory() - before),
        }
        for setting in library.settings(built, index, parsed.threads):
            measured = _measure(setting, index, items, queries, thresholds)
            if measured is None:
                continue
            head = {"data": name, "library": setting.library, "index": index, "parameters": setting.parameters}
            row = head | {"threads": parsed.threads} | measured | about
            print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
            if not parsed.quick:
                append_rows(parsed.out, [row | environment(torch.device("cpu"))])
            # Ours come in pairs, the backend after its searcher.
            if float(str(row["recall"])) >= TARGETS[-1] and setting.library != "ours, Searcher":
                break
        del built


def _data(parsed: argparse.Namespace) -> tuple[str, Vectors, Vectors]:
    if parsed.glove is not None:
        with np.load(parsed.glove) as arrays:
            items, queries = (arrays[part].astype(np.float32) for part in ("base", "queries"))
        return "glove", _unit(items), _unit(queries[: parsed.queries])
    if parsed.embeddings is not None:
        items = np.load(parsed.embeddings / "items.npy", mmap_mode="r")
        queries = np.load(parsed.embeddings / "queries.npy")[: parsed.queries]
        return f"{parsed.embeddings.name} {len(items)}x{items.shape[1]}", items, queries
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, parsed.width))[rng.integers(0, 100, 5000)]
    centres = centres + 0.7 * rng.normal(size=centres.shape)
    items = np.empty((parsed.items, parsed.width), np.float32)
    for start in range(0, parsed.items, 1 << 16):
        part = items[start : start + (1 << 16)]
        part[:] = centres[rng.integers(0, 5000, len(part))] + 0.7 * rng.normal(size=part.shape)
    tastes = centres[rng.integers(0, 5000, (parsed.queries, 2))].sum(1)
    users = tastes + 0.7 * rng.normal(size=tastes.shape)
    return f"synthetic {parsed.items}x{parsed.width}", _unit(items), _unit(users.astype(np.float32))


def _unit(x: Vectors) -> Vectors:
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(x)


def _thresholds(items: Vectors, queries: Vectors, kept: Path | None) -> Vectors:
    """Score of each query's K-th best item, by plain matrix products."""
    file = None if kept is None else kept / f"thresholds-{len(queries)}.npy"
    if file is not None and file.exists():
        return np.asarray(np.load(file), np.float32)
    best = torch.full((len(queries), K), -torch.inf)
    for start in range(0, len(items), _BLOCK):
        scores = torch.from_numpy(queries @ np.asarray(items[start : start + _BLOCK]).T)
        best = torch.cat([best, scores.topk(min(K, scores.shape[1])).values], 1).topk(K).values
    found = np.asarray(best[:, -1].numpy(), np.float32)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, found)
    return found


def _measure(
    setting: Setting, index: str, items: Vectors, queries: Vectors, thresholds: Vectors
) -> dict[str, object] | None:
    """The measured part of a row; None where recall is too low to be of interest."""
    rows = np.concatenate([setting.search(queries[start : start + 256]) for start in range(0, len(queries), 256)])
    if rows.shape != (len(queries), K) or any(len(set(row[row >= 0])) < (row >= 0).sum() for row in rows):
        raise WrongAnswerError(f"{setting.library} {index}: answers are not {K} different items")
    scores = np.einsum("bkd,bd->bk", items[np.maximum(rows, 0)], queries)
    recall = float(((scores >= thresholds[:, None] - ROUNDING) & (rows >= 0)).mean())
    if index == "Flat" and recall < 1 - ROUNDING:
        raise WrongAnswerError(f"{setting.library}: exact search has recall {recall}")
    if recall < _WORTH_A_ROW:
        return None
    rates = {batch: _rate(setting.search, queries, batch) for batch in BATCHES}
    fractions: dict[str, object] = {"single_of_limit": "", "batch_of_limit": ""}
    if index == "Flat":
        limit = limits(torch.device("cpu"), torch.float32, False)
        # The copy's figure counts what is read and what is written.
        fractions["single_of_limit"] = round(rates[1] * items.nbytes / 1e9 / limit.copy_gbytes, 3)
        fractions["batch_of_limit"] = round(rates[256] * 2 * items.size / 1e12 / limit.gemm_tflops, 3)
    speeds = {f"queries_per_second_{batch}": round(rate) for batch, rate in rates.items()}
    return {"recall": round(recall, 4), **speeds, **fractions}


def _rate(search: Search, queries: Vectors, batch: int) -> float:
    """Queries per second of the best pass; a pass ends with the queries or with its time."""
    best = 0.0
    for _ in range(_PASSES):
        done, begun = 0, time.perf_counter()
        while done + batch <= len(queries) and (not done or time.perf_counter() - begun < _PASS_SECONDS):
            search(queries[done : done + batch])
            done += batch
        best = max(best, done / (time.perf_counter() - begun))
    return best


def _memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _megabytes(count: int | None) -> object:
    return "" if count is None else round(count / 1e6, 1)


if __name__ == "__main__":
    main()
