"""Training on users who walk through the catalogue in order: the next item is always known."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from retrieval.data.dataset import Dataset
from retrieval.data.splits import Split, SplitInfo, split_dataset
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.model import HSTUEncoder
from retrieval.errors import CheckpointError, InputError, TrainingError
from retrieval.training import trainer
from retrieval.training.loss import sampled_softmax_loss
from retrieval.training.trainer import StepReport, TrainConfig, train
from tests.support import cyclic_histories, write_dataset

ENCODER = HSTUConfig(num_items=20, num_actions=3, max_length=8, width=16, qk_dim=16, v_dim=16, dropout=0.1)
CONFIG = TrainConfig(epochs=3, batch_size=16, num_negatives=16, learning_rate=0.01, seed=7)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Dataset, Split]:
    dataset = write_dataset(tmp_path / "data", cyclic_histories(users=60, items=20, length=10), range(20))
    return dataset, split_dataset(dataset, SplitInfo(protocol="paper"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir)[0].state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_learnable_world_is_learned(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    losses: list[float] = []
    config = CONFIG.model_copy(update={"epochs": 20})
    train(*data, ENCODER, config, tmp_path / "run", on_step=lambda report: losses.append(report.loss))
    assert sum(losses[:4]) / 4 > 2.5
    assert sum(losses[-4:]) / 4 < 0.5


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(*data, ENCODER, CONFIG.model_copy(update={"seed": seed}), tmp_path / name)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "a", tmp_path / "c")


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("kill_at", [1, 4, 5, 11])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(
    data: tuple[Dataset, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr(trainer, "_STATE_SECONDS", 0.0)
    train(*data, ENCODER, CONFIG, tmp_path / "whole")

    def stop(report: StepReport) -> None:
        if report.step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(*data, ENCODER, CONFIG, tmp_path / "cut", on_step=stop)
    train(*data, ENCODER, CONFIG, tmp_path / "cut", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_run_killed_by_the_kernel_resumes_to_the_same_bits(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        from pathlib import Path
        from retrieval.data.dataset import Dataset
        from retrieval.data.splits import SplitInfo, split_dataset
        from retrieval.encoder.config import HSTUConfig
        from retrieval.training import trainer
        trainer._STATE_SECONDS = 0.0
        dataset = Dataset(Path({str(data[0].path)!r}))
        split = split_dataset(dataset, SplitInfo(protocol="paper"))
        encoder = HSTUConfig.model_validate_json({ENCODER.model_dump_json()!r})
        config = trainer.TrainConfig.model_validate_json({CONFIG.model_dump_json()!r})
        run = Path({str(tmp_path / "killed")!r})
        report = lambda r: print(r.step, flush=True)
        trainer.train(dataset, split, encoder, config, run, resume=True, on_step=report)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "5":
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    train(*data, ENCODER, CONFIG, tmp_path / "whole")
    train(*data, ENCODER, CONFIG, tmp_path / "killed", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_run_folder_is_not_overwritten(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    train(*data, ENCODER, CONFIG, tmp_path / "run")
    with pytest.raises(InputError, match="holds a training run already"):
        train(*data, ENCODER, CONFIG, tmp_path / "run")


def test_resuming_with_other_settings_is_refused(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    train(*data, ENCODER, CONFIG, tmp_path / "run")
    other = CONFIG.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match="was trained with training"):
        train(*data, ENCODER, other, tmp_path / "run", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    data: tuple[Dataset, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_STATE_SECONDS", 0.0)
    calls: list[None] = []

    def breaks(users: Tensor, targets: Tensor, negatives: Tensor, table: Tensor, temperature: float) -> Tensor:
        calls.append(None)
        loss = sampled_softmax_loss(users, targets, negatives, table, temperature)
        return loss * torch.nan if len(calls) == 4 else loss

    monkeypatch.setattr(trainer, "sampled_softmax_loss", breaks)
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        train(*data, ENCODER, CONFIG, tmp_path / "run")
    monkeypatch.undo()
    train(*data, ENCODER, CONFIG, tmp_path / "run", resume=True)
    train(*data, ENCODER, CONFIG, tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_non_positive_targets_are_read_but_not_learned(tmp_path: Path) -> None:
    """Rows that are targets only where the mask is 0, and never negatives, get no gradient through the loss."""
    histories = [[(0, 1, 10), (1, 1, 20), (2, 2, 30), (3, 1, 40)] for _ in range(4)]
    dataset = write_dataset(tmp_path / "data", histories, range(400))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    config = TrainConfig(epochs=1, batch_size=4, num_negatives=1, learning_rate=0.01)
    encoder = ENCODER.model_copy(update={"num_items": 400, "num_actions": 0, "max_length": 3, "dropout": 0.0})
    torch.manual_seed(config.seed)
    before = HSTUEncoder(encoder).item_embedding.weight.detach().clone()
    after = train(dataset, split, encoder, config, tmp_path / "run").item_embedding.weight.detach()
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    # 0, 1 and 2 are inputs, 1 and 3 are targets that count, and one more row is the negative.
    assert {0, 1, 2, 3} <= set(moved)
    assert len(moved) <= 5


# TensorBoard's reader never closes its file; it must be collected while the test may still ignore that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_loss_is_logged_to_tensorboard(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    losses: list[float] = []
    train(*data, ENCODER, CONFIG, tmp_path / "run", on_step=lambda report: losses.append(report.loss))
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [scalar.value for scalar in log.Scalars("train/loss")] == pytest.approx(losses)
    del log
    gc.collect()
