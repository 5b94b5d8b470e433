"""Recall against throughput of indexes and of what else a user could pick, in one run.

    python -m benchmarks.ann --glove glove/glove50_100k_ann.npz [--threads 1]
    python -m benchmarks.ann --embeddings hstu.npz
    python -m benchmarks.ann --items 1000000 --width 64

Data: word vectors with queries of their own kind; embeddings of a trained encoder and of its users
(`benchmarks.embeddings`); or a synthetic catalogue: items around cluster centres that themselves lie around fewer
centres, and users between two of them, since users' embeddings are not distributed like items. Ours are indexes as
`retrieval.index` builds them, searched through the backend, and through `Searcher`. Rivals: Faiss's defaults, hnswlib,
usearch, ScaNN and SVS, as far as they are installed.

Recall@100 is compared by score with exact search, for every library by the item vectors themselves. Each library's
search parameters are raised until recall reaches .99. Per setting: queries per second one at a time and in batches of
8, 64 and 256 (the best of three passes), seconds to build, bytes of the index where the library tells them. Exact
search is also set against this run's measured limit of float32: bytes read over the memory's bandwidth for one query,
the products' arithmetic over the rate of a large matrix product for batches of 256.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import WrongAnswerError, append_rows, environment, limits
from retrieval.index.backend import Index
from retrieval.index.builder import build_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec

RESULTS = Path(__file__).parent / "results" / "ann.csv"
K, TARGETS, ROUNDING = 100, (0.9, 0.95, 0.99), 1e-5
_WORTH_A_ROW = 0.8
BATCHES = (1, 8, 64, 256)
# Of this process before anything of ours runs.
FAISS_THRESHOLD = faiss.cvar.distance_compute_blas_threshold

Vectors = NDArray[np.float32]
Search = Callable[[Vectors], NDArray[np.int64]]


@dataclass(frozen=True)
class Setting:
    """One library at one setting: rows of the best K `[B, K]`, −1 where it found fewer."""

    library: str
    index: str
    parameters: str
    build_seconds: float
    bytes: int | None
    search: Search


def main() -> None:
    """Build, check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glove", type=Path, help="glove50_100k_ann.npz")
    parser.add_argument("--embeddings", type=Path, help="of benchmarks.embeddings")
    parser.add_argument("--items", type=int, default=100_000, help="of a synthetic catalogue")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--skip", nargs="*", default=[], help="beginnings of factory strings of ours not to build")
    parser.add_argument("--quick", action="store_true", help="5,000 items, no rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.items, parsed.queries = 5_000, 256
    faiss.omp_set_num_threads(parsed.threads)
    torch.set_num_threads(parsed.threads)
    name, items, queries = _data(parsed)
    thresholds = _thresholds(items, queries)
    for library in parsed.libraries:
        if importlib.util.find_spec(library if library in RIVALS else "faiss") is None:
            print(f"{library}: is not installed, no rows", flush=True)
            continue
        skipped = (tuple(parsed.skip),) if library == "ours" else ()
        for curve in LIBRARIES[library](items, parsed.threads, *skipped):
            for setting in curve:
                row = _measure(setting, items, queries, thresholds, parsed.threads, name)
                if row is None:
                    continue
                print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
                if not parsed.quick:
                    append_rows(parsed.out, [row | environment(torch.device("cpu"))])
                # Ours come in pairs, the backend after its searcher.
                if float(str(row["recall"])) >= TARGETS[-1] and setting.library != "ours, Searcher":
                    break


def _data(parsed: argparse.Namespace) -> tuple[str, Vectors, Vectors]:
    if parsed.glove is not None:
        with np.load(parsed.glove) as arrays:
            items, queries = (arrays[part].astype(np.float32) for part in ("base", "queries"))
        return "glove", _unit(items), _unit(queries[: parsed.queries])
    if parsed.embeddings is not None:
        with np.load(parsed.embeddings) as arrays:
            items, queries = arrays["items"], arrays["queries"][: parsed.queries]
        return f"{parsed.embeddings.stem} {len(items)}x{items.shape[1]}", _unit(items), _unit(queries)
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


def _thresholds(items: Vectors, queries: Vectors) -> Vectors:
    """Score of each query's K-th best item, by plain matrix products."""
    found = np.empty(len(queries), np.float32)
    step = max(1, (1 << 26) // len(items))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ items.T
        found[start : start + step] = np.partition(scores, len(items) - K, axis=1)[:, len(items) - K]
    return found


def _measure(
    setting: Setting, items: Vectors, queries: Vectors, thresholds: Vectors, threads: int, name: str
) -> dict[str, object] | None:
    """A row; None where recall is too low to be of interest."""
    rows = np.concatenate([setting.search(queries[start : start + 256]) for start in range(0, len(queries), 256)])
    if rows.shape != (len(queries), K) or any(len(set(row[row >= 0])) < (row >= 0).sum() for row in rows):
        raise WrongAnswerError(f"{setting.library} {setting.index}: answers are not {K} different items")
    scores = np.einsum("bkd,bd->bk", items[np.maximum(rows, 0)], queries)
    recall = float(((scores >= thresholds[:, None] - ROUNDING) & (rows >= 0)).mean())
    if setting.index == "Flat" and recall < 1 - ROUNDING:
        raise WrongAnswerError(f"{setting.library}: exact search has recall {recall}")
    if recall < _WORTH_A_ROW:
        return None
    rates = {batch: _rate(setting.search, queries, batch) for batch in BATCHES}
    fractions: dict[str, object] = {"single_of_limit": "", "batch_of_limit": ""}
    if setting.index == "Flat":
        limit = limits(torch.device("cpu"), torch.float32, False)
        # The copy's figure counts what is read and what is written.
        fractions["single_of_limit"] = round(rates[1] * items.nbytes / 1e9 / limit.copy_gbytes, 3)
        fractions["batch_of_limit"] = round(rates[256] * 2 * items.size / 1e12 / limit.gemm_tflops, 3)
    return {
        "data": name,
        "library": setting.library,
        "index": setting.index,
        "parameters": setting.parameters,
        "threads": threads,
        "recall": round(recall, 4),
        **{f"queries_per_second_{batch}": round(rate) for batch, rate in rates.items()},
        **fractions,
        "build_seconds": round(setting.build_seconds, 1),
        "index_mb": "" if setting.bytes is None else round(setting.bytes / 1e6, 1),
    }


def _rate(search: Search, queries: Vectors, batch: int) -> float:
    asked = queries[:200] if batch == 1 else queries[: len(queries) // batch * batch]
    best = np.inf
    for _ in range(3):
        begun = time.perf_counter()
        for start in range(0, len(asked), batch):
            search(asked[start : start + batch])
        best = min(best, time.perf_counter() - begun)
    return len(asked) / best


PROBES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 1024)
EFFORTS = (100, 150, 200, 300, 400, 600, 800, 1600)


def _ours(items: Vectors, threads: int, skip: tuple[str, ...] = ()) -> Iterator[Iterator[Setting]]:
    """Indexes as `retrieval.index` builds them: the candidates of `auto`."""
    lists = min(int(2 ** np.round(np.log2(4 * np.sqrt(len(items))))), len(items) // 39)
    codes = items.shape[1] // 2
    probes = [{"nprobe": float(n)} for n in PROBES if n <= lists]
    kinds: list[tuple[str, list[dict[str, float]]]] = [
        ("Flat", [{}]),
        (f"IVF{max(1, lists // 2)},Int8", [one for one in probes if one["nprobe"] <= lists // 2]),
        (f"IVF{lists},PQ{codes}x4fsr,Refine(SQfp16)", [{**one, "k_factor_rf": 4.0} for one in probes[2:]]),
        ("HNSW32", [{"efSearch": float(n)} for n in EFFORTS]),
    ]
    for factory, searches in kinds:
        if factory.startswith(skip):
            continue
        begun = time.perf_counter()
        index = build_index(items, IndexSpec(factory=factory))
        seconds = time.perf_counter() - begun

        def settings(
            index: Index = index, searches: list[dict[str, float]] = searches, seconds: float = seconds
        ) -> Iterator[Setting]:
            for search in searches:
                backend = index.tuned(search)
                searcher = Searcher(backend, np.arange(len(items)))
                shown = " ".join(f"{name}={value:g}" for name, value in search.items())
                ways: dict[str, Search] = {
                    "ours, Searcher": lambda asked, to=searcher: to.search(asked, [K] * len(asked)).rows,  # type: ignore[misc]
                    "ours": lambda asked, to=backend: to.search(asked, K).rows,  # type: ignore[misc]
                }
                for library, way in ways.items():
                    yield Setting(library, backend.spec.factory, shown, seconds, backend.size, way)

        yield settings()


def _faiss(items: Vectors, threads: int) -> Iterator[Iterator[Setting]]:
    """Faiss as its factory makes it, with its own defaults."""
    lists = min(int(2 ** np.round(np.log2(4 * np.sqrt(len(items))))), len(items) // 39)
    for factory in ("Flat", f"IVF{lists},Flat"):
        begun = time.perf_counter()
        index = faiss.index_factory(items.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(items)
        index.add(items)
        seconds = time.perf_counter() - begun
        threshold = faiss.cvar.distance_compute_blas_threshold

        def settings(
            index: Any = index, factory: str = factory, seconds: float = seconds, threshold: int = threshold
        ) -> Iterator[Setting]:
            # Ours change it for the whole process.
            faiss.cvar.distance_compute_blas_threshold = FAISS_THRESHOLD
            for probes in PROBES if factory.startswith("IVF") else (0,):
                if probes:
                    index.nprobe = probes
                size = int(faiss.serialize_index(index).nbytes)
                yield Setting(
                    "faiss",
                    factory,
                    f"nprobe={probes}" if probes else "",
                    seconds,
                    size,
                    lambda asked: index.search(asked, K)[1],
                )
            faiss.cvar.distance_compute_blas_threshold = threshold

        yield settings()


def _svs(items: Vectors, threads: int) -> Iterator[Iterator[Setting]]:
    import svs

    begun = time.perf_counter()
    parameters: Any = svs.VamanaBuildParameters(alpha=0.95, graph_max_degree=64, window_size=128)
    index: Any = svs.Vamana.build(parameters, items, svs.DistanceType.MIP, num_threads=threads)
    seconds = time.perf_counter() - begun
    index.num_threads = threads

    def settings() -> Iterator[Setting]:
        for window in (100, 150, 200, 300, 400, 600):
            index.search_window_size = window
            search = lambda asked: index.search(asked, K)[0].astype(np.int64)  # noqa: E731
            yield Setting("svs", "Vamana 64", f"window={window}", seconds, None, search)

    yield settings()


def _hnswlib(items: Vectors, threads: int) -> Iterator[Iterator[Setting]]:
    import hnswlib

    index: Any = hnswlib.Index("ip", items.shape[1])
    begun = time.perf_counter()
    index.init_index(len(items), M=32, ef_construction=200)
    index.set_num_threads(threads)
    index.add_items(items)
    seconds = time.perf_counter() - begun

    def settings() -> Iterator[Setting]:
        for effort in EFFORTS:
            index.set_ef(effort)
            search = lambda asked: index.knn_query(asked, K)[0].astype(np.int64)  # noqa: E731
            yield Setting("hnswlib", "HNSW M=32", f"ef={effort}", seconds, index.index_file_size(), search)

    yield settings()


def _usearch(items: Vectors, threads: int) -> Iterator[Iterator[Setting]]:
    from usearch.index import Index

    index: Any = Index(ndim=items.shape[1], metric="ip", dtype="f32", connectivity=32, expansion_add=200)
    begun = time.perf_counter()
    index.add(np.arange(len(items)), items, threads=threads)
    seconds = time.perf_counter() - begun

    def search(asked: Vectors) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = index.search(asked, K, threads=threads).keys.astype(np.int64).reshape(len(asked), K)
        return rows

    def settings() -> Iterator[Setting]:
        for effort in EFFORTS:
            index.expansion_search = effort
            size = index.serialized_length
            yield Setting("usearch", "HNSW M=32", f"expansion={effort}", seconds, size, search)

    yield settings()


def _scann(items: Vectors, threads: int) -> Iterator[Iterator[Setting]]:
    import scann

    leaves = min(max(int(np.sqrt(len(items)) * 1.25), 10), len(items) // 50)
    begun = time.perf_counter()
    builder: Any = scann.scann_ops_pybind.builder(items, K, "dot_product").set_n_training_threads(threads)
    builder = builder.tree(leaves, leaves, training_sample_size=min(len(items), 250_000))
    index: Any = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(K).build()
    seconds = time.perf_counter() - begun
    index.set_num_threads(threads)

    def settings() -> Iterator[Setting]:
        for reorder in (3, 5):
            for share in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5):
                effort = {
                    "leaves_to_search": max(1, round(share * leaves)),
                    "pre_reorder_num_neighbors": reorder * K,
                }

                def search(asked: Vectors, effort: dict[str, int] = effort) -> NDArray[np.int64]:
                    if len(asked) == 1 or threads == 1:
                        rows, scores = index.search_batched(asked, **effort)
                    else:
                        size = -(-len(asked) // threads)
                        rows, scores = index.search_batched_parallel(asked, **effort, batch_size=size)
                    return np.where(np.isfinite(scores), rows.astype(np.int64), -1)

                shown = " ".join(f"{name}={value}" for name, value in effort.items())
                yield Setting("ScaNN", f"tree {leaves}, AH 2", shown, seconds, None, search)

    yield settings()


RIVALS = ("hnswlib", "usearch", "scann", "svs")
LIBRARIES: dict[str, Callable[..., Iterator[Iterator[Setting]]]] = {
    "ours": _ours,
    "faiss": _faiss,
    "hnswlib": _hnswlib,
    "usearch": _usearch,
    "scann": _scann,
    "svs": _svs,
}


if __name__ == "__main__":
    main()
