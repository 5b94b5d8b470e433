"""Items made of their attributes: whole and by rows, in what is kept, and where no event has shown them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from retrieval.data.dataset import Dataset
from retrieval.data.item_features import ItemFeatureSchema, item_features
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.inference import item_vectors
from retrieval.training.batches import Batches
from retrieval.training.config import TrainConfig
from retrieval.training.item_table import ItemTable
from retrieval.training.learner import Learner
from retrieval.training.trainer import train
from tests.support import write_dataset

GROUPS, WARM, COLD = 5, 40, 10
SCHEMA = ItemFeatureSchema.model_validate(
    {"attributes": {"group": {"kind": "category", "buckets": 97}}, "id_dropout": 0.3}
)


def grouped(folder: Path) -> Dataset:
    """Users who see random items of group after group; the last items of the catalogue have no event."""
    rng = np.random.default_rng(0)
    histories = []
    for user in range(200):
        groups = (user + np.arange(8)) % GROUPS
        items = groups + GROUPS * rng.integers(0, WARM // GROUPS, 8)
        histories.append([(int(item), 1, 1_000_000 + 60 * place) for place, item in enumerate(items)])
    write_dataset(folder, histories, range(WARM + COLD))
    names = [f"g{item % GROUPS}" for item in range(WARM + COLD)]
    Vocabulary(pa.array(range(WARM + COLD)), {"group": pa.array(names)}).save(folder / "vocabulary.arrow")
    return Dataset(folder)


def test_rows_named_have_the_embeddings_of_the_whole(tmp_path: Path) -> None:
    dataset = grouped(tmp_path / "d")
    counts = dataset.item_counts
    table = ItemTable(item_features(dataset.vocabulary, SCHEMA, counts), SCHEMA, counts, width=4)
    ids = torch.randn(WARM + COLD, 4)
    rows = torch.tensor([3, 44, 7])
    whole = table(ids)
    torch.testing.assert_close(table(ids[rows], rows), whole[rows])
    # By hand: one feature each; an item without events is that feature alone.
    torch.testing.assert_close(whole[8] - ids[8], whole[48])
    dropped = table(ids, generator=torch.Generator().manual_seed(0))
    alone = (dropped == whole[torch.arange(WARM + COLD) % GROUPS + WARM]).all(1)[:WARM]
    assert 0 < alone.sum() < WARM


def test_an_item_without_features_keeps_its_id(tmp_path: Path) -> None:
    """With overflow rows alone, frequent items have ids and no features, rare ones the other way round."""
    dataset = grouped(tmp_path / "d")
    schema = ItemFeatureSchema(id_dropout=0.9, overflow=3)
    table = ItemTable(
        item_features(dataset.vocabulary, schema, dataset.item_counts), schema, dataset.item_counts, width=4
    )
    ids = torch.randn(WARM + COLD, 4)
    made = table(ids, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[:WARM], ids[:WARM])
    assert all(any(torch.equal(row, shared) for shared in table.weight) for row in made[WARM:])


@pytest.mark.parametrize("negatives", ["full", "uniform"])
def test_items_that_wait_for_their_first_event_are_nobodys_negatives(tmp_path: Path, negatives: str) -> None:
    """So what they alone have, as new items do, learns nothing from being turned down."""
    dataset = grouped(tmp_path / "d")
    fresh = pa.array([f"g{item % GROUPS}" if item < WARM else "new" for item in range(WARM + COLD)])
    Vocabulary(dataset.vocabulary.ids, {"group": fresh}).save(tmp_path / "d" / "vocabulary.arrow")
    dataset = Dataset(tmp_path / "d")
    config = TrainConfig.model_validate({"negatives": negatives, "num_negatives": 30, "item_features": SCHEMA})
    features = item_features(dataset.vocabulary, SCHEMA, dataset.item_counts)
    shape = HSTUConfig(num_items=WARM + COLD, max_length=8, width=16, qk_dim=16, v_dim=16, num_layers=1)
    learner = Learner(build_encoder(shape), config, dataset.item_counts, 10, features)
    batches = Batches(
        dataset, split_dataset(dataset, SplitInfo(protocol="all")), config, objective="next", max_length=8
    )
    table = next(tensor for name, tensor in learner.tensors().items() if name.endswith("1.weight"))
    new, old = features.features[-1], features.features[0]
    before = table.clone()
    learner.step(next(batches.from_step(0))[1], 0)
    assert torch.equal(table[new], before[new])
    assert not torch.equal(table[old], before[old])


def with_vectors(folder: Path) -> Dataset:
    """As `grouped`, with a vector for each group in place of its name, none for one item."""
    dataset = grouped(folder)
    directions = np.random.default_rng(1).standard_normal((GROUPS, 8)).tolist()
    vectors = [directions[item % GROUPS] if item != WARM else None for item in range(WARM + COLD)]
    Vocabulary(dataset.vocabulary.ids, {"v": pa.array(vectors)}).save(folder / "vocabulary.arrow")
    return Dataset(folder)


VECTORS = ItemFeatureSchema.model_validate({"attributes": {"v": {"kind": "vector"}}, "id_dropout": 0.3})


def test_a_vector_is_projected_and_a_missing_one_adds_nothing(tmp_path: Path) -> None:
    dataset = with_vectors(tmp_path / "d")
    features = item_features(dataset.vocabulary, VECTORS, dataset.item_counts)
    table = ItemTable(features, VECTORS, dataset.item_counts, width=4)
    assert table.projection is not None
    ids, rows = torch.randn(WARM + COLD, 4), torch.tensor([3, WARM, 7, WARM + 1])
    whole = table(ids)
    torch.testing.assert_close(table(ids[rows], rows), whole[rows])
    torch.testing.assert_close(whole[3], ids[3] + torch.from_numpy(features.vectors[3]) @ table.projection)
    torch.testing.assert_close(whole[WARM + 1], torch.from_numpy(features.vectors[1]) @ table.projection)
    assert not whole[WARM].any()


def test_a_vector_alone_lets_an_item_without_events_be_found(tmp_path: Path) -> None:
    dataset = with_vectors(tmp_path / "d")
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    encoder = HSTUConfig(num_items=WARM + COLD, max_length=8, width=16, qk_dim=16, v_dim=16, num_layers=1)
    config = TrainConfig(
        epochs=8, batch_size=32, learning_rate=0.01, num_negatives=20, item_features=VECTORS, sparse_items=True
    )
    vectors = item_vectors(train(dataset, split, encoder, config, tmp_path / "run"))
    nearest = np.argsort(-(vectors[WARM + 1 :] @ vectors[:WARM].T), axis=1)[:, : WARM // GROUPS]
    assert (nearest % GROUPS == (np.arange(WARM + 1, WARM + COLD) % GROUPS)[:, None]).mean() > 0.8


@pytest.mark.parametrize("options", [{"sparse_items": True}, {"sparse_items": False}, {"ema_decay": 0.9}], ids=str)
def test_an_item_without_events_lies_with_the_items_that_are_like_it(
    tmp_path: Path, options: dict[str, object]
) -> None:
    dataset = grouped(tmp_path / "d")
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    encoder = HSTUConfig(num_items=WARM + COLD, max_length=8, width=16, qk_dim=16, v_dim=16, num_layers=1)
    settings = {"epochs": 12, "batch_size": 32, "learning_rate": 0.01, "num_negatives": 20, "item_features": SCHEMA}
    config = TrainConfig.model_validate(settings | options)
    kept = train(dataset, split, encoder, config, tmp_path / "run")
    vectors = item_vectors(kept)
    scores = vectors[WARM:] @ vectors[:WARM].T
    nearest = np.argsort(-scores, axis=1)[:, : WARM // GROUPS]
    assert (nearest % GROUPS == (np.arange(WARM, WARM + COLD) % GROUPS)[:, None]).mean() > 0.8
