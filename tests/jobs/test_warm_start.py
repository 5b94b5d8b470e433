"""Values of context and series follow their names from night to night, whatever rows they have."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.dataset import Dataset
from retrieval.encoder.config import HSTUConfig
from retrieval.errors import ConfigError
from retrieval.jobs.warm_start import carried_over, live_histories, moved_rows
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from retrieval.types import TokenKind
from tests.rpc.world import ITEMS, START, USERS, histories, integer_ids, make_encoder, publish
from tests.support import add_side, write_dataset

BEFORE = (
    TokenKind(name="age", context=True, values=("18", "25")),
    TokenKind(name="region", context=False, values=("north", "south")),
)
NOW = (
    TokenKind(name="age", context=True, values=("40", "25", "18")),
    TokenKind(name="region", context=False, values=("east", "south")),
)


def night(folder: Path, kinds: tuple[TokenKind, ...]) -> Dataset:
    dataset = write_dataset(folder, histories(), integer_ids())
    if not kinds:
        return dataset
    series = [[(len(kinds), 1, START - 9), (len(kinds), 2, START - 5)]] * USERS
    return add_side(dataset, kinds, [[user % 3] for user in range(USERS)], series)


def live_of(folder: Path, kinds: tuple[TokenKind, ...]) -> Snapshot:
    dataset, registry = night(folder / "before", kinds), Registry(folder / "registry")
    return open_snapshot(
        registry.folder(publish(registry, dataset, make_encoder(kinds=tuple(kind.rows for kind in kinds))))
    )


def config_of(live: Snapshot, kinds: tuple[TokenKind, ...]) -> HSTUConfig:
    config = live.info.encoder.model_copy(update={"kinds": tuple(kind.rows for kind in kinds)})
    assert isinstance(config, HSTUConfig)
    return config


def test_weights_of_values_follow_their_names(tmp_path: Path) -> None:
    live = live_of(tmp_path, BEFORE)
    weights = carried_over(config_of(live, NOW), night(tmp_path / "now", NOW), live)["side_embedding.weight"]
    old = live.encoder.state_dict()["side_embedding.weight"]
    # age: unknown, 18, 25 | region: unknown, north, south.
    for row, before in enumerate([0, None, 2, 1, 3, None, 5]):
        assert weights[row].tolist() == (old[before].tolist() if before is not None else [0.0] * 16)


def test_tensors_are_let_go_of_as_their_rows_are_moved(tmp_path: Path) -> None:
    live, now = live_of(tmp_path, BEFORE), night(tmp_path / "now", NOW)
    tensors = {f"optimizer.rows.{name}": torch.rand(len(now.vocabulary), 4) for name in ("first", "second")}
    before = dict(tensors)
    moved = moved_rows(tensors, now, live)
    assert not tensors
    assert all(torch.equal(moved[name], tensor) for name, tensor in before.items())


def test_another_set_of_kinds_needs_a_start_from_scratch(tmp_path: Path) -> None:
    live = live_of(tmp_path, BEFORE)
    with pytest.raises(ConfigError, match="has another shape"):
        carried_over(config_of(live, BEFORE[:1]), night(tmp_path / "now", BEFORE[:1]), live)


@pytest.mark.parametrize("kinds", [NOW, (), NOW[1:]], ids=["other values", "no kinds", "no context"])
def test_the_live_encoder_reads_tonights_values_by_name(tmp_path: Path, kinds: tuple[TokenKind, ...]) -> None:
    live, dataset = live_of(tmp_path, BEFORE), night(tmp_path / "now", kinds)
    users = np.array([4, 5])
    batch, _ = live_histories(dataset, live, users, dataset.offsets[users + 1], np.full(2, START + 10**8))
    assert batch.kinds is not None
    read = batch.items[batch.offsets[0] : batch.offsets[1]][:3].tolist()
    first = int(dataset.events.items[dataset.offsets[4]])
    # User 4 has age row 1 tonight, which is 40 and new; the region was east, which is new, and then south.
    assert read[0] == 0
    if kinds:
        assert batch.kinds[:3].tolist() == [1, 2, 2]
        assert read[1:] == [0, 2]
    else:
        assert batch.kinds[:2].tolist() == [1, 0]
        assert read[1] == first
    second = int(batch.offsets[1])
    assert batch.items[second] == (2 if kinds == NOW else 0)  # user 5: 25
    assert batch.items.max() < ITEMS
