"""Ids to rows and back, for both kinds of ids, and files that are no vocabularies."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.columns import as_numpy, map_columns, write_columns
from retrieval.data.vocabulary import Vocabulary, id_positions, integers_of
from retrieval.errors import DataError

INTEGERS = [7, 2**53 + 1, -3, 2**53, 2**63 - 1]
STRINGS = ["b", "", "é", "10", "9", "😀"]


@pytest.mark.parametrize("ids", [INTEGERS, STRINGS], ids=["integers", "strings"])
def test_ids_and_rows_map_both_ways_after_a_round_trip_through_a_file(tmp_path: Path, ids: list[Any]) -> None:
    Vocabulary(pa.array(ids), {"title": pa.array([None, *ids[1:]])}).save(tmp_path / "vocabulary.arrow")
    vocabulary = Vocabulary.load(tmp_path / "vocabulary.arrow")
    assert len(vocabulary) == len(ids)
    assert vocabulary.has_string_ids == (ids is STRINGS)
    assert vocabulary.rows_of(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
    assert vocabulary.rows_of(ids).dtype == np.int64
    assert vocabulary.ids_of(np.array([1, 0, 1])) == [ids[1], ids[0], ids[1]]
    assert vocabulary.attributes["title"].to_pylist() == [None, *ids[1:]]
    assert vocabulary.rows_of([]).tolist() == []


def test_unknown_ids_and_ids_of_another_kind_have_no_row() -> None:
    integers = Vocabulary(pa.array(INTEGERS))
    strings = Vocabulary(pa.array(STRINGS))
    assert integers.rows_of([8, 2**53 + 2, 7]).tolist() == [-1, -1, 0]
    assert integers.rows_of(["7"]).tolist() == [-1]
    assert strings.rows_of([10, 9]).tolist() == [-1, -1]
    assert strings.rows_of(["nothing", "10"]).tolist() == [-1, 3]
    assert Vocabulary(pa.array([], pa.int64())).rows_of([1]).tolist() == [-1]
    assert Vocabulary(pa.array([], pa.string())).rows_of(["1"]).tolist() == [-1]


def test_one_impossible_integer_does_not_hide_the_others() -> None:
    vocabulary = Vocabulary(pa.array(INTEGERS))
    # Together with 2**63, numpy would make them unsigned, and with 2**70 objects.
    assert vocabulary.rows_of([2**53 + 1, 2**63]).tolist() == [1, -1]
    assert vocabulary.rows_of([2**53 + 1, 2**70, -(2**70)]).tolist() == [1, -1, -1]
    mixed: list[Any] = [7, "7", None, True, 7.0]
    assert vocabulary.rows_of(mixed).tolist() == [0, -1, -1, -1, -1]
    assert vocabulary.rows_of(np.array([2**53, 2**64 - 1], np.uint64)).tolist() == [3, -1]


def test_integers_are_told_from_what_only_looks_like_them() -> None:
    values, fits = integers_of([1, -(2**63), 2**63, True, 1.0, "1", np.int32(4)])
    assert values.tolist() == [1, -(2**63), 0, 0, 0, 0, 4]
    assert fits.tolist() == [True, True, False, False, False, False, True]


def test_equal_scores_are_ordered_by_ids_not_by_rows() -> None:
    assert Vocabulary(pa.array(INTEGERS)).rank_by_id.tolist() == [1, 3, 0, 2, 4]
    assert Vocabulary(pa.array(STRINGS)).rank_by_id.tolist() == [3, 0, 4, 1, 2, 5]


@pytest.mark.parametrize("ids", [INTEGERS, STRINGS], ids=["integers", "strings"])
def test_positions_are_found_by_bisection(ids: list[Any]) -> None:
    ordered = sorted(ids, key=str.encode if ids is STRINGS else int)
    known = pa.array(ordered)
    unknown = "zz" if ids is STRINGS else 5
    assert id_positions(known, pa.array([*ordered, unknown])).tolist() == [*range(len(ids)), -1]
    assert id_positions(known[:0], pa.array(ids)).tolist() == [-1] * len(ids)
    assert id_positions(pa.array(["a"]), pa.array([None, "a"])).tolist() == [-1, 0]


def test_a_vocabulary_refuses_other_ids_and_uneven_attributes() -> None:
    with pytest.raises(DataError, match="item ids must be int64 or string, not int32"):
        Vocabulary(pa.array([1], pa.int32()))
    with pytest.raises(DataError, match="attribute 'title' has 2 rows instead of 1"):
        Vocabulary(pa.array([1]), {"title": pa.array(["a", "b"])})


@pytest.mark.parametrize("ids", [[5, 2**62, 7, -1, 2**62], ["b", "ü", "a", "c", "ü"]])
def test_two_items_of_one_id_are_named(ids: list[Any]) -> None:
    Vocabulary(pa.array(ids[:4])).check_unique()
    Vocabulary(pa.array(ids)[:0]).check_unique()
    with pytest.raises(DataError, match=f"id {ids[1]!r} stands in rows 1 and 4"):
        Vocabulary(pa.array(ids)).check_unique()


def test_files_that_are_no_vocabularies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.arrow"
    with pytest.raises(DataError, match=r"vocabulary\.arrow: is missing"):
        Vocabulary.load(path)
    for content in (b"", b"ARROW1 no"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a readable Arrow file"):
            Vocabulary.load(path)
    write_columns(path, {"title": pa.array(["a"])})
    with pytest.raises(DataError, match="has no column 'id'"):
        Vocabulary.load(path)
    write_columns(path, {"id": pa.array([1, None])})
    with pytest.raises(DataError, match="column 'id' has 1 nulls"):
        Vocabulary.load(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"id": pa.int64()})) as writer:
        for _ in range(2):
            writer.write_batch(pa.record_batch({"id": pa.array([1])}))
    with pytest.raises(DataError, match="has 2 record batches instead of one"):
        Vocabulary.load(path)


def test_columns_share_the_file_and_must_be_plain_numbers(tmp_path: Path) -> None:
    path = tmp_path / "columns.arrow"
    write_columns(path, {"n": pa.array([1, 2], pa.int32()), "holes": pa.array([1, None]), "text": pa.array(["a", "b"])})
    batch = map_columns(path)
    numbers = as_numpy(batch, "n", path)
    assert (numbers.tolist(), numbers.dtype, numbers.flags.writeable) == ([1, 2], np.int32, False)
    for name, sentence in (
        ("gone", "has no column 'gone'"),
        ("holes", "column 'holes' has 1 nulls"),
        ("text", "column 'text' holds string values instead of numbers"),
    ):
        with pytest.raises(DataError, match=sentence):
            as_numpy(batch, name, path)
