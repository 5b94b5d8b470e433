"""On MovieLens-1M, where RETRIEVAL_DATASETS names a folder that holds it."""

from pathlib import Path

import numpy as np
import pytest

from retrieval.data.ingest import EventSchema, ItemSchema, ingest

pytestmark = pytest.mark.realdata


def test_movielens_1m_has_its_known_counts_and_round_trips(datasets: Path, tmp_path: Path) -> None:
    source = datasets / "ml-1m"
    dataset = ingest(
        source / "ratings.parquet",
        tmp_path / "dataset",
        schema=EventSchema(action="rating", positive=(">=4",)),
        items=source / "movies.dat",
        item_schema=ItemSchema(columns=("item_id", "title", "genres"), encoding="latin-1"),
    )
    assert (dataset.info.users, dataset.info.items, dataset.info.events) == (6040, 3883, 1_000_209)
    assert int((dataset.item_counts > 0).sum()) == 3706
    assert [action.value for action in dataset.info.actions if action.positive] == ["4", "5"]
    titles = dataset.vocabulary.attributes["title"]
    assert titles[int(dataset.vocabulary.rows_of([1])[0])].as_py() == "Toy Story (1995)"
    times = dataset.events.timestamps
    inside = np.ones(len(times), bool)
    inside[dataset.offsets[:-1]] = False
    assert (np.diff(times)[inside[1:]] >= 0).all()
