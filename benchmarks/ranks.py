"""Ranks of held-out items under an encoder, and how a study writes them: what the studies of features share."""

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.splits import Queries
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.gates import paired_difference
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores

__all__ = ["columns_of", "ranks_of"]


def ranks_of(
    dataset: Dataset, queries: Queries, encoder: UserEncoder, actions: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Exact rank of each query's target among the whole catalogue, int64 `[Q]`.

    Args:
        dataset: the events.
        queries: what is asked for.
        encoder: in evaluation mode.
        actions: code of the action for which each query asks, int64 `[Q]`; None for any.
    """
    vectors = item_vectors(encoder)
    ranks = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, encoder.config.max_length):
        histories = batch.histories
        if actions is not None:
            assert histories.query_actions is not None
            asked = histories.query_actions.copy()
            asked[histories.offsets[1:] - 1] = actions[batch.place]
            histories = replace(histories, query_actions=asked)
        users = embed_users(encoder, histories)
        ranks[batch.place] = rank_by_scores(batch, len(vectors), partial(_scores, users, vectors))
    return ranks


def columns_of(ranks: NDArray[np.int64], base: NDArray[np.int64], ks: tuple[int, ...]) -> dict[str, object]:
    """Recall at each depth and its difference to other ranks of the same queries, each with its 95% interval."""
    found = evaluate_ranks(ranks, ks)
    row: dict[str, object] = {}
    for k in ks:
        one = found[f"recall@{k}"]
        row[f"recall@{k}"] = f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"
        difference = paired_difference((ranks <= k).astype(float), (base <= k).astype(float))
        row[f"difference@{k}"] = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    return row


def _scores(users: NDArray[np.float32], vectors: NDArray[np.float32], part: slice) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = users[part] @ vectors.T
    return scores
