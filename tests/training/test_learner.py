"""One step: by rows and over the whole table it is the same step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.data.sequences import TrainingBatch
from retrieval.data.splits import SplitInfo, split_dataset
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, HSTUConfig
from retrieval.errors import TrainingError
from retrieval.training.batches import Batches
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner
from tests.support import cyclic_histories, write_dataset

ITEMS = 50
HSTU = HSTUConfig(num_items=ITEMS, num_actions=3, max_length=8, width=16, qk_dim=16, v_dim=16, dropout=0.1)
BERT4REC = BERT4RecConfig(num_items=ITEMS, num_actions=3, max_length=8, width=16, hidden=16)


def prepared(
    folder: Path, encoder_config: EncoderConfig, config: TrainConfig, catalogue: int = ITEMS
) -> tuple[Learner, TrainingBatch]:
    """A learner and a batch of histories that touch ten of the items."""
    dataset = write_dataset(folder, cyclic_histories(users=16, items=10, length=8), range(catalogue))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config)
    batches = Batches(dataset, split, config, objective=encoder.objective, max_length=8)
    _, batch = next(batches.from_step(0))
    return Learner(encoder, config, np.bincount(dataset.events.items, minlength=catalogue), steps=1), batch


@pytest.mark.parametrize("encoder_config", [HSTU, BERT4REC], ids=lambda config: config.model)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "in-batch", "mixed"])
def test_the_first_step_by_rows_is_that_over_the_whole_table(
    tmp_path: Path, encoder_config: EncoderConfig, negatives: str, shared: bool
) -> None:
    """After one step a row without gradient has no momentum, so the two kinds of AdamW still agree on all rows."""
    tables, norms, losses = [], [], []
    for by_rows in (False, True):
        config = TrainConfig.model_validate(
            {
                "batch_size": 16,
                "num_negatives": 6,
                "negatives": negatives,
                "shared_negatives": shared,
                "log_q": "standard",
                "clip_norm": 0.1,
                "sparse_items": by_rows,
            }
        )
        learner, batch = prepared(tmp_path / str(by_rows), encoder_config, config)
        outcome = learner.step(batch, 0)
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        tables.append({name: tensor.detach().clone() for name, tensor in learner.encoder.state_dict().items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for name, tensor in tables[0].items():
        # Where a gradient is all rounding, AdamW's first step makes a whole step of it: such places may differ.
        far = (tensor - tables[1][name]).abs() > 1e-5
        assert far.float().mean() < 0.02, name


def test_a_step_by_rows_makes_nothing_of_the_catalogues_size(tmp_path: Path) -> None:
    catalogue = 300_000
    config = TrainConfig(batch_size=16, num_negatives=6)
    encoder_config = HSTU.model_copy(update={"num_items": catalogue})
    learner, batch = prepared(tmp_path / "data", encoder_config, config, catalogue)
    assert learner.by_rows
    table = learner.encoder.item_embedding.weight
    before = table.detach().clone()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # Operations that write into the table return it: what is new is what matters.
            if isinstance(out, torch.Tensor) and func._schema.name.find("detach") < 0 and not func._schema.is_mutable:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        learner.step(batch, 0)
    assert 0 < largest < 1 << 20
    assert table.grad is None
    assert 10 <= int((table.detach() != before).any(1).sum()) <= 16


def test_a_step_without_a_target_changes_nothing(tmp_path: Path) -> None:
    learner, batch = prepared(tmp_path / "data", HSTU, TrainConfig(batch_size=16, weight_decay=0.1))
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    empty = TrainingBatch(inputs=batch.inputs, targets=batch.targets, weights=np.zeros_like(batch.weights))
    assert learner.step(empty, 0).loss == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.tensors().items())


def test_a_step_that_fails_changes_nothing(tmp_path: Path) -> None:
    learner, batch = prepared(tmp_path / "data", HSTU, TrainConfig(batch_size=16, num_negatives=6, sparse_items=True))
    with torch.no_grad():
        learner.encoder.position_embedding.weight[0, 0] = torch.nan  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    with pytest.raises(TrainingError, match="step 6: the loss is nan"):
        learner.step(batch, 5)
    for name, tensor in learner.tensors().items():
        assert torch.equal(before[name].nan_to_num(), tensor.nan_to_num()), name


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_masked_position_gives_no_gradient(tmp_path: Path, by_rows: bool) -> None:
    """What a masked target is changes nothing: an item that only masked positions ask for stays as it was."""
    config = TrainConfig(batch_size=16, num_negatives=2, negatives="in-batch", sparse_items=by_rows)
    after = []
    for masked_target in (3, ITEMS - 1):
        learner, batch = prepared(tmp_path / str(masked_target), HSTU, config)
        before = learner.encoder.item_embedding.weight.detach().clone()
        weights = batch.weights.copy()
        weights[::3] = 0
        targets = np.where(weights > 0, batch.targets, masked_target)
        learner.step(TrainingBatch(inputs=batch.inputs, targets=targets, weights=weights), 0)
        after.append({name: tensor.clone() for name, tensor in learner.encoder.state_dict().items()})
    assert torch.equal(after[1]["item_embedding.weight"][-1], before[-1])
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in after[0].items())


def test_a_steps_loss_is_the_mean_by_weight(tmp_path: Path) -> None:
    """Two positions asked with weights 1 and 2 have the loss Σ w·loss / Σ w of those asked alone."""
    config = TrainConfig(batch_size=16, negatives="uniform", num_negatives=ITEMS)
    places = np.array([0, 5])
    losses: list[float] = []
    for chosen in ([1, 0], [0, 1], [1, 2]):
        learner, batch = prepared(tmp_path / str(len(losses)), HSTU.model_copy(update={"dropout": 0.0}), config)
        weights = np.zeros_like(batch.weights)
        weights[places] = chosen
        outcome = learner.step(TrainingBatch(inputs=batch.inputs, targets=batch.targets, weights=weights), 0)
        losses.append(outcome.loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert losses[2] == pytest.approx((losses[0] + 2 * losses[1]) / 3, rel=1e-5)
