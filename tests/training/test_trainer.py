"""Training on users who walk through the catalogue in order: the next item is always known."""

import gc
import math
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from retrieval.data.dataset import Dataset
from retrieval.data.popularity import log_popularity
from retrieval.data.splits import Split, SplitInfo, split_dataset
from retrieval.encoder.build import build_encoder
from retrieval.encoder.checkpoint import load_checkpoint
from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, GRU4RecConfig, HSTUConfig, SASRecConfig
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import CheckpointError, ConfigError, InputError, TrainingError, TrainingStoppedError
from retrieval.training import learner, trainer
from retrieval.training.config import TrainConfig
from retrieval.training.loss import next_item_loss
from retrieval.training.negatives import Negatives
from retrieval.training.state import read_state
from retrieval.training.trainer import StepReport, train
from tests.support import cyclic_histories, write_dataset

ENCODER = HSTUConfig(num_items=20, num_actions=3, max_length=8, width=16, qk_dim=16, v_dim=16, dropout=0.1)
SASREC = SASRecConfig(num_items=20, max_length=8, width=16, hidden=16, dropout=0.1)
GRU4REC = GRU4RecConfig(num_items=20, max_length=8, width=16, hidden=16, dropout=0.1)
BERT4REC = BERT4RecConfig(num_items=20, max_length=8, width=16, hidden=16, dropout=0.1)
CONFIG = TrainConfig(epochs=3, batch_size=16, num_negatives=16, learning_rate=0.01, seed=7)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Dataset, Split]:
    dataset = write_dataset(tmp_path / "data", cyclic_histories(users=60, items=20, length=10), range(20))
    return dataset, split_dataset(dataset, SplitInfo(protocol="paper"))


def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_STATE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "_STATE_SHARE", math.inf)


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


def test_what_was_learned_before_is_taken_over_and_let_go_of_before_the_first_step(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    train(*data, ENCODER, CONFIG, tmp_path / "before")
    held: list[weakref.ref[Tensor]] = []

    def learned() -> dict[str, Tensor]:
        tensors = read_state(tmp_path / "before" / trainer.TRAINING_STATE)
        held.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    left: list[int] = []

    def count(report: StepReport) -> None:
        left.append(sum(tensor() is not None for tensor in held))

    train(*data, ENCODER, CONFIG, tmp_path / "after", learned=learned, on_step=count)
    assert held
    assert set(left) == {0}
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "before", tmp_path / "after")


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("kill_at", [1, 4, 5, 11])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(
    data: tuple[Dataset, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    save_after_every_step(monkeypatch)
    train(*data, ENCODER, CONFIG, tmp_path / "whole")

    def stop(report: StepReport) -> None:
        if report.step == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(*data, ENCODER, CONFIG, tmp_path / "cut", on_step=stop)
    train(*data, ENCODER, CONFIG, tmp_path / "cut", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


class Variant(NamedTuple):
    """Settings of a run that is killed."""

    config: TrainConfig
    validated: bool


VARIANTS = {
    "everything": Variant(
        CONFIG.model_copy(
            update={
                "epochs": 12,
                "schedule": "cosine",
                "warmup_steps": 3,
                "clip_norm": 0.5,
                "ema_decay": 0.8,
                "stochastic_length": 1.6,
                "patience": 4,
            }
        ),
        True,
    ),
    "by-rows": Variant(
        CONFIG.model_copy(update={"epochs": 5, "sparse_items": True, "negatives": "mixed", "num_negatives": 8}),
        False,
    ),
}


def validate(encoder: UserEncoder) -> float:
    """A judgement of the weights that is best after four epochs, so that patience ends the run after eight."""
    table = encoder.item_embedding.weight
    return -abs(float(table.detach().double().norm()) - 0.8)


def run_variant(name: str, data_dir: Path, run_dir: Path, on_step: Callable[[StepReport], None] | None = None) -> None:
    """Begin or continue the run in this process."""
    dataset, variant = Dataset(data_dir), VARIANTS[name]
    split = split_dataset(dataset, SplitInfo(protocol="stable"))
    judge = validate if variant.validated else None
    train(dataset, split, ENCODER, variant.config, run_dir, validate=judge, resume=True, on_step=on_step)


def cut_short(
    name: str, data_dir: Path, run_dir: Path, step: int, number: signal.Signals, state_seconds: float
) -> tuple[int, list[str]]:
    """Begin or continue the run in another process, and send it a signal as soon as it has done a step.

    It saves its state so many seconds after the last time, 0: after every step. Returns its exit code and what it
    printed after that step: the number of each further step, and its last words.
    """
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from retrieval.errors import TrainingStoppedError
        from retrieval.training import trainer
        from tests.training import test_trainer

        def report(done):
            print(done.step, flush=True)
            if done.step == {step + 4}:
                time.sleep(5)  # On a busy machine the signal may be late, but not so late that the run is over.

        trainer._STATE_SECONDS, trainer._STATE_SHARE = {state_seconds}, float("inf")
        try:
            test_trainer.run_variant({name!r}, Path({str(data_dir)!r}), Path({str(run_dir)!r}), report)
        except TrainingStoppedError as error:
            print(error, flush=True)
            sys.exit(error.exit_code)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(step):
                process.send_signal(number)
                break
        rest = process.stdout.read().splitlines()
    return process.returncode, rest


@pytest.mark.parametrize(("name", "kills", "state_seconds"), [("everything", (7, 22), 0.0), ("by-rows", (9,), 0.03)])
def test_a_run_killed_by_the_kernel_resumes_to_the_same_bits(
    data: tuple[Dataset, Split], tmp_path: Path, name: str, kills: tuple[int, ...], state_seconds: float
) -> None:
    data_dir = data[0].path
    for step in kills:
        code, _ = cut_short(name, data_dir, tmp_path / "killed", step, signal.SIGKILL, state_seconds)
        assert code == -signal.SIGKILL
    run_variant(name, data_dir, tmp_path / "whole")
    run_variant(name, data_dir, tmp_path / "killed")
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole/encoder.json").read_text() == (tmp_path / "killed/encoder.json").read_text()
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_sigterm_finishes_the_step_saves_the_state_and_says_how_to_go_on(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    data_dir = data[0].path
    code, lines = cut_short("everything", data_dir, tmp_path / "cut", 6, signal.SIGTERM, state_seconds=60.0)
    assert code == 128 + signal.SIGTERM
    done = int(lines[-2]) if len(lines) > 1 else 6
    assert (
        lines[-1] == f"stopped by SIGTERM after step {done} of 48; saved: run it again to go on (train: with --resume)"
    )
    resumed: list[int] = []
    run_variant("everything", data_dir, tmp_path / "cut", lambda report: resumed.append(report.step))
    assert resumed[0] == done + 1
    run_variant("everything", data_dir, tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_that_comes_in_training_is_handled_as_before_afterwards(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(TrainingStoppedError, match="stopped by SIGINT after step 2 of 12") as stopped:
        train(*data, ENCODER, CONFIG, tmp_path / "run", on_step=interrupt)
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_folder_is_not_overwritten(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    train(*data, ENCODER, CONFIG, tmp_path / "run")
    with pytest.raises(InputError, match="holds a training run already"):
        train(*data, ENCODER, CONFIG, tmp_path / "run")


def test_resuming_with_other_settings_is_refused(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    train(*data, ENCODER, CONFIG, tmp_path / "run")
    other = CONFIG.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"was trained with training learning_rate 0\.01, not 0\.5"):
        train(*data, ENCODER, other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_keeps_the_state(
    data: tuple[Dataset, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, by_rows: bool
) -> None:
    save_after_every_step(monkeypatch)
    config = CONFIG.model_copy(update={"sparse_items": by_rows})
    calls: list[None] = []

    def breaks(users: Tensor, targets: Tensor, negatives: Negatives, table: Tensor, **options: Any) -> Tensor:
        calls.append(None)
        loss = next_item_loss(users, targets, negatives, table, **options)
        if len(calls) != 4:
            return loss
        # The root's slope at 0 is infinite.
        return loss * torch.nan if what == "loss" else loss + (table.sum() * 0).sqrt()

    with monkeypatch.context() as patched:
        patched.setattr(learner, "next_item_loss", breaks)
        with pytest.raises(TrainingError, match=f"step 4: the {what} is nan; the last checkpoint is kept"):
            train(*data, ENCODER, config, tmp_path / "run")
    train(*data, ENCODER, config, tmp_path / "run", resume=True)
    train(*data, ENCODER, config, tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_best_encoder(
    data: tuple[Dataset, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []

    def explodes(*args: Any, **options: Any) -> Tensor:
        calls.append(None)
        return next_item_loss(*args, **options) + (60 if len(calls) > 8 else 0)

    monkeypatch.setattr(learner, "next_item_loss", explodes)
    config = CONFIG.model_copy(update={"epochs": 9})
    with pytest.raises(TrainingError, match=r"step 1\d: the loss has risen to \d+\.\d\d from \d\.\d\d; try a lower"):
        train(*data, ENCODER, config, tmp_path / "run", validate=lambda encoder: -float(len(calls)))
    kept = load_checkpoint(tmp_path / "run")[1]
    assert kept.training["steps"] == 4


def test_the_encoder_of_the_best_validation_is_kept_and_patience_ends_the_run(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    values = [0.1, 0.5, 0.4, 0.5, 0.9]
    asked: list[bool] = []

    def judge(encoder: UserEncoder) -> float:
        asked.append(encoder.training)
        return values[len(asked) - 1]

    config = CONFIG.model_copy(update={"epochs": 5, "patience": 2})
    reports: list[StepReport] = []
    kept = train(*data, ENCODER, config, tmp_path / "run", validate=judge, on_step=reports.append)
    assert asked == [False] * 4
    assert reports[-1].step == 16
    assert [report.validation for report in reports[3::4]] == values[:4]
    train(*data, ENCODER, CONFIG.model_copy(update={"epochs": 2}), tmp_path / "two")
    assert_same_weights(tmp_path / "run", tmp_path / "two")
    assert torch.equal(kept.item_embedding.weight, weights(tmp_path / "two")["item_embedding.weight"])
    assert not kept.training
    training = load_checkpoint(tmp_path / "run")[1].training
    assert (training["steps"], training["validation"]) == (8, 0.5)
    # A run that has ended stays ended.
    train(*data, ENCODER, config, tmp_path / "run", validate=judge, resume=True)
    assert len(asked) == 4


def test_the_last_epoch_is_validated_whatever_the_interval(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    steps: list[int] = []
    reports: list[StepReport] = []

    def judge(encoder: UserEncoder) -> float:
        steps.append(len(reports) + 1)
        return 0.0

    config = CONFIG.model_copy(update={"epochs": 5, "validate_every": 2})
    train(*data, ENCODER, config, tmp_path / "run", validate=judge, on_step=reports.append)
    assert steps == [8, 16, 20]


def test_a_validation_that_is_not_finite_stops_the_run(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 4: validation gave nan"):
        train(*data, ENCODER, CONFIG, tmp_path / "run", validate=lambda encoder: float("nan"))


def test_patience_without_validation_is_refused(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience: there is no validation"):
        train(*data, ENCODER, CONFIG.model_copy(update={"patience": 1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_running_mean_of_the_weights_is_kept(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    tables: list[Tensor] = []
    seen: list[UserEncoder] = []
    build = build_encoder

    def spy(config: EncoderConfig) -> UserEncoder:
        seen.append(build(config))
        return seen[-1]

    def note(report: StepReport) -> None:
        tables.append(seen[0].item_embedding.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "build_encoder", spy)
        config = CONFIG.model_copy(update={"ema_decay": 0.7})
        kept = train(*data, ENCODER, config, tmp_path / "run", on_step=note)
    mean = tables[0]
    for table in tables[1:]:
        mean = 0.7 * mean + 0.3 * table
    torch.testing.assert_close(kept.item_embedding.weight.detach(), mean)
    assert not torch.equal(mean, tables[-1])


@pytest.mark.parametrize("config", [SASREC, GRU4REC, BERT4REC], ids=lambda config: config.model)
def test_every_encoder_learns(data: tuple[Dataset, Split], tmp_path: Path, config: EncoderConfig) -> None:
    losses: list[float] = []
    training = CONFIG.model_copy(update={"epochs": 25, "negatives": "full"})
    train(*data, config, training, tmp_path / "run", on_step=lambda report: losses.append(report.loss))
    assert sum(losses[-8:]) / 8 < 0.4 * losses[0]


def test_products_in_bfloat16_learn_the_same(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for precision, into in losses.items():
        config = CONFIG.model_copy(update={"precision": precision})
        reports: list[StepReport] = []
        kept = train(*data, ENCODER, config, tmp_path / precision, on_step=reports.append)
        into.extend(report.loss for report in reports)
        assert kept.item_embedding.weight.dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_non_positive_targets_are_read_but_not_learned(tmp_path: Path) -> None:
    """Rows that are targets only where the mask is 0, and never negatives, get no gradient through the loss."""
    histories = [[(0, 1, 10), (1, 1, 20), (2, 2, 30), (3, 1, 40)] for _ in range(4)]
    dataset = write_dataset(tmp_path / "data", histories, range(400))
    split = split_dataset(dataset, SplitInfo(protocol="all"))
    config = TrainConfig(epochs=1, batch_size=4, num_negatives=1, learning_rate=0.01)
    encoder = ENCODER.model_copy(update={"num_items": 400, "num_actions": 0, "max_length": 3, "dropout": 0.0})
    torch.manual_seed(config.seed)
    before = build_encoder(encoder).item_embedding.weight.detach().clone()
    after = train(dataset, split, encoder, config, tmp_path / "run").item_embedding.weight.detach()
    moved = (before != after).any(dim=1).nonzero().flatten().tolist()
    # 0, 1 and 2 are inputs, 1 and 3 are targets that count, and one more row is the negative.
    assert {0, 1, 2, 3} <= set(moved)
    assert len(moved) <= 5


# TensorBoard's reader never closes its file; it must be collected while the test may still ignore that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_happens_is_logged_to_tensorboard(data: tuple[Dataset, Split], tmp_path: Path) -> None:
    losses: list[float] = []
    config = CONFIG.model_copy(update={"schedule": "linear"})
    judge = iter([0.25, 0.5, 0.75])
    train(
        *data,
        ENCODER,
        config,
        tmp_path / "run",
        validate=lambda encoder: next(judge),
        on_step=lambda report: losses.append(report.loss),
    )
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    assert [scalar.value for scalar in log.Scalars("train/loss")] == pytest.approx(losses)
    rates = [scalar.value for scalar in log.Scalars("train/learning_rate")]
    assert rates == pytest.approx([0.01 * (12 - step) / 12 for step in range(12)])
    assert all(scalar.value > 0 for scalar in log.Scalars("train/gradient_norm"))
    assert all(scalar.value > 0 for scalar in log.Scalars("train/tokens_per_second"))
    assert [(scalar.step, scalar.value) for scalar in log.Scalars("validation")] == [(3, 0.25), (7, 0.5), (11, 0.75)]
    del log
    gc.collect()


def test_popularity_is_that_of_the_training_events_and_not_learned_twice(
    data: tuple[Dataset, Split], tmp_path: Path
) -> None:
    config = ENCODER.model_copy(update={"popularity": True})
    with pytest.raises(ConfigError, match="in-batch or by popularity"):
        train(*data, config, CONFIG, tmp_path / "uniform")
    with pytest.raises(ConfigError, match="without log_q"):
        train(*data, config, CONFIG.model_copy(update={"negatives": "in-batch", "log_q": "standard"}), tmp_path / "q")
    kept = train(*data, config, CONFIG.model_copy(update={"negatives": "in-batch"}), tmp_path / "run")
    assert kept.popularity is not None
    assert torch.equal(kept.popularity, CONFIG.temperature * torch.from_numpy(log_popularity(*data)))
    assert torch.equal(weights(tmp_path / "run")["popularity"], kept.popularity)
