"""Choosing an index by measurement: on these items, with real users' queries, on this machine.

Legend: N items, n items of a sample, D width, Q queries, K depth.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.errors import ConfigError
from retrieval.index.backend import Index
from retrieval.index.builder import build_index
from retrieval.index.codes import library
from retrieval.index.exact import scan
from retrieval.index.spec import IndexSpec

__all__ = ["AutoIndex", "Choice", "Measured", "choose_index"]

_SAMPLE: Final = 200_000
"""Items on which all candidates are built; the two fastest are then built on all."""
_SCALE: Final = 4
"""The smaller sample, from whose times growth is judged, has so many times fewer items."""
_BATCH: Final = 32
_LEAST_ITEMS: Final = 1_000
"""Below, clusters cannot be trained and nothing beats scoring everything."""
_PER_CLUSTER: Final = 39
"""Fewer training points per cluster are too few, by Faiss's own warning."""
_ROUNDING: Final = 1e-5
_HALVINGS: Final = 2
"""Of the step between a search parameter that misses the recall and one that reaches it."""
_WORTH_A_ROW: Final = 0.5
"""Settings of a lower recall are not timed."""
# Of timings: the least of so many passes counts, as noise only ever adds.
_PASSES: Final = 3

Report = Callable[[str], None]


class AutoIndex(Config):
    """What a chosen index has to reach.

    Attributes:
        recall: least mean recall@K against exact search, over users' embeddings.
        depth: K.
        max_bytes: most that the index may take, in memory and on disk; None for no limit. The float32 embeddings that
            answers are scored with are not counted.
    """

    recall: float = Field(default=0.99, gt=0, le=1)
    depth: int = Field(default=100, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)

    def __str__(self) -> str:
        return f"auto (recall@{self.depth} ≥ {self.recall:g})"


class Measured(Config):
    """One index at one setting, as measured.

    Attributes:
        spec: what was built and how it was searched.
        items: N, or n of a sample.
        recall: mean recall@K against exact search, on the queries that settings are tuned on.
        batch_us: microseconds per query in batches of 32.
        single_us: microseconds of a query by itself; None where it was not taken.
        build_seconds: of training and filling.
        bytes: of the index.
        reaches: whether recall is what was asked for.
    """

    spec: IndexSpec
    items: int
    recall: float
    batch_us: float
    single_us: float | None = None
    build_seconds: float
    bytes: int
    reaches: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen index.

    Attributes:
        index: built over all items, with its search parameters set.
        spec: what it is.
        recall: recall@K on queries that nothing was tuned on.
        table: everything that was measured, for the report.
    """

    index: Index
    spec: IndexSpec
    recall: float
    table: tuple[Measured, ...]


def choose_index(
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    auto: AutoIndex,
    *,
    report: Report = lambda line: None,
) -> Choice:
    """Build the fastest index that reaches the recall asked for.

    Candidates (exact search, inverted lists of 8-bit codes and of 4-bit codes with refinement, HNSW) are built on two
    samples of the items, and their search parameters raised until they reach the recall there. Times on the two say how
    a candidate's cost grows; the two that promise to be fastest on all items are built on all, tuned again and timed:
    the faster one that reaches the recall is taken. Exact search always reaches it. Up to 200,000 items, all candidates
    are built on all of them.

    Only half of the queries tune; `Choice.recall` is of the other half. As times decide, two runs may choose
    differently.

    Args:
        vectors: item embeddings of unit length, float32 `[N, D]`.
        queries: users' embeddings, float32 `[Q, D]`, Q ≥ 2: they are not distributed like items.
        auto: what to reach.
        report: told of each step, one line each.

    Raises:
        ConfigError: nothing fits into `auto.max_bytes`, or there are too few queries.
        InputError: an embedding is not finite.
    """
    if len(queries) < 2:
        raise ConfigError(f"index: {len(queries)} users' embeddings are too few to choose an index by")
    tune, check = queries[::2], queries[1::2]
    count = len(vectors)
    sample = _sampled(vectors, min(count, _SAMPLE))
    table: list[Measured] = []
    whole = _Problem(vectors, tune, auto)
    if count < _LEAST_ITEMS:
        candidates = ["Flat"]
    elif len(sample) == count:
        candidates = _candidates(count, vectors.shape[1])
    else:
        candidates = _promising(sample, count, tune, auto, table, report)
    best: tuple[Measured, Index] | None = None
    too_large: list[int] = []
    for factory in candidates:
        curve, index = _curve(whole, factory, report)
        table += curve
        size = index.size
        if auto.max_bytes is not None and size > auto.max_bytes:
            too_large.append(size)
            continue
        reached = [one for one in curve if one.reaches]
        if reached:
            found = min(reached, key=lambda one: one.batch_us)
            if best is None or found.batch_us < best[0].batch_us:
                best = found, index
    if best is None:
        assert too_large
        raise ConfigError(
            f"index: none over {count} items of width {vectors.shape[1]} fits into {auto.max_bytes} bytes; the "
            f"smallest of those tried takes {min(too_large)}"
        )
    measured = best[0]
    backend = best[1].tuned(measured.spec.search)
    measured = measured.model_copy(update={"single_us": _microseconds(backend, tune, auto.depth, 1)})
    table.append(measured)
    recall = _recall(backend, check, _Problem(vectors, check, auto).thresholds, min(auto.depth, count))
    report(f"chosen: {measured.spec}, {measured.batch_us:.0f} µs per query, recall@{auto.depth} {recall:.4f}")
    return Choice(index=backend, spec=measured.spec, recall=recall, table=tuple(table))


def _sampled(vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    if count == len(vectors):
        return vectors
    rows = np.random.default_rng(0).choice(len(vectors), count, replace=False)
    return np.asarray(vectors[np.sort(rows)], np.float32)


class _Problem:
    """Items, queries, and the score of each query's K-th best item."""

    def __init__(self, vectors: NDArray[np.float32], queries: NDArray[np.float32], auto: AutoIndex) -> None:
        self.vectors, self.queries, self.auto = vectors, np.ascontiguousarray(queries, np.float32), auto
        self.depth = min(auto.depth, len(vectors))
        self.thresholds = scan(vectors, self.queries, self.depth)[1][:, -1]


def _candidates(count: int, width: int) -> list[str]:
    """Factory strings for so many items."""
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    lists = max(1, min(lists, count // _PER_CLUSTER))
    # Scoring by codes costs so little that half as many lists are faster; without a compiler Faiss's lists are.
    inverted = f"IVF{max(1, lists // 2)},Int8" if library() is not None else f"IVF{lists},Flat"
    # Two dimensions to a 4-bit code are what keeps recall high before refinement.
    codes = next(codes for codes in range(max(1, width // 2), 0, -1) if width % codes == 0)
    return ["Flat", inverted, f"IVF{lists},PQ{codes}x4fsr,Refine(SQfp16)", "HNSW32"]


def _promising(
    sample: NDArray[np.float32],
    count: int,
    queries: NDArray[np.float32],
    auto: AutoIndex,
    table: list[Measured],
    report: Report,
) -> list[str]:
    """Factory strings for all items of the two candidates that promise to be fastest, and exact search's."""
    smaller = _sampled(sample, len(sample) // _SCALE)
    problems = [_Problem(one, queries, auto) for one in (smaller, sample)]
    expected: list[tuple[float, str]] = []
    for name, *sizes in zip(
        *(_candidates(size, sample.shape[1]) for size in (count, len(smaller), len(sample))), strict=True
    ):
        times = []
        for problem, factory in zip(problems, sizes, strict=True):
            curve, index = _curve(problem, factory, report)
            table += curve
            times.append(min((one.batch_us for one in curve if one.reaches), default=math.inf))
            size = index.size
        share = size / len(sample)
        if not math.isfinite(times[1]) or (auto.max_bytes is not None and share * count > auto.max_bytes):
            continue
        growth = min(max(math.log(times[1] / times[0], _SCALE), 0.0), 1.0) if math.isfinite(times[0]) else 1.0
        expected.append((times[1] * (count / len(sample)) ** growth, name))
    names = [name for _, name in sorted(expected)[:2]]
    return names if "Flat" in names else [*names, "Flat"]


def _curve(problem: _Problem, factory: str, report: Report) -> tuple[list[Measured], Index]:
    """Build an index and raise its search parameters until it reaches the recall, or there is no more to raise."""
    begun = time.perf_counter()
    index = build_index(problem.vectors, IndexSpec(factory=factory))
    seconds, size = time.perf_counter() - begun, index.size
    curve: list[Measured] = []

    def reaches(search: dict[str, float]) -> bool:
        backend = index.tuned(search)
        recall = _recall(backend, problem.queries, problem.thresholds, problem.depth)
        enough = recall >= problem.auto.recall
        if recall >= min(_WORTH_A_ROW, problem.auto.recall):
            measured = Measured(
                spec=backend.spec,
                items=len(problem.vectors),
                recall=round(recall, 5),
                batch_us=round(_microseconds(backend, problem.queries, problem.depth, _BATCH), 2),
                build_seconds=round(seconds, 2),
                bytes=size,
                reaches=enough,
            )
            curve.append(measured)
        return enough

    for rising in _settings(factory, problem.depth, len(problem.vectors)):
        place = next((place for place, search in enumerate(rising) if reaches(search)), None)
        if place:
            low, high = rising[place - 1], rising[place]
            for _ in range(_HALVINGS):
                between = _between(low, high)
                if between in (low, high):
                    break
                low, high = (low, between) if reaches(between) else (between, high)
    if curve:
        best = min(curve, key=lambda one: (not one.reaches, one.batch_us if one.reaches else -one.recall))
        what = f"recall@{problem.depth} {best.recall:.4f}, {best.batch_us:.0f} µs per query, built in {seconds:.1f} s"
        report(f"{len(problem.vectors):,} items, {best.spec}: {what}")
    return curve, index


def _settings(factory: str, depth: int, count: int) -> Iterator[list[dict[str, float]]]:
    """Search parameters from quick to thorough, one of them rising."""
    if factory.startswith("IVF"):
        lists = int(factory[3:].split(",")[0])
        probes = sorted({min(lists, round(2 ** (step / 2))) for step in range(2 * math.ceil(math.log2(lists + 1)) + 1)})
        factors = [factor for factor in (2, 4, 8, 16) if factor * depth <= count or factor == 2]
        for factor in factors if "Refine" in factory else [None]:
            refining = {} if factor is None else {"k_factor_rf": float(factor)}
            yield [{"nprobe": float(probe)} | refining for probe in probes]
    elif factory.startswith("HNSW"):
        efforts = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
        yield [{"efSearch": float(round(max(16, effort * depth)))} for effort in efforts]
    else:
        yield [{}]


def _between(low: dict[str, float], high: dict[str, float]) -> dict[str, float]:
    """Halfway, by ratio."""
    return {name: float(round(math.sqrt(low[name] * high[name]))) for name in low}


def _recall(backend: Index, queries: NDArray[np.float32], thresholds: NDArray[np.float32], depth: int) -> float:
    """Mean share of K answers that score no worse than the true K-th best, by the items' own embeddings."""
    hits = 0
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        rows = backend.search(part, depth).rows
        scores = np.einsum("bkd,bd->bk", backend.vectors[np.maximum(rows, 0)], part)
        good = scores >= thresholds[start : start + _BATCH, None] - _ROUNDING
        hits += int(np.count_nonzero(good & (rows >= 0)))
    return hits / (len(queries) * depth)


def _microseconds(backend: Index, queries: NDArray[np.float32], depth: int, batch: int) -> float:
    """Per query, in batches."""
    queries = queries[: max(batch, min(len(queries), 4 * batch)) // batch * batch]
    times = []
    for _ in range(_PASSES):
        begun = time.perf_counter()
        for start in range(0, len(queries), batch):
            backend.search(queries[start : start + batch], depth)
        times.append(time.perf_counter() - begun)
    return min(times) / len(queries) * 1e6
