"""Histories out of a dataset folder: read-only, as of the night when it was ingested."""

from pathlib import Path

import numpy as np

from retrieval.data.dataset import Dataset
from retrieval.histories.store import StoredHistory

__all__ = ["DatasetHistories"]


class DatasetHistories:
    """The users of a dataset folder. Memory-mapped: opening is instant, a lookup touches one user's pages.

    Items are answered as ids, not rows, so that the store and the live snapshot may come from different nights.

    Args:
        dataset: the folder.

    Raises:
        DataError: the folder holds no dataset.
    """

    def __init__(self, dataset: Path) -> None:
        self._dataset = Dataset(dataset)
        self._actions = np.array([action.value for action in self._dataset.info.actions], object)

    def get(self, user_id: int | str) -> StoredHistory | None:
        """A user's events, or None for a user that is not in the dataset."""
        ids: list[int] | list[str] = [user_id]  # type: ignore[assignment]
        user = int(self._dataset.users_named(ids)[0])
        if user < 0:
            return None
        events = slice(int(self._dataset.offsets[user]), int(self._dataset.offsets[user + 1]))
        stored = self._dataset.events
        return StoredHistory(
            items=self._dataset.vocabulary.ids_of(stored.items[events].astype(np.int64)),
            actions=self._actions[stored.actions[events]].tolist(),
            timestamps=stored.timestamps[events].astype(np.int64),
        )
