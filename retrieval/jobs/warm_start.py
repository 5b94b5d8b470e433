"""Last night's weights for tonight's catalogue, and last night's model asked tonight's questions.

Rows of items and actions follow their ids and names, whatever rows they have tonight.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.data.dataset import Dataset
from retrieval.data.sequences import gather_histories
from retrieval.data.splits import Queries
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.errors import ConfigError
from retrieval.snapshot.store import Snapshot
from retrieval.types import EventColumns, JaggedBatch

__all__ = ["carried_over", "live_histories", "live_ranks", "live_rows"]

_ITEMS, _ACTIONS = "item_embedding.weight", "action_embedding.weight"
_QUERIES_AT_ONCE = 256


def live_rows(dataset: Dataset, live: Snapshot) -> NDArray[np.int64]:
    """Row in the live snapshot of each of the dataset's items, −1 for new ones: int64 `[N]`."""
    return live.vocabulary.rows_of(dataset.vocabulary.ids_of(np.arange(len(dataset.vocabulary))))


def carried_over(config: EncoderConfig, dataset: Dataset, live: Snapshot) -> dict[str, Tensor]:
    """State of an encoder of this shape that starts from the live one's.

    A new item starts from the mean of the known ones: near what an untrained model would say of it, and in no user's
    way. A new action starts without effect.

    Args:
        config: tonight's encoder.
        dataset: tonight's events.
        live: the live snapshot.

    Raises:
        ConfigError: the live encoder is of another shape.
    """
    before = live.info.encoder
    if before.model_copy(update={"num_items": config.num_items, "num_actions": config.num_actions}) != config:
        raise ConfigError(
            f"{live.version}: its encoder has another shape than the one asked for; ask for that, or start from scratch"
        )
    old, new = live.encoder.state_dict(), build_encoder(config).state_dict()
    for name, weights in new.items():
        if name == _ITEMS:
            rows = torch.from_numpy(live_rows(dataset, live))
            weights[:] = old[name].mean(0)
            weights[rows >= 0] = old[name][rows[rows >= 0]]
        elif name == _ACTIONS:
            weights.zero_()
            if name in old:
                codes = _live_codes(dataset, live)
                weights[codes >= 0] = old[name][codes[codes >= 0]]
        else:
            weights.copy_(old[name])
    return new


def _live_codes(dataset: Dataset, live: Snapshot) -> NDArray[np.int64]:
    """Code in the live snapshot of each of the dataset's actions, −1 for new ones: int64 `[A]`."""
    known = {value: code for code, value in enumerate(live.info.actions)}
    return np.array([known.get(action.value, -1) for action in dataset.info.actions], np.int64)


def live_histories(
    dataset: Dataset,
    live: Snapshot,
    users: NDArray[np.int64],
    ends: NDArray[np.int64],
    times: NDArray[np.int64],
) -> tuple[JaggedBatch, NDArray[np.int64]]:
    """What the live encoder reads of some histories: as in service, events of items that it does not know are left out.

    Args:
        dataset: tonight's events.
        live: the live snapshot.
        users: whose histories, int64 `[Q]`.
        ends: event before which each of them ends, int64 `[Q]`.
        times: time of each request, int64 `[Q]`.

    Returns:
        Encoder input of those of whom something is left, and which of the users these are.
    """
    rows, codes = live_rows(dataset, live), np.maximum(_live_codes(dataset, live), 0)
    items = rows[dataset.events.items]
    known = items >= 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(known)])
    events = EventColumns(
        items=items[known],
        actions=codes[dataset.events.actions[known]].astype(np.uint8),
        timestamps=dataset.events.timestamps[known],
    )
    begins, ends = before[dataset.offsets[users]], before[ends]
    filled = np.flatnonzero(ends > begins)
    max_length = live.info.encoder.max_length
    return gather_histories(events, begins[filled], ends[filled], times[filled], max_length), filled


def live_ranks(dataset: Dataset, queries: Queries, live: Snapshot) -> NDArray[np.int64]:
    """Rank of each query's target in the live snapshot, by exact search, int64 `[Q]`.

    As in service: a user of whom it knows nothing gets the most popular items. A target that it does not know is not
    found (rank N + 1).
    """
    rows = live_rows(dataset, live)
    vectors, num_items = item_vectors(live.encoder), len(live.vocabulary)
    ranks = np.full(len(queries), num_items + 1, np.int64)
    counts = live.vocabulary.attributes["popularity"].to_numpy().astype(np.float32)
    targets = rows[dataset.events.items[queries.targets]]
    times = dataset.events.timestamps[queries.targets].astype(np.int64)
    histories, filled = live_histories(dataset, live, queries.users, queries.targets, times)
    embeddings = np.zeros((len(queries), vectors.shape[1]), np.float32)
    for start in range(0, len(filled), _QUERIES_AT_ONCE):
        part = slice(start, min(start + _QUERIES_AT_ONCE, len(filled)))
        embeddings[filled[part]] = embed_users(live.encoder, histories[part])
    unknown = np.ones(len(queries), bool)
    unknown[filled] = False
    findable = np.flatnonzero(targets >= 0)
    for start in range(0, len(findable), _QUERIES_AT_ONCE):
        places = findable[start : start + _QUERIES_AT_ONCE]
        scores = embeddings[places] @ vectors.T
        scores[unknown[places]] = counts
        wanted = scores[np.arange(len(places)), targets[places]]
        for row, place in enumerate(places):
            begin, end = dataset.offsets[queries.users[place]], queries.targets[place]
            seen = np.setdiff1d(rows[dataset.events.items[begin:end]], [-1, targets[place]])
            scores[row, seen] = -np.inf
        # Equal scores count against the target, which equals itself.
        ranks[places] = (scores >= wanted[:, None]).sum(1)
    return ranks
