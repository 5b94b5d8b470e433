"""What filters cost in time and in recall: one table row per index, way of filtering and share of survivors.

    python -m benchmarks.filters [--items 200000] [--queries 128] [--target 0.99] [--seconds 0.5] [--note TEXT]
    python -m benchmarks.filters --embeddings FOLDER --kept KEPT

Items lie in clusters; queries are means of a few items with noise, so they are distributed otherwise. Or they are those
of a trained encoder (`benchmarks.embeddings`), and indexes are kept as in `benchmarks.ann`. A filter keeps items either
at `random` or on one `side` of the space (those farthest along one direction), which is near some queries and far from
others. Each index is tuned to the target recall@100 without a filter; every way then uses the same parameters:

    ours        `Searcher`, which plans by the costs that it measures
    index, selector, scan   `Searcher` made to prefer that plan; the column `plans` tells which ones answered
    backend     the index's own selector at the tuned parameters, Faiss's where the index is Faiss's
    backend/share the same with nprobe or efSearch divided by the share of survivors
    hnswlib     its filter, a Python function, at the ef that reaches the target without a filter; 8 queries below 10%,
                and up to 200,000 items, as it takes long to build

Recall counts answers that score no worse than the true k-th eligible one. `ours` must reach the target less one
standard error and a half percent, and give full answers, or the run fails.
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from benchmarks.ann_libraries import LIBRARIES, opened
from benchmarks.harness import WrongAnswerError, append_rows, environment, timed
from retrieval.index.attributes import Attributes
from retrieval.index.backend import FaissBackend, Index
from retrieval.index.builder import build_index
from retrieval.index.filter import Compare
from retrieval.index.planner import Costs
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.types import Answers, Plan

_RESULTS = Path(__file__).parent / "results" / "filters.csv"
_SHARES = (1.0, 0.5, 0.1, 0.01, 0.001, 0.00001)
_K, _BATCH, _WIDTH, _LATENT = 100, 64, 64, 16
# Below this share only `ours`, `scan`, `backend` and `hnswlib` are measured: the others take seconds a query.
_LEAST_FORCED = 0.1
_SLACK = 0.005
_QUICK_TO_BUILD = 200_000
_CPU = torch.device("cpu")
# Each makes one plan the cheapest wherever it is possible.
_FORCED = {
    Plan.INDEX: Costs(search=1e-9, candidate=0, restricted=1, gather=1, score=1),
    Plan.SELECTOR: Costs(search=1, candidate=0, restricted=1e-9, gather=1, score=1),
    Plan.SCAN: Costs(search=1, candidate=1, restricted=math.inf, gather=0, score=1e-12),
}

Search = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], str]]
"""Queries in; scores of the answers, −inf where there is none, and which plans answered."""


@dataclass(frozen=True, slots=True)
class World:
    """Items, queries, and the place of each item in the orders that filters cut: int64 `[N]` each."""

    items: NDArray[np.float32]
    queries: NDArray[np.float32]
    places: dict[str, NDArray[np.int64]]

    @classmethod
    def make(cls, count: int, queries: int) -> "World":
        """The world of so many items and queries; always the same one."""
        rng = np.random.default_rng(0)
        # Learned embeddings fill few of their dimensions.
        centres = rng.normal(size=(max(count // 500, 8), _LATENT))
        latent = centres[rng.integers(0, len(centres), count)] + 0.6 * rng.normal(size=(count, _LATENT))
        spread = rng.normal(size=(_LATENT, _WIDTH))
        items = _unit((latent @ spread).astype(np.float32) + 0.5 * _noise(rng, count))
        liked = items[rng.integers(0, count, (queries, 3))].mean(axis=1)
        return cls.of(items, _unit(liked + 0.02 * _noise(rng, queries)))

    @classmethod
    def of(cls, items: NDArray[np.float32], queries: NDArray[np.float32]) -> "World":
        """A world of these items and queries, all of unit length."""
        rng = np.random.default_rng(1)
        side = items @ _unit(rng.normal(size=(1, items.shape[1])).astype(np.float32))[0]
        return cls(items, queries, {"random": rng.permutation(len(items)), "side": (-side).argsort().argsort()})

    def thresholds(self, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Score of each query's true last answer, `[B]`."""
        rows = np.flatnonzero(mask)
        items = self.items if mask.all() else self.items[rows]
        place = len(rows) - min(_K, len(rows))
        parts = (self.queries[start : start + 16] @ items.T for start in range(0, len(self.queries), 16))
        return np.concatenate([np.partition(scores, place, axis=1)[:, place] for scores in parts])


def _noise(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return rng.normal(size=(count, _WIDTH)).astype(np.float32)


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def recall_of(scores: NDArray[np.float32], thresholds: NDArray[np.float32], survivors: int) -> tuple[float, float]:
    """Mean recall and its standard error."""
    each = np.count_nonzero(scores >= thresholds[:, None] - 1e-5, axis=1) / min(_K, survivors)
    return float(each.mean()), float(each.std() / math.sqrt(len(each)))


def measure(
    world: World, search: Search, thresholds: NDArray[np.float32], survivors: int, seconds: float, most: int
) -> dict[str, object]:
    """Answer all queries, or one batch if less than that are wanted, and check recall; then time batches."""
    queries = world.queries if most >= _BATCH else world.queries[:most]
    found = [search(queries[start : start + _BATCH]) for start in range(0, len(queries), _BATCH)]
    recall, error = recall_of(np.concatenate([scores for scores, _ in found]), thresholds[: len(queries)], survivors)
    batch = queries[:_BATCH]
    begun = time.perf_counter()
    search(batch)
    if time.perf_counter() - begun > 2 * seconds:  # too slow to repeat
        milliseconds = 1000 * (time.perf_counter() - begun)
    else:
        milliseconds = timed(lambda: search(batch), _CPU, seconds)[1]
    return {
        "recall": recall,
        "recall_error": error,
        "queries_per_s": 1000 * len(batch) / milliseconds,
        "plans": "+".join(sorted({plan for _, plans in found for plan in plans.split("+")})),
    }


def ours(searcher: Searcher, filter_: Compare | None, survivors: int) -> Search:
    """Our searcher; raises WrongAnswerError for an answer that is not full."""

    def search(queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
        answers: Answers = searcher.search(queries, [_K] * len(queries), None, [filter_] * len(queries))
        if (np.count_nonzero(answers.rows >= 0, axis=1) != min(_K, survivors)).any():
            raise WrongAnswerError(f"{filter_}: an answer is not full")
        return answers.scores, "+".join(sorted({Plan(plan).name.lower() for plan in answers.plans}))

    return search


def own_selector(backend: Index, mask: NDArray[np.bool_] | None, effort: float) -> Search:
    """The index by itself."""
    allowed = None if mask is None else np.packbits(mask, bitorder="little")

    def search(queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
        found = backend.search(queries, _K, allowed=allowed, effort=effort)
        return np.where(found.rows >= 0, found.scores, -np.inf).astype(np.float32), ""

    return search


def hnswlib_filter(world: World, target: float, kept: Path | None) -> Callable[[NDArray[np.bool_]], Search] | None:
    """hnswlib, tuned to the target without a filter; None where it is not installed."""
    if importlib.util.find_spec("hnswlib") is None:
        return None
    index, _ = opened(LIBRARIES["hnswlib"][0], world.items, faiss.omp_get_max_threads(), kept)
    index.set_num_threads(1)

    def with_mask(mask: NDArray[np.bool_]) -> Search:
        allowed = None if mask.all() else mask.tolist().__getitem__

        def search(queries: NDArray[np.float32]) -> tuple[NDArray[np.float32], str]:
            scores = np.full((len(queries), _K), -np.inf, np.float32)
            for query, into in zip(queries, scores, strict=True):
                try:
                    _, distances = index.knn_query(query, min(_K, int(mask.sum())), num_threads=1, filter=allowed)
                except RuntimeError:  # it found fewer than asked for, and then gives nothing
                    continue
                into[: distances.shape[1]] = 1 - distances[0]
            return scores, ""

        return search

    everything = np.ones(len(world.items), bool)
    thresholds = world.thresholds(everything)
    for ef in (100, 200, 400, 800, 1600):
        index.set_ef(ef)
        scores, _ = with_mask(everything)(world.queries)
        if recall_of(scores, thresholds, len(world.items))[0] >= target:
            break
    return with_mask


def built(world: World, factory: str, kept: Path | None) -> Index:
    """An index as `retrieval.index` builds it; from what is kept, where `benchmarks.ann` keeps it."""
    for library in (*LIBRARIES["ours"], *LIBRARIES["faiss"]):
        if kept is not None and library.index(*world.items.shape) == factory:
            index = opened(library, world.items, faiss.omp_get_max_threads(), kept)[0]
            own: Index = (
                index if library.name == "ours" else FaissBackend(index, world.items, IndexSpec(factory=factory))
            )
            return own
    return build_index(world.items, IndexSpec(factory=factory))


def tuned(world: World, factory: str, searches: Sequence[dict[str, float]], target: float, kept: Path | None) -> Index:
    """The index with the first search parameters that reach the target without a filter.

    Raises:
        WrongAnswerError: none does.
    """
    backend = built(world, factory, kept)
    thresholds = world.thresholds(np.ones(len(world.items), bool))
    for search in searches:
        backend = backend.tuned(search)
        scores = backend.search(world.queries, _K).scores
        if recall_of(scores, thresholds, len(world.items))[0] >= target:
            return backend
    raise WrongAnswerError(f"{factory}: does not reach recall {target}")


def _kinds(count: int) -> list[tuple[str, list[dict[str, float]]]]:
    """Indexes and their search parameters by rising effort; a graph only where it is quick to build."""
    cells = 2 ** round(math.log2(4 * math.sqrt(count)))
    probes = [{"nprobe": float(2**i)} for i in range(2, 12) if 2**i <= cells]
    kinds: list[tuple[str, list[dict[str, float]]]] = [
        ("Flat", [{}]),
        (f"IVF{cells // 2},Int8", probes),
        (f"IVF{cells},Flat", probes),
    ]
    graph = [("HNSW32", [{"efSearch": float(n)} for n in (100, 200, 400, 800, 1600)])]
    return kinds + graph if count <= _QUICK_TO_BUILD else kinds


def main() -> None:
    """Build, tune, measure, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--seconds", type=float, default=0.5, help="to time each way for")
    parser.add_argument("--note", default="", help="kept with the rows, e.g. that the machine was busy")
    parser.add_argument("--embeddings", type=Path, help="folder of benchmarks.embeddings")
    parser.add_argument("--kept", type=Path, help="folder of indexes that are built once")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    if options.embeddings is None:
        world, data = World.make(options.items, options.queries), "synthetic"
    else:
        items, queries = (np.load(options.embeddings / f"{name}.npy") for name in ("items", "queries"))
        world, data = World.of(items, queries[: options.queries]), options.embeddings.name
    count, width = world.items.shape
    backends = [tuned(world, name, searches, options.target, options.kept) for name, searches in _kinds(count)]
    rival = hnswlib_filter(world, options.target, options.kept) if count <= _QUICK_TO_BUILD else None
    misses = []
    for kind, places in world.places.items():
        for share in _SHARES if kind == "random" else _SHARES[1:]:
            survivors = max(1, round(share * count))
            mask = places < survivors
            thresholds = world.thresholds(mask)
            filter_ = Compare("place", "<", survivors) if share < 1 else None
            ways: list[tuple[str, str, Search]] = []
            for backend in backends:
                attributes = Attributes({"place": pa.array(places)}, count)
                for name, costs in [("ours", None), *((p.name.lower(), _FORCED[p]) for p in Plan)]:
                    tie_rank = np.arange(count)
                    searcher = Searcher(backend, tie_rank, attributes=attributes, costs=costs)
                    if costs is None or (share < 1 and (share >= _LEAST_FORCED or name == "scan")):
                        ways.append((str(backend.spec), name, ours(searcher, filter_, survivors)))
                if backend.supports_allowed or share == 1:
                    allowed = mask if share < 1 else None
                    ways.append((str(backend.spec), "backend", own_selector(backend, allowed, 1.0)))
                    if _LEAST_FORCED <= share < 1 and backend.spec.search:
                        ways.append((str(backend.spec), "backend/share", own_selector(backend, allowed, 1 / share)))
            if rival is not None:
                ways.append(("hnswlib M32", "hnswlib", rival(mask)))
            rows: list[dict[str, object]] = []
            for index, way, search in ways:
                few = way == "hnswlib" and share < _LEAST_FORCED
                measured = measure(world, search, thresholds, survivors, options.seconds, 8 if few else _BATCH)
                head = {"index": index, "way": way, "filter": kind, "share": share, "survivors": survivors}
                row = head | measured
                print(
                    f"{index:44} {way:12} {kind:7} {share:<8g} recall {row['recall']:.4f} "
                    f"{row['queries_per_s']:>10.0f}/s {row['plans']}",
                    flush=True,
                )
                short = float(str(row["recall"])) < options.target - _SLACK - float(str(row["recall_error"]))
                if way == "ours" and short:
                    misses.append(f"{index}, {kind} {share}: recall {row['recall']:.4f}")
                fixed = {"items": count, "width": width, "k": _K, "batch": _BATCH, "target": options.target}
                rows.append(
                    row
                    | fixed
                    | {"faiss": faiss.__version__}
                    | environment(_CPU)
                    | {"note": f"{data}; {options.note}" if options.note else data}
                )
            append_rows(_RESULTS, rows)
    if misses:
        sys.exit("below the target: " + "; ".join(misses))


if __name__ == "__main__":
    main()
