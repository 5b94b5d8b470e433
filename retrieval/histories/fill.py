"""From a dataset to a store of histories, a few users at a time."""

from collections.abc import Callable

import numpy as np

from retrieval.data.dataset import Dataset
from retrieval.histories.codec import Columns
from retrieval.histories.recorded import RecordedHistories

__all__ = ["fill_histories"]

# Users of one durable write. A server that records events in the same store waits for it.
_TOGETHER = 1024


def fill_histories(
    dataset: Dataset, store: RecordedHistories, on_progress: Callable[[int, int], object] = lambda *_: None
) -> None:
    """Add the events of a dataset's users. Events that the store has already, filled or recorded, are not added again.

    May be repeated, broken off and run again, and run while a server records events in the same store.

    Args:
        dataset: memory-mapped; no more than a few users' events are held at a time.
        store: the store.
        on_progress: called with the users that are done and all users.

    Raises:
        InputError: a user's id is longer than a store takes.
        HistoryStoreError: the store cannot be written.
    """
    names = np.array([action.value for action in dataset.info.actions], object)
    for start in range(0, len(dataset), _TOGETHER):
        end = min(start + _TOGETHER, len(dataset))
        offsets = dataset.offsets[start : end + 1]
        events = slice(int(offsets[0]), int(offsets[-1]))
        items = dataset.vocabulary.ids_of(dataset.events.items[events].astype(np.int64))
        integers = None if dataset.vocabulary.has_string_ids else np.array(items, np.int64)
        actions, timestamps = dataset.events.actions[events], dataset.events.timestamps[events].astype(np.int64)
        histories = {}
        for user, first, last in zip(
            dataset.user_ids[start:end].to_pylist(), offsets - events.start, offsets[1:] - events.start, strict=False
        ):
            used, codes = np.unique(actions[first:last], return_inverse=True)
            histories[user] = Columns(
                timestamps=timestamps[first:last],
                items=[str(item) for item in items[first:last]] if integers is None else integers[first:last],
                names=names[used].tolist(),
                codes=codes.astype(np.uint16),
                digests=np.zeros(last - first, np.uint64),
            )
        store.fill(histories)
        on_progress(end, len(dataset))
