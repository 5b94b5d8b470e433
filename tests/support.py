"""Small datasets, written without `ingest` so that a test decides every byte."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from retrieval.data.columns import write_columns
from retrieval.data.dataset import DATASET_FORMAT, ActionValue, Dataset, DatasetInfo, fingerprint_of
from retrieval.data.vocabulary import Vocabulary
from retrieval.types import TokenKind

Event = tuple[int, int, int]
"""Item row, action code, timestamp."""

SideEvent = tuple[int, int, int]
"""Kind, row of the value, timestamp."""

ACTIONS = (
    ActionValue(value="", positive=False),
    ActionValue(value="like", positive=True),
    ActionValue(value="skip", positive=False),
)


def write_dataset(
    folder: Path, histories: Sequence[Sequence[Event]], item_ids: Sequence[int] | Sequence[str]
) -> Dataset:
    """A dataset of users 0, 1, … with the given events."""
    folder.mkdir(parents=True)
    flat = [event for history in histories for event in history]
    items, actions, times = (np.array([event[field] for event in flat]) for field in range(3))
    ends = np.cumsum([len(history) for history in histories])
    ids = pa.array(item_ids, pa.string() if isinstance(item_ids[0], str) else pa.int64())
    Vocabulary(ids).save(folder / "vocabulary.arrow")
    users = pa.array(np.arange(len(histories)))
    write_columns(folder / "users.arrow", {"id": users, "end": pa.array(ends.astype(np.int64))})
    events = {
        "item": pa.array(items.astype(np.int32)),
        "action": pa.array(actions.astype(np.uint8)),
        "timestamp": pa.array(times.astype(np.int64)),
    }
    write_columns(folder / "events.arrow", events)
    info = DatasetInfo(
        format=DATASET_FORMAT,
        users=len(histories),
        items=len(item_ids),
        events=len(flat),
        actions=ACTIONS,
        tie_order="file order",
        statistics={},
        repairs={},
        sources=(),
        fingerprint=fingerprint_of(folder),
    )
    (folder / "dataset.json").write_text(info.model_dump_json(), encoding="utf-8")
    return Dataset(folder)


def add_side(
    dataset: Dataset,
    kinds: Sequence[TokenKind],
    context: Sequence[Sequence[int]],
    auxiliary: Sequence[Sequence[SideEvent]],
) -> Dataset:
    """The dataset with context `[U, C]` and each user's auxiliary events, by time."""
    folder, flat = dataset.path, [event for events in auxiliary for event in events]
    names = [kind.name for kind in kinds if kind.context]
    if names:
        columns = np.array(context, np.int32).reshape(len(dataset), len(names))
        write_columns(folder / "context.arrow", {name: pa.array(columns[:, at]) for at, name in enumerate(names)})
    types = {"kind": pa.uint8(), "value": pa.int32(), "timestamp": pa.int64()}
    fields = {name: pa.array([event[at] for event in flat], type_) for at, (name, type_) in enumerate(types.items())}
    write_columns(folder / "auxiliary.arrow", fields)
    ends = np.cumsum([len(events) for events in auxiliary]).astype(np.int64)
    write_columns(folder / "ends.arrow", {"end": pa.array(ends)})
    info = dataset.info.model_copy(update={"kinds": tuple(kinds), "fingerprint": fingerprint_of(folder)})
    (folder / "dataset.json").write_text(info.model_dump_json(), encoding="utf-8")
    return Dataset(folder)


def cyclic_histories(users: int, items: int, length: int, seed: int = 0) -> list[list[Event]]:
    """Users who walk through the catalogue in order from a random start: what comes next is always known."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, items, users)
    return [[(int(start + step) % items, 1, 1_000_000 + 3600 * step) for step in range(length)] for start in starts]
