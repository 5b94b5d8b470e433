"""Ingest: hand-written logs and the datasets that they become, every repair counted."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.data.dataset import ActionValue, Dataset
from retrieval.data.ingest import EventSchema, ItemSchema, ingest
from retrieval.data.vocabulary import RESERVED
from retrieval.errors import DataError
from tests.data.logs import DAY, HEADER, histories, repairs, write, write_parquet


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
        columns = {"user_id": users, "item_id": items, "timestamp": times}
        if part % 3 == 0:  # a part of other types is read by itself and must not lose its place
            columns = {"other": items, **columns, "user_id": users.astype(np.int32)}
        write_parquet(folder / "x.parquet", columns, row_group_size=3000)
    for part in range(8):
        table = pq.read_table(tmp_path / "log" / f"day={part}" / "x.parquet", partitioning=None)
        for user, thing in zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True):
            expected[user].append(thing)
    dataset = ingest(tmp_path / "log", tmp_path / "out")
    assert {user: [row[0] for row in rows] for user, rows in histories(dataset).items()} == expected
    assert dataset.info.tie_order == "file order"
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
    values: dict[str, list[Any]] = {schema.user: ["u"], schema.item: [5], schema.time: [DAY], "User": [1], "user": [2]}
    one = write_parquet(tmp_path / "log.parquet", values)
    two = write(tmp_path / "log.csv", 'User,user,"the ""user""",it\'s,"a,time; --"\n1,2,u,5,1600000000\n')
    three = write(tmp_path / "log.jsonl", json.dumps({name: value[0] for name, value in values.items()}) + "\n")
    for number, log in enumerate((one, two, three)):
        assert histories(ingest(log, tmp_path / f"out{number}", schema=schema)) == {"u": [(5, "", DAY)]}


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
        "events": pa.array(["concert", "fair"]),
    }
    items = write_parquet(tmp_path / "items.parquet", {"item_id": ["b", "c"], **attributes})
    dataset = ingest(log, tmp_path / "out", items=items)
    assert dataset.vocabulary.ids.to_pylist() == ["a", "b", "c"]
    for name, column in attributes.items():
        found = dataset.vocabulary.attributes[f"{name}_" if name in RESERVED else name]
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


def test_a_column_orders_events_of_equal_time(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.csv",
        "user_id,item_id,timestamp,place\n1,10,100,3\n1,20,100,-1.5\n1,30,100,3\n1,40,50,9\n1,50,100,1e1\n",
    )
    dataset = ingest(log, tmp_path / "d", schema=EventSchema(order="place"))
    names = dataset.vocabulary.ids.to_pylist()
    assert [names[row] for row in dataset.events.items] == [40, 20, 10, 30, 50]  # 10 and 30 tie: the log's order
    assert dataset.info.tie_order == "column place"
    assert dataset.info.repairs["out_of_order"] == 3  # what 40's place would put before it


@pytest.mark.parametrize("value", ["", "first", "nan"])
def test_a_row_without_a_place_in_the_order_is_an_error(tmp_path: Path, value: str) -> None:
    log = write(tmp_path / "log.csv", f"user_id,item_id,timestamp,place\n1,10,100,3\n1,20,100,{value}\n")
    with pytest.raises(DataError, match="column 'place' has no number to order by in row 2"):
        ingest(log, tmp_path / "d", schema=EventSchema(order="place"))


@pytest.mark.parametrize("text", [False, True], ids=["integers", "strings"])
def test_items_known_before_keep_their_rows_and_new_ones_follow(tmp_path: Path, text: bool) -> None:
    name = (lambda number: f"i{number}") if text else (lambda number: number)
    log = write(tmp_path / "log.csv", HEADER + "".join(f"1,{name(item)},{item}\n" for item in (9, 3, 5, 1)))
    items = write(tmp_path / "items.csv", "item_id,title\n" + "".join(f"{name(item)},T\n" for item in (4, 5, 7)))
    known = pa.array([name(item) for item in (5, 8, 7, 1)])
    dataset = ingest(log, tmp_path / "out", items=items, known=known)
    assert dataset.vocabulary.ids.to_pylist() == [name(item) for item in (5, 8, 7, 1, 3, 4, 9)]
    assert dataset.vocabulary.attributes["listed"].to_pylist() == [True, False, True, False, False, True, False]
    assert dataset.events.items.tolist() == [3, 4, 0, 6]
    assert dataset.item_counts.tolist() == [1, 0, 0, 1, 1, 0, 1]
    first = ingest(log, tmp_path / "first", known=known[:0])
    assert first.vocabulary.ids.to_pylist() == [name(item) for item in (1, 3, 5, 9)]
    assert "listed" not in first.vocabulary.attributes, "nothing was there to list them"


def test_items_known_before_must_have_ids_of_the_same_kind(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", HEADER + "1,book,2\n")
    with pytest.raises(DataError, match="'item_id' holds strings, but the items known before have integers as ids"):
        ingest(log, tmp_path / "out", known=pa.array([5]))
