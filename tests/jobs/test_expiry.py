"""Which items are no answers any more."""

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.data.dataset import Dataset
from retrieval.data.vocabulary import Vocabulary
from retrieval.errors import ConfigError, DataError
from retrieval.jobs.expiry import Expiry, expired_items
from tests.support import write_dataset

DAY = 86_400
LAST = 1_700_000_000


def dataset(folder: Path, **attributes: pa.Array) -> Dataset:
    """Items 0 to 3 were last seen 0, 1, 2 and 3 days before the last event; 4 and 5 never."""
    histories = [[(3, 1, LAST - 3 * DAY), (2, 1, LAST - 2 * DAY)], [(3, 1, LAST - 9 * DAY), (1, 1, LAST - DAY)]]
    found = write_dataset(folder, [*histories, [(0, 1, LAST)]], range(6))
    found.vocabulary = Vocabulary(found.vocabulary.ids, attributes)
    return found


def gone(found: Dataset, **rules: object) -> list[int]:
    return np.flatnonzero(expired_items(found, Expiry.parse(rules, "test"))).tolist()


def test_by_default_only_items_that_nothing_names_any_more_expire(tmp_path: Path) -> None:
    assert gone(dataset(tmp_path / "alone")) == [4, 5]
    listed = pa.array([False, True, True, True, True, False])
    assert gone(dataset(tmp_path / "with items", listed=listed)) == [5]


def test_items_expire_by_days_since_their_last_event_not_by_the_clock(tmp_path: Path) -> None:
    found = dataset(tmp_path / "d", listed=pa.array([True] * 6))
    assert gone(found, unseen_days=2) == [3]
    assert gone(found, unseen_days=1.5) == [2, 3]
    assert gone(found, unseen_days=3) == []


@pytest.mark.parametrize(
    "times",
    [
        pa.array([LAST + 1, LAST, None, LAST - 1, None, LAST + DAY]),
        pa.array([LAST + 0.5, LAST, None, 0.0, None, LAST + DAY]),
        pa.array([datetime.fromtimestamp(LAST + late, UTC) if late < 99 else None for late in (1, 0, 99, -1, 99, 9)]),
        pa.array(["2023-11-15", "2023-11-14 22:13:20", None, "1999-12-31", None, "2023-11-14T22:13:21"]),
        pa.array([date(2023, 11, 15), date(2023, 11, 14), None, date(1999, 1, 1), None, date(2024, 1, 1)]),
    ],
    ids=["seconds", "fractions", "timestamps", "text", "dates"],
)
def test_items_expire_at_the_time_in_a_column(tmp_path: Path, times: pa.Array) -> None:
    found = dataset(tmp_path / "d", until=times, listed=pa.array([True] * 6))
    assert gone(found, column="until") == [1, 3]


def test_items_that_the_metadata_does_not_name_expire_where_that_is_asked_for(tmp_path: Path) -> None:
    found = dataset(tmp_path / "d", listed=pa.array([False, True, True, True, False, True]))
    assert gone(found, unlisted=True) == [0, 4]


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"column": "until"}, "no attribute 'until'; they have: title"),
        ({"column": "title"}, "'title' holds no times"),
        ({"unlisted": True}, "no file of items"),
    ],
)
def test_rules_that_the_metadata_cannot_answer_are_refused(
    tmp_path: Path, rules: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        gone(dataset(tmp_path / "d", title=pa.array(["One"] * 6)), **rules)


def test_a_rule_that_leaves_no_item_is_refused(tmp_path: Path) -> None:
    found = dataset(tmp_path / "d", until=pa.array([0] * 6))
    with pytest.raises(DataError, match="all 6 items have expired"):
        gone(found, column="until")
