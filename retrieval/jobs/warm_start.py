"""Last night's weights for tonight's catalogue, and last night's model asked tonight's questions.

Rows of items, actions and values of other kinds follow their ids and names, whatever rows they have tonight.
"""

from collections.abc import MutableMapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.data.dataset import Dataset
from retrieval.data.sequences import gather_histories
from retrieval.data.splits import Queries
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.errors import ConfigError
from retrieval.snapshot.store import Snapshot
from retrieval.types import EventColumns, JaggedBatch, SideRows, TokenKind

__all__ = ["carried_over", "check_shape", "live_histories", "live_ranks", "live_rows", "moved_rows", "rows_before"]

_ITEMS, _SIDE = "item_embedding.weight", "side_embedding.weight"
_ACTIONS = ("action_embedding.weight", "query_embedding.weight")
_ROWS_AT_ONCE = 1 << 16
_QUERIES_AT_ONCE = 256
_SCORES_AT_ONCE = 1 << 24


def live_rows(dataset: Dataset, live: Snapshot) -> NDArray[np.int64]:
    """Row in the live snapshot of each of the dataset's items, −1 for new ones: int64 `[N]`."""
    return rows_before(dataset.vocabulary, live)


def rows_before(vocabulary: Vocabulary, live: Snapshot) -> NDArray[np.int64]:
    """The same of a vocabulary's items."""
    count, known = len(vocabulary), len(live.vocabulary)
    if vocabulary.ids.slice(0, known).equals(live.vocabulary.ids):
        # Appended to: the usual case, and quick for millions.
        return np.where(np.arange(count) < known, np.arange(count), -1)
    return live.vocabulary.rows_of(vocabulary.ids_of(np.arange(count)))


def carried_over(config: EncoderConfig, dataset: Dataset, live: Snapshot) -> dict[str, Tensor]:
    """State of an encoder of this shape that starts from the live one's.

    A new item starts from the mean of the known ones: near what an untrained model would say of it, and in no user's
    way. A new action or value of another kind starts without effect.

    Args:
        config: tonight's encoder.
        dataset: tonight's events.
        live: the live snapshot.

    Raises:
        ConfigError: the live encoder is of another shape.
    """
    check_shape(config, dataset, live)
    moved = moved_rows(live.encoder.state_dict(), dataset, live)
    # A table that the live encoder has no use for, of actions for instance, begins without effect.
    return {name: moved.get(name, torch.zeros_like(one)) for name, one in build_encoder(config).state_dict().items()}


def check_shape(config: EncoderConfig, dataset: Dataset, live: Snapshot) -> None:
    """Refuse a live encoder that tonight's cannot go on from.

    Raises:
        ConfigError: it is of another shape, but for rows of its tables.
    """
    before = live.info.encoder
    kinds = [[(kind.name, kind.context) for kind in known] for known in (live.info.kinds, dataset.info.kinds)]
    sizes = {"num_items": config.num_items, "num_actions": config.num_actions, "kinds": config.kinds}
    if before.model_copy(update=sizes) != config or kinds[0] != kinds[1]:
        raise ConfigError(
            f"{live.version}: its encoder has another shape than the one asked for; ask for that, or start from scratch"
        )


def moved_rows(tensors: MutableMapping[str, Tensor], dataset: Dataset, live: Snapshot) -> dict[str, Tensor]:
    """What was learned with the live snapshot's rows, for tonight's: weights, or a whole training state.

    Args:
        tensors: by name; the optimiser's bear the name of what they belong to within their own. Emptied, so that a
            table of gigabytes is not there twice for longer than it takes to move it.
        dataset: tonight's events.
        live: the snapshot that the tensors belong to.
    """
    rows_of = {_ITEMS: live_rows(dataset, live), _SIDE: _live_side_rows(dataset, live)}
    rows_of |= dict.fromkeys(_ACTIONS, _live_codes(dataset, live))
    # Training will take popularity from tonight's events; only its shape matters here.
    rows_of["optimizer.rows."] = rows_of["popularity"] = rows_of[_ITEMS]
    moved = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        table = next((one for one in rows_of if one in name), None)
        if table is None or tensor.ndim == 0:
            moved[name] = tensor
            continue
        rows = torch.from_numpy(rows_of[table])
        shape = (len(rows), *tensor.shape[1:])
        moved[name] = new = tensor.new_zeros(shape)
        if table == _ITEMS and not name.startswith("optimizer."):
            new[:] = tensor.mean(0)
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[begin : begin + _ROWS_AT_ONCE]
            new[begin : begin + _ROWS_AT_ONCE][part >= 0] = tensor[part[part >= 0]]
    return moved


def _live_codes(dataset: Dataset, live: Snapshot) -> NDArray[np.int64]:
    """Code in the live snapshot of each of the dataset's actions, −1 for new ones: int64 `[A]`."""
    known = {value: code for code, value in enumerate(live.info.actions)}
    return np.array([known.get(action.value, -1) for action in dataset.info.actions], np.int64)


def _live_values(before: TokenKind, now: TokenKind) -> NDArray[np.int64]:
    """Row in the live snapshot's table of each row of tonight's table of the same kind, −1 for new values."""
    known = {value: row for row, value in enumerate(before.values, 1)}
    return np.array([0, *(known.get(value, -1) for value in now.values)], np.int64)


def _live_side_rows(dataset: Dataset, live: Snapshot) -> NDArray[np.int64]:
    """The same for the tables of all kinds end to end; both have the same kinds."""
    begins = np.cumsum([0, *(kind.rows for kind in live.info.kinds)])
    parts = [_live_values(*kinds) for kinds in zip(live.info.kinds, dataset.info.kinds, strict=True)]
    found = [np.where(rows < 0, -1, begin + rows) for begin, rows in zip(begins, parts, strict=False)]
    return np.concatenate([*found, np.zeros(0, np.int64)])


def _live_side(dataset: Dataset, live: Snapshot, users: NDArray[np.int64], ends: NDArray[np.int64]) -> SideRows | None:
    """What the live encoder reads beside some histories: as in service, what it does not know is unknown to it."""
    kinds = live.info.kinds
    if not kinds:
        return None
    context = np.zeros((len(users), sum(kind.context for kind in kinds)), np.int64)
    nothing = np.zeros(0, np.int64)
    none = np.zeros(len(users), np.int64)
    side = dataset.side(users, ends)
    if side is None:
        return SideRows(
            num_kinds=len(kinds),
            context=context,
            kinds=nothing,
            values=nothing,
            timestamps=nothing,
            starts=none,
            ends=none,
        )
    numbers = {(kind.name, kind.context): number for number, kind in enumerate(kinds, 1)}
    auxiliary, values = np.zeros(len(side.kinds), np.int64), np.zeros(len(side.kinds), np.int64)
    for number, now in enumerate(dataset.info.kinds, 1):
        place = numbers.get((now.name, now.context))
        if place is None:
            continue
        rows = np.maximum(_live_values(kinds[place - 1], now), 0)
        if now.context:
            context[:, place - 1] = rows[side.context[:, number - 1]]
        else:
            of_kind = side.kinds == number
            auxiliary[of_kind], values[of_kind] = place, rows[side.values[of_kind]]
    known = auxiliary > 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(known)])
    return SideRows(
        num_kinds=len(kinds),
        context=context,
        kinds=auxiliary[known],
        values=values[known],
        timestamps=side.timestamps[known],
        starts=before[side.starts],
        ends=before[side.ends],
    )


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
    starts = dataset.offsets[users]
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    # Only of these users: the whole log may be a thousand times as long.
    index = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], ends - starts)
    items = rows[dataset.events.items[index]]
    known = items >= 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(known)])
    index = index[known]
    events = EventColumns(
        items=items[known],
        actions=codes[dataset.events.actions[index]].astype(np.uint8),
        timestamps=dataset.events.timestamps[index],
    )
    begins, stops = before[bounds[:-1]], before[bounds[1:]]
    filled = np.flatnonzero(stops > begins)
    side = _live_side(dataset, live, users[filled], ends[filled])
    max_length = live.info.encoder.max_length
    return gather_histories(events, begins[filled], stops[filled], times[filled], max_length, side), filled


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
    findable = np.flatnonzero((targets >= 0) & live.served[targets])
    step = max(1, min(_QUERIES_AT_ONCE, _SCORES_AT_ONCE // num_items))
    for start in range(0, len(findable), step):
        places = findable[start : start + step]
        scores = embeddings[places] @ vectors.T
        scores[unknown[places]] = counts
        scores[:, ~live.served] = -np.inf
        wanted = scores[np.arange(len(places)), targets[places]]
        for row, place in enumerate(places):
            begin, end = dataset.offsets[queries.users[place]], queries.targets[place]
            seen = np.setdiff1d(rows[dataset.events.items[begin:end]], [-1, targets[place]])
            scores[row, seen] = -np.inf
        # Equal scores count against the target, which equals itself.
        ranks[places] = (scores >= wanted[:, None]).sum(1)
    return ranks
