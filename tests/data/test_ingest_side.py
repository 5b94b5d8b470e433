"""Context and auxiliary series on their way from files into a dataset."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.data.dataset import Dataset
from retrieval.data.features import FeatureSchema, SideColumn
from retrieval.data.ingest import EventSchema, SeriesSchema, UserSchema, ingest
from retrieval.errors import ConfigError, DataError
from retrieval.types import TokenKind
from tests.data.logs import DAY, write

LOG = (
    "user_id,item_id,timestamp,region,device\n"
    f"7,30,{DAY + 40},north,phone\n"
    f"7,10,{DAY + 10},south,\n"
    f"7,20,{DAY + 20},south,desk\n"
    f"7,20,{DAY + 30},,desk\n"
    f"7,10,{DAY + 35},south,desk\n"
    f"2,20,{DAY},north,phone\n"
    f"2,10,{DAY},east,phone\n"
    f"2,30,{DAY + 1},north,phone\n"
)
USERS = "7::M::25\n2::F::\n9::F::18\n7::F::1\n"
FEATURES = FeatureSchema(
    context={"sex": SideColumn(), "age": SideColumn()},
    auxiliary={"region": SideColumn(min_count=2), "device": SideColumn()},
)
COLUMNS = UserSchema(user="id", columns=("id", "sex", "age"))


def small(folder: Path, features: FeatureSchema = FEATURES) -> Dataset:
    log, users = write(folder / "log.csv", LOG), write(folder / "users.dat", USERS)
    return ingest(log, folder / "data", users=users, user_schema=COLUMNS, features=features)


@pytest.mark.parametrize(
    ("most", "items", "events", "left_out"),
    [(4, [10, 20, 30, 77], 8, {}), (3, [10, 30, 77], 5, {"items_left_out": 1, "events_of_items_left_out": 3})],
)
def test_of_more_items_than_allowed_those_met_longest_ago_are_left_out(
    tmp_path: Path, most: int, items: list[int], events: int, left_out: dict[str, int]
) -> None:
    """Item 77 is only in the items' file and counts as new; 30 was met last, 20 longest ago."""
    log, people = write(tmp_path / "log.csv", LOG), write(tmp_path / "users.dat", USERS)
    described = write(tmp_path / "items.csv", "item_id,title\n77,new\n20,old\n")
    features = FEATURES.model_copy(update={"max_items": most})
    dataset = ingest(log, tmp_path / "data", items=described, users=people, user_schema=COLUMNS, features=features)
    assert dataset.vocabulary.ids.to_pylist() == items
    assert dataset.info.events == events
    assert {name: count for name, count in dataset.info.repairs.items() if "left_out" in name} == left_out
    assert dataset.vocabulary.attributes["title"].to_pylist() == [{77: "new", 20: "old"}.get(item) for item in items]
    side = dataset.side(np.arange(2), dataset.offsets[1:])
    assert side is not None
    assert side.context.tolist() == [[1, 0], [2, 1]]


def test_items_that_stay_must_have_events(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", LOG)
    described = write(tmp_path / "items.csv", "item_id,title\n77,new\n78,new\n")
    with pytest.raises(DataError, match="max_items: the 2 items that stay have no events; 5 are known"):
        ingest(log, tmp_path / "data", items=described, features=FeatureSchema(max_items=2))


def events_of(dataset: Dataset, user: int, end: int) -> list[tuple[str, str, int]]:
    side = dataset.side(np.array([user]), np.array([end]))
    assert side is not None
    part = slice(int(side.starts[0]), int(side.ends[0]))
    found = []
    for kind, value, time in zip(side.kinds[part], side.values[part], side.timestamps[part], strict=True):
        told = dataset.info.kinds[kind - 1]
        found.append((told.name, ("?", *told.values)[value], int(time) - DAY))
    return found


def test_values_are_numbered_by_how_often_they_are_met(tmp_path: Path) -> None:
    assert small(tmp_path).info.kinds == (
        TokenKind(name="sex", context=True, values=("F", "M")),
        TokenKind(name="age", context=True, values=("25",)),
        TokenKind(name="region", context=False, values=("north", "south")),  # `east` is met once
        TokenKind(name="device", context=False, values=("phone", "desk")),
    )


def test_a_series_keeps_the_first_event_of_each_run(tmp_path: Path) -> None:
    dataset = small(tmp_path)
    assert events_of(dataset, 1, 8) == [
        ("region", "south", 10),
        ("device", "desk", 20),
        ("region", "north", 40),
        ("device", "phone", 40),
    ]
    assert events_of(dataset, 0, 3) == [
        ("region", "north", 0),
        ("region", "?", 0),
        ("device", "phone", 0),
        ("region", "north", 1),
    ]


def test_what_is_recorded_with_an_event_is_not_known_before_it(tmp_path: Path) -> None:
    dataset = small(tmp_path)
    assert events_of(dataset, 1, 7) == [("region", "south", 10), ("device", "desk", 20)]
    assert events_of(dataset, 1, 3) == []
    assert events_of(dataset, 0, 2) == [("region", "north", 0), ("region", "?", 0), ("device", "phone", 0)]


def test_context_is_the_users_first_row_and_0_where_nothing_is_known(tmp_path: Path) -> None:
    side = small(tmp_path).side(np.array([0, 1]), np.array([3, 8]))
    assert side is not None
    assert side.context.tolist() == [[1, 0], [2, 1]]


def test_the_main_series_and_the_fingerprint(tmp_path: Path) -> None:
    rich = small(tmp_path / "rich")
    plain = ingest(tmp_path / "rich/log.csv", tmp_path / "plain")
    assert plain.side(np.array([0]), np.array([1])) is None
    assert np.array_equal(rich.events.items, plain.events.items)
    assert rich.info.fingerprint != plain.info.fingerprint


def test_series_alone_and_context_alone(tmp_path: Path) -> None:
    log, users = write(tmp_path / "log.csv", LOG), write(tmp_path / "users.dat", USERS)
    series = ingest(log, tmp_path / "a", features=FeatureSchema(auxiliary={"device": SideColumn(max_values=1)}))
    assert series.info.kinds == (TokenKind(name="device", context=False, values=("phone",)),)
    assert [value for _, value, _ in events_of(series, 1, 8)] == ["?", "phone"]
    features = FeatureSchema(context={"sex": SideColumn()})
    context = ingest(log, tmp_path / "b", users=users, user_schema=COLUMNS, features=features)
    assert events_of(context, 1, 8) == []


POINTS = (
    "user_id,series,value,timestamp\n"
    f"7,author,anna,{DAY + 5}\n"
    f"7,author,ben,{DAY + 20}\n"
    f"7,author,ben,{DAY + 25}\n"
    f"2,author,anna,{DAY - 60}\n"
    f"7,device,watch,{DAY + 38}\n"
    f"99,author,carl,{DAY}\n"  # no user of the event log
    f"7,,anna,{DAY}\n7,author,,{DAY}\n7,author,anna,\n,author,anna,{DAY}\n7,mood,low,{DAY}\n"
)
OWN = FeatureSchema(auxiliary={"author": SideColumn(), "device": SideColumn()})


def test_a_series_may_have_a_log_of_its_own_or_be_in_both(tmp_path: Path) -> None:
    log, points = write(tmp_path / "log.csv", LOG), write(tmp_path / "points.csv", POINTS)
    dataset = ingest(log, tmp_path / "out", series=points, features=OWN)
    assert dataset.info.kinds == (
        TokenKind(name="author", context=False, values=("anna", "ben", "carl")),
        TokenKind(name="device", context=False, values=("phone", "desk", "watch")),
    )
    assert events_of(dataset, 1, 8) == [
        ("author", "anna", 5),
        ("author", "ben", 20),
        ("device", "desk", 20),
        ("device", "watch", 38),
        ("device", "phone", 40),
    ]
    assert events_of(dataset, 0, 3) == [("author", "anna", -60), ("device", "phone", 0)]
    assert dataset.info.repairs["series_rows_passed_over"] == 5
    assert str(points) in dataset.info.sources
    assert dataset.info.users == 2


def test_a_log_of_series_as_it_comes(tmp_path: Path) -> None:
    """Other names and formats, string ids, and a column of the event log that is not there."""
    log = write(tmp_path / "log.csv", LOG.replace("region", "place"))
    lines = [
        f'{{"who": "7", "of": "region", "is": "north", "at": "2024-01-01T00:00:{second:02}Z"}}\n' for second in (9, 3)
    ]
    points = write(tmp_path / "points.jsonl", "".join(lines))
    features = FeatureSchema(auxiliary={"region": SideColumn()})
    schema = SeriesSchema(user="who", series="of", value="is", time="at")
    ids = EventSchema(user_type="string")
    dataset = ingest(log, tmp_path / "out", schema=ids, series=points, series_schema=schema, features=features)
    told = dataset.side(np.array([1]), np.array([8]))
    assert told is not None
    assert told.values.tolist() == [1]
    assert told.timestamps.tolist() == [1_704_067_203]


def test_a_log_of_series_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    log, points = write(tmp_path / "log.csv", LOG), write(tmp_path / "points.csv", POINTS)
    with pytest.raises(ConfigError, match=r"points.csv: the features declare no auxiliary series"):
        ingest(log, tmp_path / "out", series=points)
    with pytest.raises(DataError, match=r"points.csv: has no usable row of series 'moods', which is no column"):
        ingest(log, tmp_path / "out", series=points, features=FeatureSchema(auxiliary={"moods": SideColumn()}))
    with pytest.raises(DataError, match=r"log.csv: has no column 'value' for a series"):
        ingest(log, tmp_path / "out", series=log, series_schema=SeriesSchema(series="region"), features=OWN)
    bad = write(tmp_path / "bad.csv", POINTS + f"x,author,anna,{DAY}\n")
    with pytest.raises(DataError, match=r"'x' .* is not a 64-bit integer id"):
        ingest(log, tmp_path / "out", series=bad, features=OWN)
    late = write(tmp_path / "late.csv", "user_id,series,value,timestamp\n7,author,anna,99999999999999999999\n")
    with pytest.raises(DataError, match=r"late.csv: column 'timestamp' holds numbers too large"):
        ingest(log, tmp_path / "out", series=late, features=OWN)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    log, users = write(tmp_path / "log.csv", LOG), write(tmp_path / "users.dat", USERS)
    with pytest.raises(ConfigError, match="context: sex, age must come from a users' file"):
        ingest(log, tmp_path / "out", features=FEATURES)
    with pytest.raises(ConfigError, match="declare no context"):
        ingest(log, tmp_path / "out", users=users)
    with pytest.raises(DataError, match=r"has no column 'regoin' for a series.*did you mean 'region'"):
        ingest(log, tmp_path / "out", features=FeatureSchema(auxiliary={"regoin": SideColumn()}))
    with pytest.raises(DataError, match=r"'x' .* is not a 64-bit integer id"):
        ingest(
            log,
            tmp_path / "out",
            users=write(tmp_path / "u.dat", "x::M::1\n"),
            user_schema=COLUMNS,
            features=FEATURES,
        )
    short = write(tmp_path / "v.dat", "7::M\n")
    schema = UserSchema(user="id", columns=("id", "sex"))
    with pytest.raises(DataError, match="has no column 'age'"):
        ingest(log, tmp_path / "out", users=short, user_schema=schema, features=FEATURES)


def test_ids_of_users_match_as_strings_too(tmp_path: Path) -> None:
    log, users = write(tmp_path / "log.csv", LOG), write(tmp_path / "users.dat", USERS)
    schema = EventSchema(user_type="string")
    dataset = ingest(log, tmp_path / "out", schema=schema, users=users, user_schema=COLUMNS, features=FEATURES)
    side = dataset.side(np.array([0, 1]), np.array([3, 8]))
    assert side is not None
    assert side.context.tolist() == [[1, 0], [2, 1]]


@pytest.mark.parametrize("name", ["context", "auxiliary", "ends"])
def test_a_folder_whose_parts_do_not_belong_together_is_refused(tmp_path: Path, name: str) -> None:
    folder = small(tmp_path / "one").path
    text = "user_id,item_id,timestamp,region,device\n7,30,1,a,b\n7,20,2,a,b\n"
    log = write(tmp_path / "log.csv", text)
    other = ingest(log, tmp_path / "other", users=tmp_path / "one/users.dat", user_schema=COLUMNS, features=FEATURES)
    (folder / f"{name}.arrow").write_bytes((other.path / f"{name}.arrow").read_bytes())
    with pytest.raises(DataError, match="are not those of 2 users"):
        Dataset(folder)
    (folder / f"{name}.arrow").unlink()
    with pytest.raises(DataError, match=f"{name}.arrow: is missing"):
        Dataset(folder)
