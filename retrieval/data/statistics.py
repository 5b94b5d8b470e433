"""What a dataset tells of its events."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval.data.dataset import ActionValue
from retrieval.data.meaning import Meaning
from retrieval.data.spill import Spill
from retrieval.data.sweep import Sweep

__all__ = ["statistics_of"]


def statistics_of(
    spill: Spill, meaning: Meaning, sweep: Sweep, rows: int, actions: tuple[ActionValue, ...]
) -> dict[str, Any]:
    """Figures for people.

    Args:
        spill: holds column `end`, of users' last events.
        meaning: what the log's columns mean.
        sweep: what was swept.
        rows: of the log, usable or not.
        actions: by code.
    """
    ends = spill.column("end", pa.int64()).to_numpy()
    lengths = np.diff(ends, prepend=0)
    counts = [int(count) for count in sweep.action_counts[: len(actions)]]
    positive = sum(count for count, action in zip(counts, actions, strict=True) if action.positive)
    followers = sweep.events - sweep.users
    return {
        "rows_read": rows,
        "first_time": _iso(sweep.first),
        "last_time": _iso(sweep.last),
        "events_per_user": {
            "min": int(lengths.min()),
            "p50": round(float(np.quantile(lengths, 0.5)), 1),
            "p90": round(float(np.quantile(lengths, 0.9)), 1),
            "max": int(lengths.max()),
            "mean": round(sweep.events / sweep.users, 3),
        },
        "action_counts": {action.value: count for action, count in zip(actions, counts, strict=True)},
        "positive_share": round(positive / sweep.events, 6),
        "tied_neighbours_share": round(sweep.tied / followers, 6) if followers else 0.0,
        "time_unit": meaning.times.unit,
        "items_without_events": int(np.count_nonzero(~sweep.met_items)),
        "user_id_type": meaning.users.type,
        "item_id_type": meaning.item_type,
    }


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
