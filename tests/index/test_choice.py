"""Choosing an index: what is chosen reaches what was asked for, on queries that nothing was tuned on."""

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.errors import ConfigError, InputError
from retrieval.index import choice
from retrieval.index.backend import Index
from retrieval.index.choice import AutoIndex, Measured, choose_index
from retrieval.index.spec import IndexSpec


def unit(x: NDArray[np.float64]) -> NDArray[np.float32]:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def clustered(items: int, queries: int, width: int = 16, seed: int = 0) -> list[NDArray[np.float32]]:
    """Items around centres, and queries between two of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(64, width))
    vectors = centres[rng.integers(0, 64, items)] + 0.4 * rng.normal(size=(items, width))
    asked = centres[rng.integers(0, 64, (queries, 2))].sum(1) + 0.3 * rng.normal(size=(queries, width))
    return [unit(vectors), unit(asked)]


def true_recall(vectors: NDArray[np.float32], queries: NDArray[np.float32], rows: NDArray[np.int64]) -> float:
    """Float64, every item scored."""
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    kth = np.sort(scores, axis=1)[:, -rows.shape[1]]
    found = np.take_along_axis(scores, rows, axis=1) >= kth[:, None] - 1e-5
    return float(found.mean())


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times by factory string's beginning, in place of a clock; what is not named is slow."""
    times: dict[str, float] = {}

    def microseconds(backend: Index, queries: object, depth: int, batch: int) -> float:
        return next((time for start, time in times.items() if backend.spec.factory.startswith(start)), 1e6)

    monkeypatch.setattr(choice, "_microseconds", microseconds)
    return times


@pytest.mark.parametrize("fastest", ["Flat", "IVF64,Int8", "IVF128,PQ", "HNSW"])
def test_the_fastest_that_reaches_the_recall_is_chosen(stopped_clock: dict[str, float], fastest: str) -> None:
    stopped_clock[fastest] = 1.0
    vectors, queries = clustered(5000, 120)
    auto = AutoIndex(recall=0.9, depth=20)
    found = choose_index(vectors, queries, auto)
    assert found.spec.factory.startswith(fastest)
    rows = found.index.search(queries[1::2], 20).rows
    assert found.recall == pytest.approx(true_recall(vectors, queries[1::2], rows), abs=1e-9)
    assert found.recall > 0.85
    (chosen,) = [one for one in found.table if one.single_us is not None]
    assert chosen.spec == found.spec
    assert chosen.reaches


def test_search_parameters_are_raised_no_further_than_the_recall_needs(stopped_clock: dict[str, float]) -> None:
    vectors, queries = clustered(5000, 120)
    found = choose_index(vectors, queries, AutoIndex(recall=0.9, depth=20))
    for start, name in (("IVF64,Int8", "nprobe"), ("HNSW", "efSearch")):
        curve = [one for one in found.table if one.spec.factory.startswith(start) and one.single_us is None]
        enough = min(one.spec.search[name] for one in curve if one.reaches)
        short = max((one.spec.search[name] for one in curve if not one.reaches), default=enough / 2)
        assert enough <= max(1.2 * short, short + 1)


def test_nothing_that_misses_the_recall_is_chosen_however_fast(stopped_clock: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    # Nothing to find by neighbourhood: an index that looks at a part misses much.
    vectors, queries = unit(rng.normal(size=(3000, 48))), unit(rng.normal(size=(60, 48)))
    stopped_clock |= {"HNSW": 1.0, "Flat": 5.0}
    found = choose_index(vectors, queries, AutoIndex(recall=1.0, depth=200))
    reached = {one.spec.factory.split(",")[0] for one in found.table if one.reaches}
    assert "Flat" in reached
    assert found.recall >= 0.999
    assert all(one.recall >= 1.0 for one in found.table if one.reaches)


def test_candidates_are_judged_on_samples_and_the_promising_built_on_all(
    stopped_clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_SAMPLE", 4000)
    vectors, queries = clustered(9000, 60)
    times = {1000: {"Flat": 1.0, "IVF": 4.0, "HNSW": 5.0}, 4000: {"Flat": 4.0, "IVF": 4.5, "HNSW": 6.0}}

    def microseconds(backend: Index, queries: object, depth: int, batch: int) -> float:
        # Flat is fastest on both samples, but its time grows with the items.
        if backend.count == 9000:
            return {"Flat": 9.0, "IVF": 5.0, "HNSW": 7.0}[backend.spec.factory.split(",")[0].rstrip("0123456789")]
        return times[backend.count][backend.spec.factory.split(",")[0].rstrip("0123456789")]

    monkeypatch.setattr(choice, "_microseconds", microseconds)
    lines: list[str] = []
    found = choose_index(vectors, queries, AutoIndex(recall=0.9, depth=10), report=lines.append)
    assert found.spec.factory.startswith("IVF")
    assert found.index.count == 9000
    assert {one.items for one in found.table} == {1000, 4000, 9000}
    whole = {one.spec.factory for one in found.table if one.items == 9000}
    assert not any(factory.startswith("HNSW") for factory in whole)
    assert "Flat" in whole  # the way out if the promising miss
    assert lines[-1].startswith("chosen: IVF")


def test_a_limit_on_bytes_leaves_out_what_is_larger(stopped_clock: dict[str, float]) -> None:
    stopped_clock |= {"HNSW": 1.0, "IVF128,PQ": 2.0}
    vectors, queries = clustered(5000, 60)
    found = choose_index(vectors, queries, AutoIndex(recall=0.5, depth=10, max_bytes=4 * 16 * 5000))
    assert found.spec.factory.startswith("IVF128,PQ")
    with pytest.raises(ConfigError, match="none over 5000 items of width 16 fits into 1000 bytes; the smallest"):
        choose_index(vectors, queries, AutoIndex(max_bytes=1000))


def test_a_small_catalogue_is_searched_exactly_by_a_real_clock() -> None:
    vectors, queries = clustered(50, 4)
    found = choose_index(vectors, queries, AutoIndex())
    assert found.spec == IndexSpec()
    assert found.recall == 1.0
    assert found.table[0].batch_us > 0
    assert isinstance(found.table[0], Measured)


def test_what_cannot_be_chosen_from_is_refused() -> None:
    vectors, queries = clustered(50, 4)
    with pytest.raises(ConfigError, match="1 users' embeddings are too few"):
        choose_index(vectors, queries[:1], AutoIndex())
    vectors[3, 0] = np.nan
    with pytest.raises(InputError, match="not finite, the first at row 3"):
        choose_index(vectors, queries, AutoIndex())
