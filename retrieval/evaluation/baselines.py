"""Rankers without a model: what a learned one must beat."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from retrieval.data.dataset import Dataset
from retrieval.data.splits import Split
from retrieval.types import JaggedBatch

__all__ = ["ItemKNN", "Scorer"]

Scorer = Callable[[JaggedBatch], NDArray[np.float32]]
"""Histories → scores of all items, float32 `[B, N]`, the caller's to overwrite."""

_ITEMS_AT_ONCE = 1024


class ItemKNN:
    """Item-based nearest neighbours (Sarwar et al., WWW 2001; Deshpande, Karypis, TOIS 2004).

        sim(i, j) = c_ij / (√(c_i c_j) + shrinkage),   score(u, j) = Σ_{i in the last items of u} sim(i, j)

    with c_ij the users that have both items among their training events and c_i those that have item i. Each item keeps
    its `neighbours` most similar ones.

    Args:
        dataset: the events.
        split: which of them train.
        neighbours: kept per item.
        shrinkage: pulls down similarities that rest on few users.
        last: most recent items of a history that count.
    """

    def __init__(
        self, dataset: Dataset, split: Split, *, neighbours: int = 100, shrinkage: float = 10.0, last: int = 20
    ) -> None:
        self._last = last
        lengths = split.train_ends - dataset.offsets[:-1]
        index = np.arange(lengths.sum()) + np.repeat(dataset.offsets[:-1] - (np.cumsum(lengths) - lengths), lengths)
        users, items = np.repeat(np.arange(len(dataset)), lengths), dataset.events.items[index]
        shape = (len(dataset), len(dataset.vocabulary))
        seen = sparse.csc_matrix((np.ones(len(items), np.float32), (users, items)), shape)
        seen.data[:] = 1.0  # a user counts once, whatever it repeats
        counts = np.asarray(seen.sum(axis=0)).ravel()
        # A block of items at a time: the whole of c_ij may not fit into memory.
        blocks = [
            _most_similar(seen, slice(begin, begin + _ITEMS_AT_ONCE), counts, neighbours, shrinkage)
            for begin in range(0, shape[1], _ITEMS_AT_ONCE)
        ]
        self._similar = sparse.vstack(blocks, format="csr")

    def __call__(self, histories: JaggedBatch) -> NDArray[np.float32]:
        """Scores of all items, float32 `[B, N]`."""
        rows = np.repeat(np.arange(len(histories)), histories.lengths)
        ahead = np.concatenate([np.zeros(1, np.int64), np.cumsum(histories.main)])
        from_end = ahead[histories.offsets[1:]][rows] - ahead[:-1]
        recent = histories.main & (from_end <= self._last)
        shape = (len(histories), self._similar.shape[0])
        ones = np.ones(int(recent.sum()), np.float32)
        read = sparse.csr_matrix((ones, (rows[recent], histories.items[recent])), shape)
        scores: NDArray[np.float32] = (read @ self._similar).toarray()
        return scores


def _most_similar(
    seen: sparse.csc_matrix, block: slice, counts: NDArray[np.float32], neighbours: int, shrinkage: float
) -> sparse.csr_matrix:
    """Rows of the similarity matrix for a block of items, each with its greatest entries only."""
    together = (seen[:, block].T @ seen).tocoo()
    rows, columns = together.row, together.col
    similar = together.data / (np.sqrt(counts[block][rows] * counts[columns]) + shrinkage)
    similar[columns == rows + block.start] = 0  # an item is no neighbour of its own
    order = np.lexsort((-similar, rows))
    begins = np.searchsorted(rows[order], np.arange(together.shape[0]))
    kept = order[np.arange(len(order)) - begins[rows[order]] < neighbours]
    return sparse.csr_matrix((similar[kept].astype(np.float32), (rows[kept], columns[kept])), together.shape)
