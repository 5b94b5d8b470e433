"""Logs, columns and options that ingest refuses, each with its sentence, and that nothing is left behind."""

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from retrieval.data.ingest import EventSchema, ingest
from retrieval.errors import ConfigError, DataError
from tests.data.logs import DAY, HEADER, write, write_parquet

ROW = '{"user_id":1,"item_id":2,"timestamp":3}\n'
TRUNCATED = gzip.compress((HEADER + "".join(f"{n},{n * n % 101},{n}\n" for n in range(9999))).encode())[:5000]

REFUSED: list[tuple[str, str | bytes, str]] = [
    ("log.csv", "", r"log\.csv: is empty$"),
    ("log.csv", HEADER, r"log\.csv: has no events"),
    ("log.csv", "\n" + HEADER, r"log\.csv: line 1 is blank"),
    (
        "log.csv",
        "user_idx,item_id,timestamp\n1,2,3\n",
        r"no column 'user_id' .* it has user_idx, .*; did you mean 'user_idx'\?",
    ),
    ("log.csv", "user_id,item_id,item_id,timestamp\n1,2,2,3\n", r"names column 'item_id' more than once"),
    ("log.csv", HEADER + "1,2,3\n4,5\n", r"log\.csv: line 3 has 2 fields instead of 3$"),
    ("log.csv", HEADER + "1,2,3,4\n", r"log\.csv: line 2 has 4 fields instead of 3$"),
    ("log.csv", HEADER + '1,"2,3\n', r"log\.csv: line 2: a quote is never closed$"),
    ("log.csv", (HEADER + "1,é,3\n").encode("latin-1"), r"log\.csv: line 2 is not UTF-8; .* encoding latin-1$"),
    ("log.csv", "usér_id,item_id\n".encode("latin-1"), r"log\.csv: line 1 is not UTF-8; .* encoding latin-1$"),
    ("log.csv.gz", b"no gzip", r"log\.csv\.gz: is not a whole gzip file"),
    ("log.csv.gz", TRUNCATED, r"log\.csv\.gz: the gzip stream ends too early; the file is truncated$"),
    ("log.jsonl", ROW + '{"user_id":1\n', r"log\.jsonl: line 2 is not valid JSON"),
    (
        "log.jsonl",
        b'{"user_id":"\xe9","item_id":2,"timestamp":3}\n',
        r"log\.jsonl: line 1 is not valid JSON \(invalid UTF",
    ),
    (
        "log.jsonl",
        b"\xef\xbb\xbf" + ROW.encode(),
        r"log\.jsonl: starts with a byte order mark",
    ),
    ("log.jsonl", "5\n", r"log\.jsonl: holds no JSON objects"),
    ("log.jsonl", '{"user_id":1.5,"item_id":2,"timestamp":3}\n', r"column 'user_id' holds floating-point numbers"),
    (
        "log.jsonl",
        '{"user_id":1,"item_id":[2],"timestamp":3}\n',
        r"column 'item_id' holds values that are neither text nor numbers",
    ),
    (
        "log.jsonl",
        ROW + '{"user_id":"1","item_id":2,"timestamp":3}\n',
        r"column 'user_id' mixes integers and strings",
    ),
    (
        "log.jsonl",
        '{"user_id":18446744073709551615,"item_id":2,"timestamp":3}\n',
        r"'18446744073709551615' \(.*log\.jsonl, row 1\) is not a 64-bit integer id",
    ),
    ("log.parquet", b"PAR1 not really", r"log\.parquet: is not a readable Parquet file"),
    ("log.parquet", b"", r"log\.parquet: is empty$"),
    ("log.xlsx", "x", r"log\.xlsx: its name ends in none of \.parquet, "),
    ("log.csv", HEADER + "1,2,-5\n", r"column 'timestamp': -5 \(.*log\.csv, row 1\), read as s, is not a time"),
    (
        "log.csv",
        HEADER + "1,2,3\n1,2,2201-01-01\n1,2,2020-01-01\n1,2,2020-01-02\n",
        r"2201-01-01 \(.*log\.csv, row 2\), read as iso",
    ),
    ("log.csv", HEADER + "1,2,1969-12-31T23:59:59Z\n", r"1969-12-31T23:59:59Z .* is not a time from 1970"),
    ("log.csv", HEADER + "1,2,99999999999\n", r"99999999999 .*, read as s, is not a time"),
    ("log.csv", HEADER + "1,2,1600000000000000000\n", r"numbers too large for microseconds"),
    (
        "log.csv",
        HEADER + "1,2,1600000000\n" * 2 + "1,2,1600000000000\n",
        r"magnitudes of time: 2 like seconds, 1 like milliseconds, e\.g\. 1600000000000 \(.*row 3\); give time_unit",
    ),
    (
        "log.csv",
        HEADER + "1,2,soon\n1,2,later\n1,2,1600000000\n",
        r"2 of 3 rows have no usable .* \(2 unparsable time\); are the right columns mapped\?",
    ),
    ("log.csv", HEADER + "1,,\n1,,3\n,2,3\n1,2,3\n", r"3 of 4 rows .*\(1 missing user, 2 missing item\)"),
]


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
    ("item_id", pa.array([[1]]), r"column 'item_id' holds values that are neither text nor numbers"),
    ("user_id", pa.array([0], pa.timestamp("s")), r"column 'user_id' holds times"),
    ("user_id", pa.nulls(1), r"column 'user_id' is empty in every row"),
    ("user_id", pa.array([2**63], pa.uint64()), r"'9223372036854775808' .* is not a 64-bit integer id"),
    ("user_id", pa.array([b"\xff"]), r"Invalid string encoding .*log\.parquet"),
    ("timestamp", pa.array([True]), r"column 'timestamp' holds booleans, not times"),
    ("timestamp", pa.array([[1]]), r"column 'timestamp' holds values that are neither text nor numbers, not times"),
    ("timestamp", pa.array([-1], pa.timestamp("s")), r"is not a time from 1970 to 2200"),
    (
        "action",
        pa.array([[1]]),
        r"column 'action' holds values that are neither text nor numbers, which cannot be actions",
    ),
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


def test_too_little_memory_is_told_as_such(tmp_path: Path) -> None:
    columns = {"user_id": list(range(50_000)), "item_id": list(range(50_000)), "timestamp": [DAY] * 50_000}
    log = write_parquet(tmp_path / "log.parquet", columns)
    with pytest.raises(ConfigError, match="memory: 1MB is not enough for this log"):
        ingest(log, tmp_path / "out", memory="1MB")
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"delimiter": ""}, "delimiter: .* 1 to 4 bytes"),
        ({"delimiter": ":::::"}, "delimiter: .* 1 to 4 bytes"),
        ({"quote": "ab"}, "quote: .* one character"),
        ({"columns": ["a", "a"]}, "columns: .* once each"),
        ({"encoding": "utf-7"}, "encoding: "),
        ({"time_unit": "days"}, "time_unit: "),
        ({"users": "u"}, "users: Extra inputs"),
    ],
)
def test_an_impossible_schema_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"log.toml: {sentence}"):
        EventSchema.parse(values, "log.toml")
