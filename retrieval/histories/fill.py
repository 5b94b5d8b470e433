"""From a dataset to a store of histories, a few users at a time."""

from collections.abc import Callable, Iterator

import numpy as np

from retrieval.data.dataset import Dataset
from retrieval.histories.beside import Beside
from retrieval.histories.codec import Columns
from retrieval.histories.recorded import RecordedHistories
from retrieval.histories.store import Series

__all__ = ["fill_histories"]

# Users of one durable write. A server that records events in the same store waits for it.
_TOGETHER = 1024


def fill_histories(
    dataset: Dataset, store: RecordedHistories, on_progress: Callable[[int, int], object] = lambda *_: None
) -> None:
    """Add the events of a dataset's users, their context and auxiliary series.

    What the store has already, filled or recorded, is not added again. Context is taken to be so at the time of the
    dataset's last event.

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
    now = int(dataset.events.timestamps[dataset.offsets[1:] - 1].max())
    for start in range(0, len(dataset), _TOGETHER):
        end = min(start + _TOGETHER, len(dataset))
        offsets = dataset.offsets[start : end + 1]
        events = slice(int(offsets[0]), int(offsets[-1]))
        items = dataset.vocabulary.ids_of(dataset.events.items[events].astype(np.int64))
        integers = None if dataset.vocabulary.has_string_ids else np.array(items, np.int64)
        actions, timestamps = dataset.events.actions[events], dataset.events.timestamps[events].astype(np.int64)
        histories = {}
        bounds = (offsets[:-1] - events.start, offsets[1:] - events.start)
        users = dataset.user_ids[start:end].to_pylist()
        for user, first, last, told in zip(users, *bounds, _beside(dataset, start, end, now), strict=True):
            used, codes = np.unique(actions[first:last], return_inverse=True)
            histories[user] = Columns(
                timestamps=timestamps[first:last],
                items=[str(item) for item in items[first:last]] if integers is None else integers[first:last],
                names=names[used].tolist(),
                codes=codes.astype(np.uint16),
                digests=np.zeros(last - first, np.uint64),
                beside=told,
            )
        store.fill(histories)
        on_progress(end, len(dataset))


def _beside(dataset: Dataset, start: int, end: int, now: int) -> Iterator[Beside]:
    """What is known of each of some users beside events.

    Values without a row of their own have lost their text: of context they are left out, and in a series they are "",
    which ends a run as they do.
    """
    users = np.arange(start, end)
    side = dataset.side(users, dataset.offsets[users + 1])
    if side is None:
        yield from [Beside()] * len(users)
        return
    kinds = dataset.info.kinds
    texts = [["", *kind.values] for kind in kinds]
    width = side.context.shape[1]
    for row, (first, last) in enumerate(zip(side.starts.tolist(), side.ends.tolist(), strict=True)):
        context = {kinds[at].name: (now, texts[at][code]) for at, code in enumerate(side.context[row].tolist()) if code}
        series = {}
        of_kinds, values, times = (one[first:last] for one in (side.kinds, side.values, side.timestamps))
        for at in range(width, len(kinds)):
            told = of_kinds == at + 1
            if told.any():
                points = zip(times[told].tolist(), values[told].tolist(), strict=True)
                series[kinds[at].name] = Series.of((time, texts[at][code]) for time, code in points)
        yield Beside(context=context, series=series)
