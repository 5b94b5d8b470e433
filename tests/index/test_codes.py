"""8-bit codes lose nothing: every answer is that of scoring all vectors, on every path of the compiled search."""

import ctypes

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.errors import ConfigError
from retrieval.index import codes, codes_backend
from retrieval.index.codes import HEADERS, SOURCES, Codes, library
from retrieval.index.codes_backend import CodesBackend
from retrieval.index.lists import REACH, Lists, build_lists, radii
from retrieval.index.spec import IndexSpec
from retrieval.native import compiled


@pytest.fixture(scope="module", params=["wide", "portable"])
def native(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """As built for this processor, and as built for one without its instructions."""
    portable = ("-DRETRIEVAL_PORTABLE", "-O1")
    found = library() if request.param == "wide" else compiled("codes-portable", SOURCES, "", portable, HEADERS)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def unit(x: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30), np.float32)


def assert_exact(
    codes: Codes, vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int, mask: NDArray[np.bool_] | None
) -> None:
    allowed = None if mask is None else np.packbits(mask, bitorder="little")
    found = codes.search(queries, k, allowed=allowed)
    truth = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    rows = np.arange(len(vectors)) if mask is None else np.flatnonzero(mask)
    wanted = min(k, len(rows))
    for b in range(len(queries)):
        got = found.rows[b, :wanted]
        assert len(set(got.tolist())) == wanted
        assert np.isin(got, rows).all()
        assert (found.rows[b, wanted:] == -1).all()
        assert np.isneginf(found.scores[b, wanted:]).all()
        np.testing.assert_allclose(found.scores[b, :wanted], truth[b, got], atol=2e-6)
        np.testing.assert_allclose(found.scores[b, :wanted], np.sort(truth[b, rows])[::-1][:wanted], atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 80) | st.integers(500, 3000),
    width=st.sampled_from([1, 3, 8, 17, 50, 64, 130]),
    k=st.sampled_from([1, 2, 100, 700]),
    batch=st.integers(1, 70),
    share=st.sampled_from([None, None, 0.0, 0.01, 0.5]),
    kind=st.sampled_from(["unit", "unit", "copies", "outlier", "zero"]),
)
def test_the_answers_are_those_of_scoring_everything(
    native: ctypes.CDLL, seed: int, count: int, width: int, k: int, batch: int, share: float | None, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    raw, asked = rng.normal(size=(count, width)), rng.normal(size=(batch, width))
    if kind == "outlier":
        raw[:, 0] *= 100
    vectors, queries = unit(raw), unit(asked)
    if kind == "copies":
        vectors[rng.integers(0, count, count // 2)] = vectors[0]
    if kind == "zero":
        vectors[: count // 2] = 0
        queries[0] = 0
    mask = None if share is None else rng.random(count) < share
    assert_exact(Codes(native, vectors), vectors, queries, k, mask)


def portable() -> ctypes.CDLL:
    found = compiled("codes-portable", SOURCES, "", ("-DRETRIEVAL_PORTABLE", "-O1"), HEADERS)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.mark.parametrize("width", [12, 50, 64, 130])
@pytest.mark.parametrize("lists", [0, 6])
def test_every_instruction_set_gives_the_same_answers(width: int, lists: int) -> None:
    native = library()
    if native is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(width)
    vectors, queries = unit(rng.normal(size=(9001, width))), unit(rng.normal(size=(45, width)))
    vectors[5000:5040] = vectors[0]
    some = np.packbits(rng.random(9001) < 0.4, bitorder="little")
    around = build_lists(vectors, lists) if lists else None
    parts = (around.centres, around.counts, around.order) if around is not None else ()
    wide, plain = Codes(native, vectors, *parts), Codes(portable(), vectors, *parts)
    for batch in (1, 5, 13, 45):  # one by one, by fours, in part of a tile of 16, in several
        for allowed in (None, some):
            mine, theirs = (one.search(queries[:batch], 100, 3, allowed) for one in (wide, plain))
            np.testing.assert_array_equal(mine.rows, theirs.rows)
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-6)


def test_a_threshold_that_was_guessed_too_high_loses_nothing(
    native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seventeen items are like the queries, and all of them stand where the guess is made from.
    rng = np.random.default_rng(8)
    vectors, queries = unit(rng.normal(size=(80_000, 16))), unit(rng.normal(size=(6, 16)))
    near = queries[0] + 0.01 * rng.normal(size=(17, 16))
    vectors[np.arange(17) * 9 * 512] = unit(near)
    monkeypatch.setattr(codes, "_WORTH_A_THREAD", 1)
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 9):  # in all items, and in the ninth of them that a thread searches for all queries
            faiss.omp_set_num_threads(threads)
            for k in (10, 100):
                assert_exact(Codes(native, vectors), vectors, queries, k, None)
                assert_exact(Codes(native, vectors), vectors, queries[:1].repeat(20, axis=0), k, None)
    finally:
        faiss.omp_set_num_threads(before)


def test_more_equal_scores_than_fit_are_told_apart_by_row(native: ctypes.CDLL) -> None:
    count = 120_000
    vectors = np.zeros((count, 4), np.float32)
    vectors[:, 0] = 1
    vectors[77_777] = [0.6, 0.8, 0, 0]
    found = Codes(native, vectors).search(np.array([[0.6, 0.8, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32), 5)
    assert found.rows.tolist() == [[77_777, 0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    np.testing.assert_allclose(found.scores[0], [1, 0.6, 0.6, 0.6, 0.6], atol=1e-6)


def test_a_query_that_is_not_finite_finds_nothing(native: ctypes.CDLL) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(100, 8)))
    queries = vectors[:3].copy()
    queries[1, 2], queries[2, 0] = np.nan, np.inf
    found = Codes(native, vectors).search(queries, 4)
    assert found.rows[0, 0] == 0
    assert (found.rows[1:] == -1).all()


def test_neither_threads_nor_batch_mates_change_an_answer(native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_WORTH_A_THREAD", 1)
    rng = np.random.default_rng(1)
    vectors, queries = unit(rng.normal(size=(5000, 24))), unit(rng.normal(size=(30, 24)))
    vectors[100:2000] = vectors[100]
    lists = build_lists(vectors, 16)
    before = faiss.omp_get_max_threads()
    for over in (Codes(native, vectors), Codes(native, vectors, lists.centres, lists.counts, lists.order)):
        answers = []
        try:
            for threads in (1, 2, 5):
                faiss.omp_set_num_threads(threads)
                answers.append(over.search(queries, 150, 5))
                alone = [over.search(queries[b : b + 1], 150, 5) for b in range(30)]
                assert np.array_equal(np.concatenate([one.rows for one in alone]), answers[0].rows)
                assert np.array_equal(np.concatenate([one.scores for one in alone]), answers[0].scores)
        finally:
            faiss.omp_set_num_threads(before)
        for other in answers[1:]:
            assert np.array_equal(other.rows, answers[0].rows)
            assert np.array_equal(other.scores, answers[0].scores)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Int8"])
def test_without_a_compiler_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    rng = np.random.default_rng(2)
    vectors, queries = unit(rng.normal(size=(2000, 20))), unit(rng.normal(size=(12, 20)))
    lists = None if factory == "Flat" else build_lists(vectors, 16)
    spec = IndexSpec(factory=factory, search={} if lists is None else {"nprobe": 3})
    compiled_ = CodesBackend(vectors, spec, lists)
    monkeypatch.setattr(codes_backend, "library", lambda: None)
    plain = CodesBackend(vectors, spec, lists)
    some = np.packbits(rng.random(2000) < 0.3, bitorder="little")
    for allowed in (None, some, np.zeros(250, np.uint8)):
        for effort in (1.0, 2.5):
            mine = compiled_.search(queries, 40, allowed=allowed, effort=effort)
            theirs = plain.search(queries, 40, allowed=allowed, effort=effort)
            np.testing.assert_array_equal(mine.rows, theirs.rows)
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_of_lists_whose_centres_are_alike_the_wider_is_looked_into(
    monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setattr(codes_backend, "library", lambda: None)
    centres = np.array([[0.5, 0.0], [0.5, 0.0], [0.45, 0.0]], np.float32)
    vectors = np.array([[0.5, 0.1], [0.5, -0.1], [0.9, 0.2], [0.1, -0.2], [0.45, 0.0]], np.float32)
    lists = Lists(centres, np.array([2, 2, 1]), np.arange(5))
    np.testing.assert_allclose(radii(lists, vectors), [0.1, np.hypot(0.4, 0.2), 0], atol=1e-6)
    index = CodesBackend(vectors, IndexSpec(factory="IVF3,Int8", search={"nprobe": 1}), lists)
    assert index.search(np.array([[2, 0]], np.float32), 5).rows.tolist() == [[2, 3, -1, -1, -1]]


def test_compiled_codes_know_how_far_lists_reach(native: ctypes.CDLL) -> None:
    vectors = unit(np.random.default_rng(9).normal(size=(1000, 20)))
    lists = build_lists(vectors, 7)
    made = Codes(native, vectors, lists.centres, lists.counts, lists.order)
    centres = made._held[-1]
    assert centres is not None
    np.testing.assert_allclose(centres[20, :7], REACH * radii(lists, vectors), rtol=1e-5)


def test_looking_into_every_list_is_exact() -> None:
    rng = np.random.default_rng(3)
    vectors, queries = unit(rng.normal(size=(900, 12))), unit(rng.normal(size=(5, 12)))
    index = CodesBackend(vectors, IndexSpec(factory="IVF30,Int8"), build_lists(vectors, 30))
    exact = CodesBackend(vectors, IndexSpec()).search(queries, 900)
    found = index.tuned({"nprobe": 30}).search(queries, 900)
    np.testing.assert_array_equal(found.rows, exact.rows)
    few = index.search(queries, 900)
    assert ((few.rows >= 0).sum(axis=1) < 300).all()


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"efSearch": 4}, "takes no parameter efSearch=4"),
        ({"nprobe": 0}, "nprobe=0 is not a whole number of lists"),
        ({"nprobe": 1.5}, "nprobe=1.5 is not"),
    ],
)
def test_search_parameters_that_mean_nothing_are_refused(search: dict[str, float], sentence: str) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 8)))
    with pytest.raises(ConfigError, match=sentence):
        CodesBackend(vectors, IndexSpec(factory="IVF2,Int8", search=search), build_lists(vectors, 2))


def test_threads_make_the_same_codes(native: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "_ENCODED_BY_A_THREAD", 1)
    vectors = unit(np.random.default_rng(4).normal(size=(3000, 20)))
    lists = build_lists(vectors, 16)
    made = []
    for threads in (1, 2, 7, 64):
        monkeypatch.setattr(faiss, "omp_get_max_threads", lambda threads=threads: threads)
        made.append((Codes(native, vectors), Codes(native, vectors, lists.centres, lists.counts, lists.order)))
    for others in made[1:]:
        for one, other in zip(made[0], others, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(one._held[2:4], other._held[2:4], strict=True))
            assert (one._problem.error, one._problem.norm) == (other._problem.error, other._problem.norm)


@pytest.mark.parametrize("size", [1e-37, 1e-42, 1e30])
def test_very_small_and_very_large_vectors_are_found(native: ctypes.CDLL, size: float) -> None:
    vectors = (np.random.default_rng(5).normal(size=(200, 8)) * size).astype(np.float32)
    queries = unit(np.random.default_rng(6).normal(size=(3, 8)))
    found = Codes(native, vectors).search(queries, 5)
    truth = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    np.testing.assert_allclose(found.scores, np.sort(truth, axis=1)[:, ::-1][:, :5], atol=2e-6 * size + 1e-44)
