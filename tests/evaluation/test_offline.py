from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.evaluation.ann import ann_recall
from retrieval.evaluation.offline import evaluate
from retrieval.evaluation.plot import plot_recall
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.index.builder import build_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec
from retrieval.types import JaggedBatch
from tests.support import Event, cyclic_histories, write_dataset

HISTORIES: list[list[Event]] = [
    [(0, 1, 1), (1, 1, 2), (2, 1, 3)],  # asks for 2, hides 0 and 1
    [(2, 1, 1), (2, 1, 2), (3, 1, 3)],  # asks for 3, hides 2
    [(4, 1, 1), (5, 1, 2), (4, 1, 3)],  # asks for 4 again: the target is never hidden
]


def test_ranks_of_a_hand_computed_table(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", HISTORIES, range(6))
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    (batch,) = query_batches(dataset, split.test, max_length=10)
    assert [rows.tolist() for rows in batch.seen] == [[0, 1], [2], [5]]
    scores = np.array(
        [
            [9, 9, 5, 6, 1, 0],  # without 0 and 1: 3 is better than 2, rank 2
            [5, 5, 9, 5, 1, 0],  # 0 and 1 tie with 3: pessimistic, rank 3
            [0, 0, 0, 0, 7, 8],  # 5 is hidden, rank 1
        ],
        np.float32,
    )
    assert rank_by_scores(batch, 6, lambda part: scores[part].copy()).tolist() == [2, 3, 1]


def test_paper_hides_only_what_the_encoder_reads(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [*HISTORIES, [(0, 1, t) for t in range(4)]], range(6))
    for protocol, hidden in (("paper", [[1], [2], [5], []]), ("stable", [[0, 1], [2], [5], []])):
        split = split_dataset(dataset, SplitInfo.parse({"protocol": protocol}, "test"))
        (batch,) = query_batches(dataset, split.test, max_length=1)
        assert [rows.tolist() for rows in batch.seen] == hidden


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    histories = cyclic_histories(users=2000, items=100, length=6)
    return write_dataset(tmp_path_factory.mktemp("world") / "d", histories, range(100))


def oracle(batch: JaggedBatch) -> NDArray[np.float32]:
    """Knows that the next item is the last one plus one."""
    return np.eye(100, dtype=np.float32)[(batch.items[batch.offsets[1:] - 1] + 1) % 100]


def test_an_oracle_is_found_perfect_exactly_and_through_an_index(world: Dataset) -> None:
    split = split_dataset(world, SplitInfo(protocol="paper"))
    items = np.eye(100, dtype=np.float32)
    searcher = Searcher(build_index(items, IndexSpec()), np.arange(100))
    report = evaluate(world, split, oracle, items, 50, searcher=searcher, ks=(1, 10))
    for ranker in ("HSTU", "HSTU through the index"):
        assert report.row(ranker).metrics["recall@1"].mean == 1
        assert report.row(ranker).metrics["mrr"].mean == 1
    assert report.row("popularity").metrics["recall@10"].mean < 0.5
    assert report.unseen_targets == 0
    assert report.positive == ("like",)


def test_a_random_model_finds_k_of_n(world: Dataset) -> None:
    """Five of 100 items are hidden, so a random model's recall@K is K / 95, to 5 standard errors."""
    torch.manual_seed(3)
    encoder = HSTUEncoder(HSTUConfig(num_items=100, max_length=50, width=32)).eval()
    rng = np.random.default_rng(0)

    def guess(batch: JaggedBatch) -> NDArray[np.float32]:
        return rng.normal(size=(len(batch), 32)).astype(np.float32)

    split = split_dataset(world, SplitInfo(protocol="paper"))
    report = evaluate(world, split, guess, item_vectors(encoder), 50, ks=(10, 50))
    for k in (10, 50):
        expected = k / 95
        error = (expected * (1 - expected) / 2000) ** 0.5
        assert report.row("HSTU").metrics[f"recall@{k}"].mean == pytest.approx(expected, abs=5 * error)


def test_through_an_exact_index_ranks_equal_exact_ranks(world: Dataset) -> None:
    torch.manual_seed(4)
    encoder = HSTUEncoder(HSTUConfig(num_items=100, max_length=50, width=32)).eval()
    vectors = item_vectors(encoder)
    searcher = Searcher(build_index(vectors, IndexSpec()), np.arange(100))
    split = split_dataset(world, SplitInfo(protocol="paper"))
    report = evaluate(world, split, partial(embed_users, encoder), vectors, 50, searcher=searcher, ks=(10, 50))
    exact, indexed = report.row("HSTU").metrics, report.row("HSTU through the index").metrics
    for metric in ("recall@10", "recall@50", "ndcg@50"):
        assert exact[metric].mean == pytest.approx(indexed[metric].mean, abs=1e-12)


def test_recall_of_an_index_counts_what_it_misses() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    recalls = []
    for probes in (1, 4, 32):
        spec = IndexSpec(factory="IVF32,Flat", search={"nprobe": probes})
        searcher = Searcher(build_index(vectors, spec), np.arange(2000))
        recalls.append(ann_recall(searcher, vectors, vectors[:50], k=10))
    assert recalls[0] < recalls[1] < recalls[2] == 1.0


def test_a_plot_is_a_picture(world: Dataset, tmp_path: Path) -> None:
    split = split_dataset(world, SplitInfo(protocol="paper"))
    report = evaluate(world, split, oracle, np.eye(100, dtype=np.float32), 50, ks=(1, 10))
    plot_recall(report, tmp_path / "plot.png", title="test", ks=(1, 10), possible={1: 1.0, 10: 1.0})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
