"""Event logs written by hand, and datasets read back as plain Python, for the tests of ingest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.data.dataset import Dataset

HEADER = "user_id,item_id,timestamp\n"
DAY = 1_600_000_000


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def histories(dataset: Dataset) -> dict[int | str, list[tuple[int | str, str, int]]]:
    """Every user's events as (item id, action, second), in order."""
    events = dataset.events
    items: Sequence[int | str] = dataset.vocabulary.ids_of(events.items.astype(np.int64))
    names = [dataset.info.actions[code].value for code in events.actions]
    rows = list(zip(items, names, events.timestamps.tolist(), strict=True))
    ends = dataset.offsets
    return {user: rows[ends[place] : ends[place + 1]] for place, user in enumerate(dataset.user_ids.to_pylist())}


def repairs(dataset: Dataset) -> dict[str, int]:
    return {name: count for name, count in dataset.info.repairs.items() if count}
