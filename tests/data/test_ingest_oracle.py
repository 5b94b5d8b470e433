"""Ingest against an ingest of a few lines of plain Python, over random logs in every format."""

import itertools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.spill import Spill
from retrieval.data.sweep import Rows, Sweep
from retrieval.errors import DataError
from tests.data.logs import DAY, histories, repairs

NAMES = ("user_id", "item_id", "timestamp", "action")

Histories = dict[int | str, list[tuple[int | str, str, int]]]


class Row(NamedTuple):
    """A row of a log: ids, milliseconds, action; None where missing."""

    user: int | str | None
    item: int | str | None
    time: int | None
    action: str | None


def plain_ingest(rows: list[Row]) -> tuple[Histories, dict[str, int]]:
    """What the rows should become, and the repairs that are not zero."""
    counts: dict[str, int] = defaultdict(int)
    kept: dict[int | str, list[tuple[int, int, int | str, str]]] = defaultdict(list)
    seen: set[Row] = set()
    for place, row in enumerate(rows):
        if row.user is None:
            counts["missing_user"] += 1
        elif row.item is None:
            counts["missing_item"] += 1
        elif row.time is None:
            counts["missing_time"] += 1
        else:
            counts["missing_action"] += row.action is None
            if row in seen:
                counts["duplicates"] += 1
                continue
            seen.add(row)
            kept[row.user].append((row.time, place, row.item, row.action or ""))
    for events in kept.values():
        for time, place, *_ in events:
            counts["out_of_order"] += any(other[0] < time and other[1] > place for other in events)
    wanted = {
        user: [(item, action, time // 1000) for time, _, item, action in sorted(kept[user], key=lambda e: e[:2])]
        for user in sorted(kept, key=lambda one: one if isinstance(one, int) else one.encode())
    }
    return wanted, {name: count for name, count in counts.items() if count}


def save(folder: Path, ending: str, parts: list[list[Row]]) -> None:
    """Write the parts of a log as files of one format."""
    folder.mkdir()
    for number, rows in enumerate(parts):
        path = folder / f"{number}.{ending}"
        if ending == "csv":
            lines = [",".join("" if value is None else str(value) for value in row) + "\n" for row in rows]
            path.write_text(",".join(NAMES) + "\n" + "".join(lines), encoding="utf-8")
        elif ending == "jsonl":
            lines = [json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows]
            path.write_text("".join(lines), encoding="utf-8")
        else:
            columns = dict(zip(NAMES, zip(*rows, strict=True), strict=True))
            pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), path, row_group_size=3)


@st.composite
def logs(draw: st.DrawFn) -> list[list[Row]]:
    """Logs of one to three files, with ties, nulls and duplicates."""
    text = draw(st.booleans())
    ids = st.sampled_from(["a", "B", "é x", "007", "7"]) if text else st.integers(-2, 2) | st.just(2**60 + 1)
    # Lost fields are drawn for a whole row, so that most rows are whole.
    lost = st.sampled_from([None] * 9 + ["user", "item", "time", "action", "action"])
    times = st.integers(0, 6).map(lambda halves: DAY * 1000 + 500 * halves)
    whole = st.builds(Row, user=ids, item=ids, time=times, action=st.sampled_from(["view", "buy"]))
    row = st.builds(lambda row, field: row._replace(**{field: None}) if field else row, whole, lost)
    return draw(st.lists(st.lists(row, min_size=1, max_size=12), min_size=1, max_size=3))


@settings(max_examples=25, deadline=None)
@given(parts=logs())
def test_every_format_gives_what_plain_python_gives(parts: list[list[Row]]) -> None:
    rows = [row for part in parts for row in part]
    usable = [row for row in rows if None not in row[:3]]
    # A text column that happens to hold integers only would, rightly, be read as integers in CSV.
    schema = EventSchema(
        **{
            f"{name}_type": "string" if any(isinstance(row[field], str) for row in rows) else "integer"
            for field, name in enumerate(("user", "item"))
        }
    )
    wanted, mended = plain_ingest(rows)
    with tempfile.TemporaryDirectory() as name:
        for ending in ("parquet", "csv", "jsonl"):
            save(Path(name) / ending, ending, parts)
            if 2 * len(usable) < len(rows):
                with pytest.raises(DataError, match=r"no usable user, item or time|is empty in every row"):
                    ingest(Path(name) / ending, Path(name) / f"{ending}-dataset", schema=schema)
                continue
            dataset = ingest(Path(name) / ending, Path(name) / f"{ending}-dataset", schema=schema)
            assert list(histories(dataset).items()) == list(wanted.items()), ending
            assert repairs(dataset) == mended, ending
            assert dataset.info.statistics["time_unit"] == "ms"
            seconds = [row.time // 1000 for row in usable if row.time is not None]
            assert (dataset.events.timestamps.min(), dataset.events.timestamps.max()) == (min(seconds), max(seconds))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(*(st.integers(0, top) for top in (3, 4, 2, 1))), min_size=1, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_a_sweep_gives_the_same_whatever_its_batches(rows: list[tuple[int, int, int, int]], cuts: list[int]) -> None:
    # Users 0, 1, … without gaps, times in half seconds, and each row's place in the log as it was drawn.
    codes = {user: code for code, user in enumerate(sorted({row[0] for row in rows}))}
    ordered = sorted((codes[user], time, place, item, act) for place, (user, time, item, act) in enumerate(rows))
    columns = np.array(ordered).T
    every = Rows(
        user=columns[0].astype(np.int32),
        time=columns[1].astype(np.int64) * 500_000,
        ordinal=columns[2].astype(np.int32),
        item=columns[3].astype(np.int32),
        action=columns[4].astype(np.uint8),
    )
    with tempfile.TemporaryDirectory() as name:
        spill = Spill(Path(name))
        sweep = Sweep(spill, items=3)
        edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
        for begin, end in itertools.pairwise(edges):
            sweep.feed(every[begin:end])
        sweep.finish()
        found = {
            column: spill.column(column, type_).to_pylist()
            for column, type_ in (("item", pa.int32()), ("timestamp", pa.int64()), ("end", pa.int64()))
        }
    wanted, mended = plain_ingest([Row(codes[user], item, 500 * time, str(act)) for user, time, item, act in rows])
    events = [event for user in sorted(wanted) for event in wanted[user]]
    assert found["item"] == [event[0] for event in events]
    assert found["timestamp"] == [event[2] for event in events]
    assert found["end"] == np.cumsum([len(wanted[user]) for user in sorted(wanted)]).tolist()
    assert (sweep.users, sweep.events) == (len(wanted), len(events))
    assert (sweep.duplicates, sweep.out_of_order) == (mended.get("duplicates", 0), mended.get("out_of_order", 0))
    ties = [one[2] == two[2] for history in wanted.values() for one, two in itertools.pairwise(history)]
    assert sweep.tied == sum(ties)
    assert (sweep.first, sweep.last) == (min(event[2] for event in events), max(event[2] for event in events))
    assert np.flatnonzero(sweep.met_items).tolist() == sorted({event[0] for event in events})
    assert sweep.action_counts.sum() == len(events)
