"""Ids, times and actions: every way to write them, and what they become."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from retrieval.data.dataset import ActionValue
from retrieval.data.ingest import EventSchema, ingest
from retrieval.errors import DataError
from tests.data.logs import DAY, HEADER, histories, write, write_parquet

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
