"""Offline evaluation of an encoder: exactly, through an index, and beside what popularity alone reaches."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.splits import Queries, Split, SplitInfo, training_counts
from retrieval.evaluation.baselines import Scorer
from retrieval.evaluation.metrics import Estimate, evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores, rank_by_search
from retrieval.index.searcher import Searcher
from retrieval.types import JaggedBatch

__all__ = ["KS", "Report", "ReportRow", "evaluate", "mean_ndcg"]

KS = (10, 50, 200)


class ReportRow(Config):
    """One ranker's results: `metrics` by name, e.g. `recall@10`."""

    ranker: str
    metrics: dict[str, Estimate]


class Report(Config):
    """What was measured, on what.

    Attributes:
        dataset: fingerprint of the dataset.
        split: the protocol and its moment.
        tie_order: what orders events of equal time; it decides targets.
        positive: actions whose events may be asked for; others are only read.
        queries: users that were asked about.
        candidates: items ranked for each of them, their history aside.
        unseen_targets: share of the items to find that have no training event.
        rows: results.
        tables: rows of the tables that were learned, by name.
    """

    dataset: str
    split: SplitInfo
    tie_order: str
    positive: tuple[str, ...]
    queries: int
    candidates: int
    unseen_targets: float
    rows: tuple[ReportRow, ...]
    tables: dict[str, int] = Field(default_factory=dict)

    def row(self, ranker: str) -> ReportRow:
        """Results of the ranker of that name."""
        return next(row for row in self.rows if row.ranker == ranker)


def evaluate(
    dataset: Dataset,
    split: Split,
    embed: Callable[[JaggedBatch], NDArray[np.float32]],
    item_vectors: NDArray[np.float32],
    max_length: int,
    *,
    name: str = "HSTU",
    baselines: Mapping[str, Scorer] | None = None,
    searcher: Searcher | None = None,
    ks: Sequence[int] = KS,
    on_queries: Callable[[int, int], None] | None = None,
) -> Report:
    """Rank the held-out item of every query among the whole catalogue.

    Args:
        dataset: the events.
        split: what is asked for, and what the encoder was trained on.
        embed: histories → user embeddings `[B, D]`.
        item_vectors: item embeddings `[N, D]`, in the vocabulary's order.
        max_length: most recent events that `embed` may be given.
        name: of the encoder, for its rows.
        baselines: also evaluate these, by name.
        searcher: also evaluate this index.
        ks: depths of recall and NDCG.
        on_queries: called with the number of queries done and in all.
    """
    counts = training_counts(dataset, split)
    num_items = len(item_vectors)
    scorers: dict[str, Scorer] = {"popularity": partial(_constant, counts), **(baselines or {})}
    through = f"{name} through the index"
    names = [name, *([through] if searcher is not None else []), *scorers]
    ranks = {ranker: np.empty(len(split.test), np.int64) for ranker in names}
    for batch in query_batches(dataset, split.test, max_length):
        users = embed(batch.histories)
        ranks[name][batch.place] = rank_by_scores(batch, num_items, _inner_products(users, item_vectors))
        if searcher is not None:
            ranks[through][batch.place] = rank_by_search(batch, users, searcher, max(ks))
        for ranker, score in scorers.items():
            ranks[ranker][batch.place] = rank_by_scores(batch, num_items, _of_histories(score, batch.histories))
        if on_queries is not None:
            on_queries(batch.place.stop, len(split.test))
    return Report(
        dataset=dataset.info.fingerprint,
        split=split.info,
        tie_order=dataset.info.tie_order,
        positive=tuple(action.value for action in dataset.info.actions if action.positive),
        queries=len(split.test),
        candidates=num_items,
        unseen_targets=float(np.mean(counts[dataset.events.items[split.test.targets]] == 0)),
        rows=tuple(ReportRow(ranker=name, metrics=evaluate_ranks(found, ks)) for name, found in ranks.items()),
    )


def mean_ndcg(
    dataset: Dataset,
    queries: Queries,
    embed: Callable[[JaggedBatch], NDArray[np.float32]],
    item_vectors: NDArray[np.float32],
    max_length: int,
    *,
    k: int = 10,
) -> float:
    """NDCG@k of an encoder alone, exactly ranked: what a checkpoint may be chosen by. Arguments as `evaluate`'s."""
    total = 0.0
    for batch in query_batches(dataset, queries, max_length):
        ranks = rank_by_scores(batch, len(item_vectors), _inner_products(embed(batch.histories), item_vectors))
        total += float(((ranks <= k) / np.log2(ranks + 1.0)).sum())
    return total / len(queries)


def _inner_products(users: NDArray[np.float32], items: NDArray[np.float32]) -> Callable[[slice], NDArray[np.float32]]:
    return lambda part: users[part] @ items.T


def _constant(counts: NDArray[np.int64], histories: JaggedBatch) -> NDArray[np.float32]:
    return np.tile(counts.astype(np.float32), (len(histories), 1))


def _of_histories(score: Scorer, histories: JaggedBatch) -> Callable[[slice], NDArray[np.float32]]:
    return lambda part: score(histories[part])
