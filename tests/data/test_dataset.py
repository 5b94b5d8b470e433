"""A dataset folder read back, and folders that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.columns import write_columns
from retrieval.data.dataset import Dataset, fingerprint_of
from retrieval.errors import ConfigError, DataError
from tests.support import write_dataset

HISTORIES = [[(0, 1, 10), (1, 2, 20)], [(1, 1, 5)], [(2, 0, 1), (1, 1, 1), (2, 1, 3)]]


def with_user_ids(folder: Path, ids: pa.Array) -> Dataset:
    """The folder's dataset under other user ids."""
    write_columns(folder / "users.arrow", {"id": ids, "end": pa.array([2, 3, 6])})
    return Dataset(folder)


def rewrite_info(folder: Path, **changes: Any) -> None:
    file = folder / "dataset.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in (values | changes).items() if value is not None}))


def test_events_belong_to_users_by_their_offsets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", HISTORIES, ["x", "y", "z"])
    dataset = Dataset(tmp_path / "d")
    assert len(dataset) == 3
    assert dataset.offsets.tolist() == [0, 2, 3, 6]
    assert dataset.events.items.tolist() == [0, 1, 1, 2, 1, 2]
    assert dataset.events.actions.tolist() == [1, 2, 1, 0, 1, 1]
    assert dataset.events.timestamps.tolist() == [10, 20, 5, 1, 1, 3]
    assert (dataset.events.items.dtype, dataset.events.actions.dtype) == (np.int32, np.uint8)
    assert dataset.item_counts.tolist() == [1, 3, 2]
    assert dataset.positive.tolist() == [action.positive for action in dataset.info.actions]
    assert not dataset.events.items.flags.writeable


def test_users_are_found_by_integer_or_string_ids(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3])
    integers = with_user_ids(tmp_path / "d", pa.array([-5, 2**53, 2**53 + 1]))
    assert integers.users_named([2**53 + 1, 7, -5, 2**53]).tolist() == [2, -1, 0, 1]
    assert integers.users_named(["-5"]).tolist() == [-1]
    assert integers.users_named([-5, 2**70]).tolist() == [0, -1]
    assert integers.users_named([]).tolist() == []
    strings = with_user_ids(tmp_path / "d", pa.array(["10", "9", "é"]))
    assert strings.users_named(["é", "9", "", "10", "e"]).tolist() == [2, 1, -1, 0, -1]
    assert strings.users_named([9]).tolist() == [-1]
    assert strings.users_named(["\ud800", "9"]).tolist() == [-1, 1]


def test_the_fingerprint_covers_users_items_and_events(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", HISTORIES, [1, 2, 3]).path
    same = write_dataset(tmp_path / "b", HISTORIES, [1, 2, 3]).path
    other_items = write_dataset(tmp_path / "c", HISTORIES, [1, 2, 4]).path
    other_events = write_dataset(tmp_path / "d", [*HISTORIES[:2], [(2, 0, 1), (1, 1, 2), (2, 1, 3)]], [1, 2, 3]).path
    assert fingerprint_of(first) == fingerprint_of(same)
    assert len({fingerprint_of(folder) for folder in (first, other_items, other_events)}) == 3
    with_user_ids(same, pa.array([0, 1, 3]))
    assert fingerprint_of(first) != fingerprint_of(same)


def test_folders_that_are_no_datasets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a dataset folder \(dataset\.json is missing\)"):
        Dataset(tmp_path)
    folder = write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3]).path
    rewrite_info(folder, format=999)
    with pytest.raises(DataError, match="format 999 is not the format 1 that this version reads"):
        Dataset(folder)
    rewrite_info(folder, format=1, novelty=5)
    with pytest.raises(ConfigError, match=r"dataset\.json: novelty: Extra inputs"):
        Dataset(folder)
    rewrite_info(folder, novelty=None, events=7)
    with pytest.raises(DataError, match=r"files hold \(3, 3, 6, 6\) users, items, events, but dataset\.json says"):
        Dataset(folder)
    for content in ("[]", "{", ""):
        (folder / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=r"dataset\.json: (cannot be read|format None)"):
            Dataset(folder)


@pytest.mark.parametrize("name", ["events.arrow", "users.arrow", "vocabulary.arrow"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_dataset(tmp_path / "d", HISTORIES, [1, 2, 3]).path
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name}: is not a readable Arrow file"):
        Dataset(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        Dataset(folder)
