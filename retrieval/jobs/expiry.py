"""Which items are no answers any more: tombstones, which keep their rows and are read in histories.

Nothing remembers them but the rows themselves. Every night decides anew from the log and the metadata, so that an item
that comes back is found again, in the row that it always had.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.errors import ConfigError, DataError

__all__ = ["Expiry", "expired_items"]

_DAY = 86_400
_EVENTS_AT_ONCE = 1 << 22


class Expiry(Config):
    """When an item expires, beside the rule that always holds: neither the log nor the metadata has it any more.

    Times are held against the log's last event, not against a clock.

    Attributes:
        unseen_days: its last event is longer ago; items without events are judged by the other rules alone.
        column: attribute with the time from which on it is no answer: seconds, a date or a timestamp; missing: never.
        unlisted: the metadata does not name it.
    """

    unseen_days: float | None = Field(default=None, gt=0)
    column: str | None = None
    unlisted: bool = False


def expired_items(dataset: Dataset, expiry: Expiry) -> NDArray[np.bool_]:
    """Which of a dataset's items have expired, bool `[N]`.

    Args:
        dataset: ingested with the items known before, so that it tells which the metadata lists.
        expiry: the rules.

    Raises:
        ConfigError: a rule asks for metadata that there is none of.
        DataError: every item would be gone.
    """
    last, seen = int(dataset.events.timestamps.max()), dataset.item_counts > 0
    attributes = dataset.vocabulary.attributes
    listed = attributes.get("listed")
    named = np.zeros(len(seen), bool) if listed is None else listed.to_numpy(zero_copy_only=False)
    found = ~seen & ~named
    if expiry.unseen_days is not None:
        found |= seen & (_last_seen(dataset) < last - expiry.unseen_days * _DAY)
    if expiry.column is not None:
        if expiry.column not in attributes:
            known = ", ".join(name for name in attributes if name != "listed") or "none"
            raise ConfigError(f"expires: the items have no attribute {expiry.column!r}; they have: {known}")
        found |= _moments(expiry.column, attributes[expiry.column]) <= last
    if expiry.unlisted:
        if listed is None:
            raise ConfigError("expire-unlisted: there is no file of items that could list them")
        found |= ~named
    if found.all():
        raise DataError(f"{dataset.path}: by these rules all {len(found):,} items have expired")
    return found


def _last_seen(dataset: Dataset) -> NDArray[np.int64]:
    """Time of each item's last event, int64 `[N]`; the least there is where it has none."""
    seen = np.full(len(dataset.vocabulary), np.iinfo(np.int64).min)
    events = dataset.events
    for start in range(0, len(events.items), _EVENTS_AT_ONCE):
        part = slice(start, start + _EVENTS_AT_ONCE)
        np.maximum.at(seen, events.items[part], events.timestamps[part])
    return seen


def _moments(name: str, column: pa.Array) -> NDArray[np.float64]:
    """Seconds of each item, infinite where it says nothing: float64 `[N]`."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_date(column.type):
            column = pc.cast(column, pa.timestamp("us"))
        if pa.types.is_timestamp(column.type):
            column = pc.divide(pc.cast(pc.cast(column, pa.timestamp("us", column.type.tz)), pa.int64()), 1_000_000)
        numbers = pc.cast(column, pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"expires: attribute {name!r} holds no times ({error})") from None
    values: NDArray[np.float64] = pc.fill_null(numbers, np.inf).to_numpy(zero_copy_only=False)
    return values
