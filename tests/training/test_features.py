"""Training on datasets with context, auxiliary series, item attributes and questions for actions."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from retrieval.data.dataset import Dataset
from retrieval.data.item_features import ItemFeatureSchema
from retrieval.data.splits import Split, SplitInfo, split_dataset
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.build import build_encoder
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.errors import ConfigError
from retrieval.evaluation.offline import evaluate
from retrieval.evaluation.ranking import query_batches
from retrieval.training import trainer
from retrieval.training.batches import Batches
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner
from retrieval.training.trainer import StepReport, train
from retrieval.types import TokenKind
from tests.support import add_side, cyclic_histories, write_dataset

ITEMS = 20
KINDS = (
    TokenKind(name="group", context=True, values=("even", "odd")),
    TokenKind(name="place", context=False, values=("a", "b", "c")),
)
ENCODER = HSTUConfig(
    num_items=ITEMS, num_actions=3, query_actions=True, kinds=(3, 4), max_length=12, width=16, qk_dim=16, v_dim=16
)
FEATURES = ItemFeatureSchema.model_validate({"attributes": {"colour": {"kind": "category", "buckets": 8}}})
CONFIG = TrainConfig(epochs=3, batch_size=16, num_negatives=8, learning_rate=0.01, item_features=FEATURES, seed=5)


def rich_dataset(folder: Path) -> tuple[Dataset, Split]:
    """Users who walk through the catalogue and, now and then, move to another place."""
    histories = cyclic_histories(users=40, items=ITEMS, length=9)
    dataset = write_dataset(folder, histories, range(ITEMS))
    colours = pa.array([f"c{row % 3}" for row in range(ITEMS)])
    Vocabulary(dataset.vocabulary.ids, {"colour": colours}).save(folder / "vocabulary.arrow")
    rng = np.random.default_rng(1)
    places = [[(2, int(rng.integers(0, 4)), event[2]) for event in events[::3]] for events in histories]
    dataset = add_side(Dataset(folder), KINDS, [[user % 3] for user in range(40)], places)
    return dataset, split_dataset(dataset, SplitInfo(protocol="stable"))


def test_a_run_with_every_feature_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_STATE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_STATE_SHARE", math.inf)
    dataset, split = rich_dataset(tmp_path / "data")
    config = CONFIG.model_copy(update={"sparse_items": True, "stochastic_length": 1.6})
    train(dataset, split, ENCODER, config, tmp_path / "whole")

    def stop(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataset, split, ENCODER, config, tmp_path / "cut", on_step=stop)
    train(dataset, split, ENCODER, config, tmp_path / "cut", resume=True)
    (first, info), (second, _) = (load_checkpoint(tmp_path / name) for name in ("whole", "cut"))
    assert info.kinds == KINDS
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def step_of(folder: Path, *, by_rows: bool, masked_target: int | None = None) -> dict[str, torch.Tensor]:
    dataset, split = rich_dataset(folder)
    config = CONFIG.model_copy(update={"sparse_items": by_rows, "item_features": None, "negatives": "in-batch"})
    torch.manual_seed(0)
    encoder = build_encoder(ENCODER)
    batches = Batches(dataset, split, config, objective="next", max_length=12, query_actions=True)
    _, batch = next(batches.from_step(0))
    assert batch.inputs.kinds is not None
    assert not batch.weights.all()
    if masked_target is not None:
        batch = replace(batch, targets=np.where(batch.weights > 0, batch.targets, masked_target))
    learner = Learner(encoder, config, np.bincount(dataset.events.items, minlength=ITEMS), steps=1)
    learner.step(batch, 0)
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


@pytest.mark.parametrize("by_rows", [False, True])
def test_positions_before_other_kinds_get_no_gradient(tmp_path: Path, by_rows: bool) -> None:
    """Whatever a masked position's target is said to be, the step is the same, bit for bit."""
    first, second = (step_of(tmp_path / str(row), by_rows=by_rows, masked_target=row) for row in (3, 11))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_step_by_rows_is_that_over_the_whole_table(tmp_path: Path) -> None:
    whole, by_rows = (step_of(tmp_path / str(rows), by_rows=rows) for rows in (False, True))
    for name, tensor in whole.items():
        assert ((tensor - by_rows[name]).abs() > 1e-5).float().mean() < 0.02, name


def test_stochastic_length_never_drops_another_kind(tmp_path: Path) -> None:
    dataset, split = rich_dataset(tmp_path / "data")
    lengths = {}
    for alpha in (None, 1.1):
        config = TrainConfig(batch_size=40, stochastic_length=alpha)
        _, batch = next(Batches(dataset, split, config, objective="next", max_length=12).from_step(0))
        lengths[alpha] = int(batch.inputs.main.sum()), int((~batch.inputs.main).sum())
    assert lengths[1.1][0] < lengths[None][0]
    assert lengths[1.1][1] == lengths[None][1]


def test_a_share_of_positions_is_asked_for_the_targets_action(tmp_path: Path) -> None:
    dataset, split = rich_dataset(tmp_path / "data")
    config = TrainConfig(batch_size=40, query_action_share=0.25)
    _, batch = next(Batches(dataset, split, config, objective="next", max_length=12, query_actions=True).from_step(0))
    assert batch.inputs.query_actions is not None
    asked = batch.inputs.query_actions[batch.weights > 0]
    assert set(asked.tolist()) == {0, 1}
    assert 0.1 < (asked > 0).mean() < 0.4


def test_an_encoder_that_reads_other_kinds_than_the_dataset_has_is_refused(tmp_path: Path) -> None:
    dataset, split = rich_dataset(tmp_path / "data")
    with pytest.raises(
        ConfigError, match=r"kinds: the encoder reads \(\), but the dataset's tables have \(3, 4\) rows"
    ):
        train(dataset, split, ENCODER.model_copy(update={"kinds": ()}), CONFIG, tmp_path / "run")


def test_evaluation_asks_at_the_last_training_position(tmp_path: Path) -> None:
    """A query's tokens are those that training would have had at its target, and what it reads is what is hidden."""
    dataset, _ = rich_dataset(tmp_path / "data")
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    (batch,) = query_batches(dataset, split.test, 6)
    everything = split_dataset(dataset, SplitInfo(protocol="all"))
    config = TrainConfig(batch_size=40)
    _, trained = next(Batches(dataset, everything, config, objective="next", max_length=6).from_step(0))
    order = np.random.default_rng([config.seed, 0]).permutation(40)
    for place, user in enumerate(order):
        ours = slice(*trained.inputs.offsets[place : place + 2])
        asked = slice(*batch.histories.offsets[user : user + 2])
        for field in ("kinds", "items", "actions", "timestamps", "query_times"):
            pair = (getattr(trained.inputs, field)[ours], getattr(batch.histories, field)[asked])
            assert pair[0].tolist() == pair[1].tolist()
        read = batch.histories.items[asked][batch.histories.main[asked]]
        assert sorted(batch.seen[user].tolist()) == sorted(set(read.tolist()) - {int(batch.targets[user])})


def test_likely_to_like_and_likely_to_buy_are_answered_differently(tmp_path: Path) -> None:
    """Liked is one of the first four items, bought one of the others, at even chances: the question decides."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(60):
        actions = rng.integers(1, 3, 8)
        items = rng.integers(0, 4, 8) + 4 * (actions == 2)
        histories.append([(int(items[at]), int(actions[at]), 1_000_000 + 3600 * at) for at in range(8)])
    dataset = write_dataset(tmp_path / "data", histories, range(8))
    values = [action.model_copy(update={"positive": True}) for action in dataset.info.actions]
    dataset.info = dataset.info.model_copy(update={"actions": tuple(values)})
    dataset.positive = np.ones(3, bool)
    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    shape = ENCODER.model_copy(update={"num_items": 8, "kinds": ()})
    config = TrainConfig(epochs=12, batch_size=16, num_negatives=8, learning_rate=0.01, temperature=0.2)
    encoder = train(dataset, split, shape, config, tmp_path / "run")
    (batch,) = query_batches(dataset, split.test, 12)
    assert batch.histories.query_actions is not None
    shares = {}
    for action in (0, 1, 2):
        asked = batch.histories.query_actions.copy()
        asked[batch.histories.offsets[1:] - 1] = action
        scores = embed_users(encoder, replace(batch.histories, query_actions=asked)) @ item_vectors(encoder).T
        shares[action] = (np.argsort(-scores, axis=1)[:, :4] < 4).mean()
    assert shares[1] > 0.9
    assert shares[2] < 0.1
    assert 0.2 < shares[0] < 0.8


def test_a_trained_encoder_is_evaluated_with_its_features(tmp_path: Path) -> None:
    dataset, split = rich_dataset(tmp_path / "data")
    encoder = train(dataset, split, ENCODER, CONFIG.model_copy(update={"epochs": 12}), tmp_path / "run")
    report = evaluate(dataset, split, lambda batch: embed_users(encoder, batch), item_vectors(encoder), 12)
    assert report.row("HSTU").metrics["recall@10"].mean > 0.9
