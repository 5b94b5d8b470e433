"""Ingest: hand-written datasets, every repair, every refusal, and a comparison with a plain-Python ingest."""

import gzip
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.data.dataset import ActionValue, Dataset
from retrieval.data.ingest import EventSchema, ItemSchema, ingest
from retrieval.errors import ConfigError, DataError

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
    items = dataset.vocabulary.ids_of(events.items.astype(np.int64))
    names = [dataset.info.actions[code].value for code in events.actions]
    rows = list(zip(items, names, events.timestamps.tolist(), strict=True))
    ends = dataset.offsets
    return {user: rows[ends[place] : ends[place + 1]] for place, user in enumerate(dataset.user_ids.to_pylist())}


def repairs(dataset: Dataset) -> dict[str, int]:
    return {name: count for name, count in dataset.info.repairs.items() if count}


def test_a_small_log_becomes_exactly_these_arrays(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp,action\n"
        "7,30,1600000020,like\n"
        "7,10,1600000010,view\n"
        "2,20,1600000005,view\n"
        "7,20,1600000010,like\n"
        "2,30,1600000005,\n"
        "7,10,1600000010,view\n",
    )
    items = write(tmp_path / "items.csv", "item_id,title,year\n40,Fourth,1999\n10,First,\n10,Again,2001\n,None,2002\n")
    dataset = ingest(log, tmp_path / "out" / "dataset", schema=EventSchema(positive=("like",)), items=items)
    assert dataset.user_ids.to_pylist() == [2, 7]
    assert dataset.offsets.tolist() == [0, 2, 5]
    assert dataset.events.items.tolist() == [1, 2, 0, 1, 2]
    assert dataset.events.items.dtype == np.int32
    assert dataset.events.actions.tolist() == [2, 0, 2, 1, 1]
    assert dataset.events.actions.dtype == np.uint8
    assert dataset.events.timestamps.tolist() == [DAY + 5, DAY + 5, DAY + 10, DAY + 10, DAY + 20]
    assert dataset.events.timestamps.dtype == np.int64
    assert dataset.vocabulary.ids.to_pylist() == [10, 20, 30, 40]
    assert dataset.vocabulary.attributes["title"].to_pylist() == ["First", None, None, "Fourth"]
    assert dataset.vocabulary.attributes["year"].to_pylist() == [None, None, None, 1999]
    assert dataset.vocabulary.attributes["year"].type == pa.int64()
    assert dataset.info.actions == (
        ActionValue(value="", positive=False),
        ActionValue(value="like", positive=True),
        ActionValue(value="view", positive=False),
    )
    assert repairs(dataset) == {
        "missing_action": 1,
        "duplicates": 1,
        "out_of_order": 1,
        "duplicate_items": 1,
        "items_without_id": 1,
    }
    assert dataset.info.statistics == {
        "rows_read": 6,
        "first_time": "2020-09-13T12:26:45Z",
        "last_time": "2020-09-13T12:27:00Z",
        "events_per_user": {"min": 2, "p50": 2.5, "p90": 2.9, "max": 3, "mean": 2.5},
        "action_counts": {"": 1, "like": 2, "view": 2},
        "positive_share": 0.4,
        "tied_neighbours_share": round(2 / 3, 6),
        "tie_order": "file order",
        "time_unit": "s",
        "items_without_events": 1,
        "user_id_type": "integer",
        "item_id_type": "integer",
    }
    assert dataset.info.sources == (str(log), str(items))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []
    assert sorted(path.name for path in (tmp_path / "out" / "dataset").iterdir()) == [
        "dataset.json",
        "events.arrow",
        "users.arrow",
        "vocabulary.arrow",
    ]


# ---------------------------------------------------------------------------------------------------------- order


def test_equal_times_keep_the_order_of_files_and_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    expected: dict[int, list[int]] = {user: [] for user in range(5)}
    item = 0
    for part in range(8):
        users = rng.integers(0, 5, 40_000)
        items = np.arange(item, item + len(users))
        item += len(users)
        times = np.full(len(users), DAY)
        # Written in reverse, so that file names and not creation times give the order.
        folder = tmp_path / "log" / f"day={7 - part}"
        write_parquet(
            folder / "x.parquet", {"user_id": users, "item_id": items, "timestamp": times}, row_group_size=3000
        )
    for part in range(8):
        table = pq.read_table(tmp_path / "log" / f"day={part}" / "x.parquet", partitioning=None)
        for user, thing in zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True):
            expected[user].append(thing)
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert {user: [row[0] for row in rows] for user, rows in histories(dataset).items()} == expected
    assert dataset.info.statistics["tie_order"] == "file order"
    assert dataset.info.statistics["tied_neighbours_share"] == 1.0
    assert repairs(dataset) == {}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "csv.gz"])
def test_equal_times_keep_the_order_of_rows_in_text(tmp_path: Path, ending: str) -> None:
    rows = 150_000
    for part in range(2):
        things = range(part * rows, (part + 1) * rows)
        if ending == "jsonl":
            text = "".join(f'{{"user_id":1,"item_id":{thing},"timestamp":{DAY}}}\n' for thing in things)
        else:
            text = HEADER + "".join(f"1,{thing},{DAY}\n" for thing in things)
        content = gzip.compress(text.encode(), 1) if ending.endswith("gz") else text.encode()
        write(tmp_path / "log" / f"{part}.{ending}", content)
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert dataset.events.items.tolist() == list(range(2 * rows))
    assert dataset.vocabulary.ids.to_pylist() == list(range(2 * rows))


def test_times_within_one_second_are_ordered_as_written(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + f"1,30,{DAY}900\n1,20,{DAY}100\n1,10,{DAY}500\n")
    dataset = ingest(log, tmp_path / "out")
    assert [row[0] for row in histories(dataset)[1]] == [20, 10, 30]
    assert dataset.events.timestamps.tolist() == [DAY, DAY, DAY]
    assert dataset.info.statistics["tied_neighbours_share"] == 1.0
    assert repairs(dataset) == {"out_of_order": 1}


def test_a_folder_is_read_recursively_without_hidden_files(tmp_path: Path) -> None:
    for name, item in (("b/1.csv", 2), ("a/2.csv", 1), ("c.tsv", 3)):
        text = HEADER + f"1,{item},{DAY}\n"
        write(tmp_path / "log" / name, text.replace(",", "\t") if name.endswith("tsv") else text)
    for name in ("_SUCCESS", "_temporary/x.csv", ".crc.csv", "a/.hidden.parquet", "notes.md"):
        write(tmp_path / "log" / name, "junk")
    write(tmp_path / "log" / "d.csv", "")
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert [row[0] for row in histories(dataset)[1]] == [1, 2, 3]
    assert repairs(dataset) == {"empty_files": 1}
    assert [Path(name).name for name in dataset.info.sources] == ["2.csv", "1.csv", "c.tsv"]


def test_files_may_have_columns_in_different_places_and_types(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "log/1.parquet", {"user_id": pa.array([1], pa.int32()), "item_id": ["a"], "timestamp": [1]}
    )
    write_parquet(
        tmp_path / "log/2.parquet",
        {
            "timestamp": pa.array([2], pa.int16()),
            "extra": [0],
            "item_id": pa.array(["b"]).dictionary_encode(),
            "user_id": [1],
        },
    )
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert histories(dataset) == {1: [("a", "", 1), ("b", "", 2)]}


@pytest.mark.parametrize("name", ["a[1].csv", "s*r?.csv", "it's.csv", 'quo"te.csv'])
def test_file_names_are_taken_literally(tmp_path: Path, name: str) -> None:
    log = write(tmp_path / name, HEADER + f"1,2,{DAY}\n")
    write(tmp_path / "a1.csv", HEADER + f"1,3,{DAY}\n")
    assert histories(ingest(log, tmp_path / "out")) == {1: [(2, "", DAY)]}


def test_column_names_may_hold_quotes_and_spaces(tmp_path: Path) -> None:
    schema = EventSchema(user='the "user"', item="it's", time="a,time; --")
    values = {schema.user: ["u"], schema.item: [5], schema.time: [DAY], "User": [1], "user": [2]}
    one = write_parquet(tmp_path / "log.parquet", values)
    two = write(tmp_path / "log.csv", 'User,user,"the ""user""",it\'s,"a,time; --"\n1,2,u,5,1600000000\n')
    three = write(tmp_path / "log.jsonl", json.dumps({name: value[0] for name, value in values.items()}) + "\n")
    for number, log in enumerate((one, two, three)):
        assert histories(ingest(log, tmp_path / f"out{number}", schema=schema)) == {"u": [(5, "", DAY)]}


# ------------------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (["1", "20", "-3"], "integer"),
        (["9223372036854775807"], "integer"),
        (["9223372036854775808"], "string"),
        (["1", "007"], "string"),
        (["1", "+7"], "string"),
        (["1", " 7"], "string"),
        (["1", "7.0"], "string"),
        (["1", "-0"], "string"),
        (["1", "1e3"], "string"),
        (["1", "x"], "string"),
    ],
)
def test_text_ids_are_integers_only_if_all_round_trip(tmp_path: Path, text: list[str], kind: str) -> None:
    log = write(tmp_path / "log.csv", HEADER + "".join(f"{one},{one},{DAY}\n" for one in text))
    dataset = ingest(log, tmp_path / "out")
    found = dataset.user_ids.to_pylist()
    assert found == (sorted(map(int, text)) if kind == "integer" else sorted(text))
    assert dataset.vocabulary.ids.to_pylist() == found
    assert dataset.info.statistics["user_id_type"] == kind
    assert dataset.info.statistics["item_id_type"] == kind


def test_the_type_of_ids_can_be_given(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + f"1,10,{DAY}\n1,9,{DAY}\n")
    dataset = ingest(log, tmp_path / "out", schema=EventSchema(user_type="integer", item_type="string"))
    assert histories(dataset) == {1: [("10", "", DAY), ("9", "", DAY)]}
    typed = write_parquet(
        tmp_path / "log.parquet", {"user_id": [5, 10], "item_id": ["3", "21"], "timestamp": [DAY] * 2}
    )
    dataset = ingest(typed, tmp_path / "out2", schema=EventSchema(user_type="string", item_type="integer"))
    assert histories(dataset) == {"10": [(21, "", DAY)], "5": [(3, "", DAY)]}


def test_large_integer_ids_never_pass_through_floats(tmp_path: Path) -> None:
    ids = [2**53 + 1, 2**63 - 1, -(2**63), 2**53]
    as_parquet = {
        "user_id": pa.array(ids[:2] + ids[3:], pa.uint64()),
        "item_id": ids[:2] + ids[3:],
        "timestamp": [1] * 3,
    }
    dataset = ingest(write_parquet(tmp_path / "log.parquet", as_parquet), tmp_path / "out1")
    assert dataset.user_ids.to_pylist() == [2**53, 2**53 + 1, 2**63 - 1]
    lines = "".join(json.dumps({"user_id": one, "item_id": one, "timestamp": DAY}) + "\n" for one in ids)
    dataset = ingest(write(tmp_path / "log.jsonl", lines), tmp_path / "out2")
    assert dataset.user_ids.to_pylist() == sorted(ids)
    assert dataset.vocabulary.ids.to_pylist() == sorted(ids)


def test_string_ids_are_ordered_by_their_bytes(tmp_path: Path) -> None:
    ids = ["z", "é", "Z", "10", "9", "日本", "a b", "😀", "\ufffd", "ß"]
    log = write_parquet(tmp_path / "log.parquet", {"user_id": ids, "item_id": ids, "timestamp": [DAY] * len(ids)})
    dataset = ingest(log, tmp_path / "out")
    assert dataset.user_ids.to_pylist() == sorted(ids, key=str.encode)
    assert dataset.vocabulary.ids.to_pylist() == sorted(ids, key=str.encode)
    assert dataset.users_named(ids).tolist() == [sorted(ids, key=str.encode).index(one) for one in ids]


# ---------------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("1600000000", "s"),
        ("1600000000.75", "s"),
        ("1600000000999", "ms"),
        ("1600000000999999", "us"),
        ("2020-09-13T12:26:40Z", "iso"),
        ("2020-09-13 12:26:40.999", "iso"),
        ("2020-09-13T14:26:40+02:00", "iso"),
        ("2020-09-13T07:56:40.5-0430", "iso"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_units_of_times_are_found(tmp_path: Path, value: str, unit: str, ending: str) -> None:
    if ending == "csv":
        log = write(tmp_path / "log.csv", HEADER + f"1,2,{value}\n")
    else:
        shown = value if unit != "iso" else json.dumps(value)
        log = write(tmp_path / "log.jsonl", f'{{"user_id":1,"item_id":2,"timestamp":{shown}}}\n')
    dataset = ingest(log, tmp_path / "out")
    assert dataset.events.timestamps.tolist() == [DAY]
    assert dataset.info.statistics["time_unit"] == unit


@pytest.mark.parametrize(
    "column",
    [
        pa.array([DAY], pa.timestamp("s")),
        pa.array([DAY * 1000 + 999], pa.timestamp("ms")),
        pa.array([DAY * 10**6 + 999_999], pa.timestamp("us", "Europe/Paris")),
        pa.array([DAY * 10**9 + 999_999_999], pa.timestamp("ns")),
        pa.array([DAY + 0.5], pa.float64()),
        pa.array([DAY], pa.uint32()),
    ],
    ids=str,
)
def test_typed_times_become_whole_seconds(tmp_path: Path, column: pa.Array) -> None:
    log = write_parquet(tmp_path / "log.parquet", {"user_id": [1], "item_id": [2], "timestamp": column})
    dataset = ingest(log, tmp_path / "out")
    assert dataset.events.timestamps.tolist() == [DAY]
    assert dataset.info.statistics["time_unit"] == ("s" if column.type in (pa.float64(), pa.uint32()) else "timestamp")


def test_a_date_is_its_midnight_in_utc(tmp_path: Path) -> None:
    log = write_parquet(
        tmp_path / "log.parquet", {"user_id": [1], "item_id": [2], "timestamp": pa.array([18518], pa.date32())}
    )
    assert ingest(log, tmp_path / "out").events.timestamps.tolist() == [18518 * 86400]


def test_a_given_unit_is_taken(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + "1,2,5000\n1,2,90000000000\n")
    dataset = ingest(log, tmp_path / "out", schema=EventSchema(time_unit="ms"))
    assert dataset.events.timestamps.tolist() == [5, 90_000_000]


# -------------------------------------------------------------------------------------------------------- actions


def actions_of(tmp_path: Path, column: Sequence[Any], **options: Any) -> dict[str, bool]:
    count = len(column)
    log = write_parquet(
        tmp_path / "log.parquet",
        {"user_id": [1] * count, "item_id": list(range(count)), "timestamp": [DAY] * count, "rating": column},
    )
    dataset = ingest(log, tmp_path / "out", schema=EventSchema(action="rating", **options), replace=True)
    assert [row[1] for row in histories(dataset)[1]] == [shown(value) for value in pa.array(column).to_pylist()]
    return {action.value: action.positive for action in dataset.info.actions}


def shown(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def test_actions_are_coded_in_the_order_of_their_values(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.json").write_text('{"format": 1}')
    assert actions_of(tmp_path, [10, 9, None, -1]) == {"": False, "-1": True, "9": True, "10": True}
    ratings = pa.array([4.0, 3.5, 10.0, 0.5], pa.float32())
    assert actions_of(tmp_path, ratings, positive=(">=4",)) == {
        "": False,
        "0.5": False,
        "3.5": False,
        "4": True,
        "10": True,
    }
    assert actions_of(tmp_path, [1, 2, 3, 4], positive=("<2", "4.0")) == {
        "": False,
        "1": True,
        "2": False,
        "3": False,
        "4": True,
    }
    assert actions_of(tmp_path, ["b", "é", ">=4", "B"], positive=("b", ">=4")) == {
        "": False,
        ">=4": True,
        "B": False,
        "b": True,
        "é": False,
    }
    assert actions_of(tmp_path, [True, False, True], positive=("true",)) == {"": False, "false": False, "true": True}
    assert actions_of(tmp_path, pa.nulls(2)) == {"": False}


def test_a_column_called_action_is_taken_unless_it_is_declined(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,action\n1,2,3,buy\n")
    assert [action.value for action in ingest(log, tmp_path / "a").info.actions] == ["", "buy"]
    assert ingest(log, tmp_path / "b", schema=EventSchema(action="")).info.actions == (
        ActionValue(value="", positive=True),
    )


def test_254_actions_are_accepted_and_255_refused(tmp_path: Path) -> None:
    for count in (254, 255):
        rows = "".join(f"1,2,{DAY + n},{n}.0\n" for n in range(count))
        log = write(tmp_path / f"{count}.csv", f"user_id,item_id,timestamp,price\n{rows}")
        if count == 254:
            dataset = ingest(log, tmp_path / "out", schema=EventSchema(action="price"))
            assert dataset.events.actions.tolist() == list(range(1, 255))
            assert [action.value for action in dataset.info.actions] == ["", *map(str, range(254))]
        else:
            with pytest.raises(DataError, match=r"column 'price' has 255 distinct values; .* at most 254"):
                ingest(log, tmp_path / "refused", schema=EventSchema(action="price"))


# ------------------------------------------------------------------------------------------------- items, dialect


def test_item_attributes_keep_their_types(tmp_path: Path) -> None:
    log = write_parquet(tmp_path / "log.parquet", {"user_id": [1, 1], "item_id": ["b", "a"], "timestamp": [1, 2]})
    attributes = {
        "title": pa.array(["B", "C"]),
        "year": pa.array([1999, None], pa.int16()),
        "price": pa.array([1.5, 2.5], pa.float32()),
        "tags": pa.array([["x", "y"], []], pa.list_(pa.string())),
        "new": pa.array([True, False]),
        "id": pa.array([8, 9], pa.int64()),
    }
    items = write_parquet(tmp_path / "items.parquet", {"item_id": ["b", "c"], **attributes})
    dataset = ingest(log, tmp_path / "out", items=items)
    assert dataset.vocabulary.ids.to_pylist() == ["a", "b", "c"]
    for name, column in attributes.items():
        found = dataset.vocabulary.attributes["id_" if name == "id" else name]
        assert found.type.equals(column.type) or pa.types.is_list(found.type), name
        assert found.to_pylist() == [None, *column.to_pylist()], name


def test_items_from_json_keep_lists_and_text(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", '{"user_id":"u","item_id":"1","timestamp":1600000000}\n')
    items = write(
        tmp_path / "items.jsonl",
        '{"item_id":"1","name":"2020-01-01","tags":["a"],"n":5,"deep":{"x":1}}\n{"item_id":"02","n":6}\n',
    )
    dataset = ingest(log, tmp_path / "out", items=items, item_schema=ItemSchema(title="name"))
    assert dataset.vocabulary.ids.to_pylist() == ["02", "1"]
    assert {name: column.to_pylist() for name, column in dataset.vocabulary.attributes.items()} == {
        "title": [None, "2020-01-01"],
        "tags": [None, ["a"]],
        "n": [6, 5],
        "deep": [None, '{"x":1}'],
    }


def test_text_items_get_types_and_titles_stay_text(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + f"1,5,{DAY}\n")
    items = write(tmp_path / "items.csv", "item_id,title,year,price,zip\n5,1984,1999,2.50,02139\n6,,2000,3,10001\n")
    attributes = ingest(log, tmp_path / "out", items=items).vocabulary.attributes
    assert {name: column.to_pylist() for name, column in attributes.items()} == {
        "title": ["1984", None],
        "year": [1999, 2000],
        "price": [2.5, 3.0],
        "zip": ["02139", "10001"],
    }


def test_movielens_files_without_header_are_read(tmp_path: Path) -> None:
    log = write(tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n")
    items = write(tmp_path / "movies.dat", '1193::"Café" (1995)::Drama|War\n3::B, a "b::c\n'.encode("latin-1"))
    dataset = ingest(
        log,
        tmp_path / "out",
        schema=EventSchema(columns=("user_id", "item_id", "rating", "timestamp"), action="rating", positive=(">=4",)),
        items=items,
        item_schema=ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1"),
    )
    assert histories(dataset) == {1: [(1193, "5", 978300760), (661, "3", 978302109)]}
    assert dataset.vocabulary.ids.to_pylist() == [3, 661, 1193]
    assert dataset.vocabulary.attributes["title"].to_pylist() == ['B, a "b', None, '"Café" (1995)']
    assert dataset.vocabulary.attributes["genres"].to_pylist() == ["c", None, "Drama|War"]


def test_ids_of_events_and_items_are_read_alike(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + f"1,7,{DAY}\n")
    items = write(tmp_path / "items.csv", "item_id\n007\n7\n")
    assert ingest(log, tmp_path / "a", items=items).vocabulary.ids.to_pylist() == ["007", "7"]
    typed = write_parquet(tmp_path / "items.parquet", {"item_id": [8, 7]})
    assert ingest(log, tmp_path / "b", items=typed).vocabulary.ids.to_pylist() == [7, 8]
    text = write_parquet(tmp_path / "text.parquet", {"item_id": ["8", "7"]})
    assert ingest(log, tmp_path / "c", items=text).vocabulary.ids.to_pylist() == ["7", "8"]
    integers = write_parquet(tmp_path / "log.parquet", {"user_id": [1], "item_id": [7], "timestamp": [DAY]})
    with pytest.raises(DataError, match=r"log\.parquet: column 'item_id' holds integers but .* holds strings"):
        ingest(integers, tmp_path / "d", items=text)


# -------------------------------------------------------------------------------------------------------- repairs


def test_each_unusable_row_is_dropped_under_its_first_fault(tmp_path: Path) -> None:
    good = "".join(f"1,{n},{DAY + n},v\n" for n in range(9))
    bad = f",1,{DAY},v\n1,,{DAY},v\n1,1,,v\n1,1,soon,v\n,,,\n,1,soon,\n1,100,{DAY + 99},\n"
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,action\n" + good + bad)
    dataset = ingest(log, tmp_path / "out")
    assert dataset.info.events == 10
    assert repairs(dataset) == {
        "missing_user": 3,
        "missing_item": 1,
        "missing_time": 1,
        "unparsable_time": 1,
        "missing_action": 1,
    }
    assert histories(dataset)[1][-1] == (100, "", DAY + 99)


def test_empty_text_is_missing_in_every_format(tmp_path: Path) -> None:
    rows = {"user_id": ["", "a", "a", "a"], "item_id": ["x", "", "x", "y"], "timestamp": [1, 2, 3, 4]}
    write_parquet(tmp_path / "log.parquet", rows)
    lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    write(tmp_path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(tmp_path / "log.csv", HEADER + "".join(",".join(map(str, line.values())) + "\n" for line in lines))
    for ending in ("parquet", "jsonl", "csv"):
        dataset = ingest(tmp_path / f"log.{ending}", tmp_path / ending)
        assert repairs(dataset) == {"missing_user": 1, "missing_item": 1}, ending


def test_duplicates_keep_the_first_and_need_the_same_action_and_moment(tmp_path: Path) -> None:
    ms = DAY * 1000
    rows = [(1, 5, ms, "a"), (1, 6, ms, "a"), (1, 5, ms, "a"), (1, 5, ms, "b"), (1, 5, ms + 1, "a"), (2, 5, ms, "a")]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,action\n" + text)
    dataset = ingest(log, tmp_path / "out")
    assert repairs(dataset) == {"duplicates": 1}
    assert histories(dataset) == {
        1: [(5, "a", DAY), (6, "a", DAY), (5, "b", DAY), (5, "a", DAY)],
        2: [(5, "a", DAY)],
    }


def test_a_log_delivered_three_times_is_still_a_log(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / "log" / f"{part}.csv", HEADER + "".join(f"{n % 7},{n},{DAY + n}\n" for n in range(100)))
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert (dataset.info.events, dataset.info.repairs["duplicates"]) == (100, 200)
    assert dataset.info.repairs["out_of_order"] == 0


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED: list[tuple[str, str | bytes, str]] = [
    ("log.csv", "", r"log\.csv: is empty$"),
    ("log.csv", HEADER, r"log\.csv: has no events"),
    ("log.csv", "\n" + HEADER, r"log\.csv: line 1 is blank"),
    ("log.csv", "user_idx,item_id,timestamp\n1,2,3\n", r"no column 'user_id' .* it has user_idx, item_id, timestamp; did you mean 'user_idx'\?"),
    ("log.csv", "user_id,item_id,item_id,timestamp\n1,2,2,3\n", r"names column 'item_id' more than once"),
    ("log.csv", HEADER + "1,2,3\n4,5\n", r"log\.csv: line 3 has 2 fields instead of 3$"),
    ("log.csv", HEADER + "1,2,3,4\n", r"log\.csv: line 2 has 4 fields instead of 3$"),
    ("log.csv", HEADER + '1,"2,3\n', r"log\.csv: line 2: a quote is never closed$"),
    ("log.csv", (HEADER + "1,é,3\n").encode("latin-1"), r"log\.csv: line 2 is not UTF-8; .* encoding latin-1$"),
    ("log.csv", "usér_id,item_id\n".encode("latin-1"), r"log\.csv: line 1 is not UTF-8; .* encoding latin-1$"),
    ("log.csv.gz", b"no gzip", r"log\.csv\.gz: is not a whole gzip file"),
    ("log.csv.gz", gzip.compress(("".join([HEADER, *(f"{n},{n * n % 101},{n}\n" for n in range(9999))])).encode())[:5000], r"log\.csv\.gz: the gzip stream ends too early; the file is truncated$"),
    ("log.jsonl", '{"user_id":1,"item_id":2,"timestamp":3}\n{"user_id":1\n', r"log\.jsonl: line 2 is not valid JSON"),
    ("log.jsonl", b'{"user_id":"\xe9","item_id":2,"timestamp":3}\n', r"log\.jsonl: line 1 is not valid JSON \(invalid UTF-8"),
    ("log.jsonl", b'\xef\xbb\xbf{"user_id":1}\n', r"log\.jsonl: starts with a byte order mark"),
    ("log.jsonl", "5\n", r"log\.jsonl: holds no JSON objects"),
    ("log.jsonl", '{"user_id":1.5,"item_id":2,"timestamp":3}\n', r"column 'user_id' holds floating-point numbers"),
    ("log.jsonl", '{"user_id":1,"item_id":[2],"timestamp":3}\n', r"column 'item_id' holds nested values"),
    ("log.jsonl", '{"user_id":1,"item_id":2,"timestamp":3}\n{"user_id":"1","item_id":2,"timestamp":3}\n', r"column 'user_id' mixes integers and strings"),
    ("log.jsonl", '{"user_id":18446744073709551615,"item_id":2,"timestamp":3}\n', r"'18446744073709551615' \(.*log\.jsonl, row 1\) is not a 64-bit integer id"),
    ("log.parquet", b"PAR1 not really", r"log\.parquet: is not a readable Parquet file"),
    ("log.parquet", b"", r"log\.parquet: is empty$"),
    ("log.xlsx", "x", r"log\.xlsx: its name ends in none of \.parquet, "),
    ("log.csv", HEADER + "1,2,-5\n", r"column 'timestamp': -5 \(.*log\.csv, row 1\), read as s, is not a time from 1970 to 2200"),
    ("log.csv", HEADER + "1,2,3\n1,2,2201-01-01\n1,2,2020-01-01\n1,2,2020-01-02\n", r"2201-01-01 \(.*log\.csv, row 2\), read as iso"),
    ("log.csv", HEADER + "1,2,1969-12-31T23:59:59Z\n", r"1969-12-31T23:59:59Z .* is not a time from 1970"),
    ("log.csv", HEADER + "1,2,99999999999\n", r"99999999999 .*, read as s, is not a time"),
    ("log.csv", HEADER + "1,2,1600000000000000000\n", r"numbers too large for microseconds"),
    ("log.csv", HEADER + "1,2,1600000000\n" * 2 + "1,2,1600000000000\n", r"mixes magnitudes of time: 2 like seconds, 1 like milliseconds, e\.g\. 1600000000000 \(.*log\.csv, row 3\); give time_unit"),
    ("log.csv", HEADER + "1,2,soon\n1,2,later\n1,2,1600000000\n", r"2 of 3 rows have no usable user, item or time \(2 unparsable time\); are the right columns mapped\?"),
    ("log.csv", HEADER + "1,,\n1,,3\n,2,3\n1,2,3\n", r"3 of 4 rows .*\(1 missing user, 2 missing item\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), REFUSED)
def test_a_log_that_cannot_be_used_is_refused(tmp_path: Path, name: str, content: str | bytes, sentence: str) -> None:
    log = write(tmp_path / "in" / name, content)
    with pytest.raises(DataError, match=sentence) as caught:
        ingest(log, tmp_path / "out" / "dataset")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "dataset").exists()
    assert not list((tmp_path / "out").iterdir())


WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("user_id", pa.array([1.0]), r"column 'user_id' holds floating-point numbers .*Int64\); ids must be"),
    ("item_id", pa.array([True]), r"column 'item_id' holds booleans; ids must be integers or strings"),
    ("item_id", pa.array([[1]]), r"column 'item_id' holds nested values"),
    ("user_id", pa.array([0], pa.timestamp("s")), r"column 'user_id' holds times"),
    ("user_id", pa.nulls(1), r"column 'user_id' is empty in every row"),
    ("user_id", pa.array([2**63], pa.uint64()), r"'9223372036854775808' .* is not a 64-bit integer id"),
    ("user_id", pa.array([b"\xff"]), r"Invalid string encoding .*log\.parquet"),
    ("timestamp", pa.array([True]), r"column 'timestamp' holds booleans, not times"),
    ("timestamp", pa.array([[1]]), r"column 'timestamp' holds nested values, not times"),
    ("timestamp", pa.array([-1], pa.timestamp("s")), r"is not a time from 1970 to 2200"),
    ("action", pa.array([[1]]), r"column 'action' holds nested values, which cannot be actions"),
]


@pytest.mark.parametrize(("name", "column", "sentence"), WRONG_TYPES)
def test_a_column_of_the_wrong_type_is_refused(tmp_path: Path, name: str, column: Any, sentence: str) -> None:
    columns = {"user_id": [1], "item_id": [1], "timestamp": [1]} | {name: column}
    log = write_parquet(tmp_path / "log.parquet", columns)
    with pytest.raises(DataError, match=sentence):
        ingest(log, tmp_path / "out")


WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"positive": ("like",)}, r"positive: no action is 'like'; column 'action' has the values buy, view"),
    ({"positive": (">=4",)}, r"positive: '>=4' compares numbers, but column 'action' holds text: buy, view"),
    ({"positive": ("like",), "action": ""}, r"positive values are named, but the log has no action column"),
    ({"action": "rating"}, r"has no column 'rating' for actions"),
    ({"time_unit": "iso"}, r"rows have no usable user, item or time"),
    ({"user_type": "integer"}, r"column 'user_id': 'u' \(.*row 1\) is not a 64-bit integer id"),
    ({"columns": ("a", "b", "c", "d")}, r"has no column 'user_id' for user ids; it has a, b, c, d"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG_OPTIONS)
def test_a_schema_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp,action\nu,2,{DAY},buy\nu,2,{DAY},view\n")
    with pytest.raises(DataError, match=sentence):
        ingest(log, tmp_path / "out", schema=EventSchema(**options))


def test_numbers_without_a_match_are_named(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp,action\n1,2,{DAY},5\n1,2,{DAY},10\n")
    with pytest.raises(DataError, match=r"positive: no action is '>10'; column 'action' has the values 5, 10"):
        ingest(log, tmp_path / "out", schema=EventSchema(positive=(">10",)))


def test_typed_times_refuse_a_unit(tmp_path: Path) -> None:
    log = write_parquet(tmp_path / "a.parquet", {"user_id": [1], "item_id": [1], "timestamp": [datetime.now(UTC)]})
    with pytest.raises(DataError, match="holds typed times; leave time_unit at auto instead of 'ms'"):
        ingest(log, tmp_path / "out", schema=EventSchema(time_unit="ms"))
    log = write_parquet(tmp_path / "b.parquet", {"user_id": [1], "item_id": [1], "timestamp": [1]})
    with pytest.raises(DataError, match="holds numbers, but time_unit is iso"):
        ingest(log, tmp_path / "out", schema=EventSchema(time_unit="iso"))
    with pytest.raises(DataError, match="delimiter and columns are for delimited text, not for parquet"):
        ingest(log, tmp_path / "out", schema=EventSchema(delimiter=";"))


def test_folders_without_one_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        ingest(tmp_path / "nowhere", tmp_path / "out")
    write(tmp_path / "log" / "readme.md", "x")
    with pytest.raises(DataError, match=r"log: no file in the folder ends in .*; found readme\.md"):
        ingest(tmp_path / "log", tmp_path / "out")
    write(tmp_path / "log" / "a.csv", "")
    with pytest.raises(DataError, match="log: all 1 files are empty"):
        ingest(tmp_path / "log", tmp_path / "out")
    write(tmp_path / "log" / "b.jsonl", "")
    with pytest.raises(DataError, match=r"log: the folder mixes formats: text \(a\.csv\), json \(b\.jsonl\)"):
        ingest(tmp_path / "log", tmp_path / "out")


def test_files_that_disagree_on_a_type_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "log/1.parquet", {"user_id": [1], "item_id": [1], "timestamp": [1]})
    write_parquet(tmp_path / "log/2.parquet", {"user_id": ["1"], "item_id": [1], "timestamp": [1]})
    with pytest.raises(DataError, match=r"column 'user_id' holds integer values in .*1\.parquet but text values in"):
        ingest(tmp_path / "log", tmp_path / "out")
    write(tmp_path / "text/1.csv", HEADER + "1,2,3\n")
    write(tmp_path / "text/2.csv", "user_id,item_id\n1,2\n")
    with pytest.raises(DataError, match=r"2\.csv: has no column 'timestamp' for times; it has user_id, item_id"):
        ingest(tmp_path / "text", tmp_path / "out")


def test_memory_must_be_a_size(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + "1,2,3\n")
    with pytest.raises(ConfigError, match="memory: 'lots' is not a size such as '2GB'"):
        ingest(log, tmp_path / "out", memory="lots")
    assert not (tmp_path / "out").exists()


def test_only_a_dataset_folder_is_replaced(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + f"1,2,{DAY}\n")
    first = ingest(log, tmp_path / "out")
    with pytest.raises(DataError, match="out: exists already"):
        ingest(log, tmp_path / "out")
    write(log, HEADER + f"1,3,{DAY}\n")
    second = ingest(log, tmp_path / "out", replace=True)
    assert second.vocabulary.ids.to_pylist() == [3]
    assert second.info.fingerprint != first.info.fingerprint
    write(log, "")
    with pytest.raises(DataError, match="is empty"):
        ingest(log, tmp_path / "out", replace=True)
    assert Dataset(tmp_path / "out").info == second.info
    write(tmp_path / "precious" / "thesis.txt", "x")
    write(log, HEADER + f"1,3,{DAY}\n")
    with pytest.raises(DataError, match="precious: is not a dataset folder, so it is not replaced"):
        ingest(log, tmp_path / "precious", replace=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_progress_names_the_stages_and_ends_at_one(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + "".join(f"{n % 9},{n},{DAY + n}\n" for n in range(1000)))
    calls: list[tuple[str, float]] = []
    ingest(log, tmp_path / "out", progress=lambda stage, share: calls.append((stage, share)))
    assert list(dict.fromkeys(stage for stage, _ in calls)) == ["read", "check", "codes", "sort", "write"]
    assert all(0 <= share <= 1 for _, share in calls)
    assert calls[-1] == ("write", 1.0)


def test_the_same_log_gives_the_same_fingerprint(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + "".join(f"{n % 9},{n % 31},{DAY + n % 50}\n" for n in range(5000)))
    one, two = (ingest(log, tmp_path / name, memory=memory) for name, memory in (("a", "2GB"), ("b", "300MB")))
    assert one.info == two.info
