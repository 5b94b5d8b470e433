"""Training by masked next-item prediction (arXiv 2402.17152, section 2.2, retrieval) or by cloze, and its loop."""

import hashlib
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from retrieval.data.dataset import Dataset
from retrieval.data.item_features import item_features
from retrieval.data.popularity import log_popularity
from retrieval.data.splits import Split, training_counts
from retrieval.encoder.build import build_encoder
from retrieval.encoder.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import ConfigError, InputError, TrainingError, TrainingStoppedError
from retrieval.files import remove_temporary_files
from retrieval.training.batches import Batches, Fresh
from retrieval.training.config import TrainConfig
from retrieval.training.learner import Learner, StepOutcome
from retrieval.training.state import load_state, save_state
from retrieval.training.stop import stop_request
from retrieval.training.tables import table_sizes

__all__ = ["TRAINING_STATE", "StepReport", "Validate", "train"]

Validate = Callable[[UserEncoder], float]
"""Judges an encoder in evaluation mode, on what is held out for validation; more is better."""

TRAINING_STATE = "training-state.safetensors"
"""What a run's folder holds beside the encoder: all that `Learner.tensors` names, and how far the run is."""
# The state is saved at least so many seconds after the last time, and late enough for saving to take at most so much
# of the run.
_STATE_SECONDS = 60.0
_STATE_SHARE = 0.05
# A run has come apart once its smoothed loss lies so many nats above the lowest that it had: e³ = 20 times the
# perplexity. What new data or a noisy batch does to a run is far less.
_SMOOTHING = 0.98
_RISE = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What is known after a step.

    Attributes:
        step: steps done.
        steps: of the whole run.
        loss: the step's mean.
        tokens: of this step.
        validation: what the last validation gave; None before there is one.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    validation: float | None


@dataclass(slots=True, kw_only=True)
class _Progress:
    """How far a run is: steps done, the last validation, the best one, and how many have not been better since.

    `loss` is smoothed over about 50 steps, `lowest_loss` the least that it was.
    """

    step: int = 0
    loss: float | None = None
    lowest_loss: float = math.inf
    last: float | None = None
    best: float | None = None
    best_step: int = 0
    since_best: int = 0


def train(
    dataset: Dataset,
    split: Split,
    encoder_config: EncoderConfig,
    config: TrainConfig,
    run_dir: Path,
    *,
    initial: Mapping[str, Tensor] | None = None,
    learned: Callable[[], Mapping[str, Tensor]] | None = None,
    fresh: Fresh | None = None,
    validate: Validate | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepReport], None] | None = None,
) -> UserEncoder:
    """Train an encoder and write it to `run_dir`, with TensorBoard logs beside it.

    A run that ended early, by SIGTERM, SIGINT, a crash or a kill, and is started again with `resume` ends with the
    same weights as one that never did.

    Args:
        dataset: the events.
        split: which of them train.
        encoder_config: shape of the encoder.
        config: hyperparameters.
        run_dir: folder of this run.
        initial: weights to start from, a state of this encoder by name; None draws them.
        learned: instead of `initial`, all that an earlier run had learned, the optimiser's state too, by the names of
            `Learner.tensors`. Called once, and what it gives is let go of before the first step: with millions of items
            it is gigabytes.
        fresh: what of the split was learned already, where the run goes on from that; None: nothing.
        validate: called after every `config.validate_every` epochs and after the last; the encoder that it likes best
            is the one that is kept. Without it the last one is. It must not depend on anything but the encoder.
        resume: continue the run in `run_dir` if it holds one.
        device: where to train.
        on_step: called after every step.

    Returns:
        The encoder that is kept, in evaluation mode.

    Raises:
        InputError: `run_dir` holds a run and `resume` is false.
        ConfigError: hyperparameters that exclude each other or that the dataset does not fit, or `patience` without
            validation.
        CheckpointError: `run_dir` holds a run with other settings.
        TrainingError: the loss, its gradient or the validation is no longer finite, or the loss has risen far above
            where it was; what is on disk is from before.
        TrainingStoppedError: SIGTERM or SIGINT came; the step in hand was finished and the state saved.
    """
    if not resume and any((run_dir / name).exists() for name in (TRAINING_STATE, "encoder.json")):
        raise InputError(f"{run_dir}: holds a training run already; continue it with --resume or name a new folder")
    if config.patience is not None and validate is None:
        raise ConfigError("patience: there is no validation whose result could stop the run")
    kinds = tuple(kind.rows for kind in dataset.info.kinds)
    if encoder_config.kinds != kinds:
        raise ConfigError(
            f"kinds: the encoder reads {encoder_config.kinds}, but the dataset's tables have {kinds} rows"
        )
    torch.manual_seed(config.seed)
    encoder = build_encoder(encoder_config).to(device)
    if initial is not None:
        encoder.load_state_dict(dict(initial))
    batches = Batches(
        dataset,
        split,
        config,
        fresh,
        objective=encoder.objective,
        max_length=encoder_config.max_length,
        query_actions=encoder_config.query_actions,
    )
    steps = batches.per_epoch * config.epochs
    schema = config.item_features
    counts = training_counts(dataset, split)
    features = None if schema is None else item_features(dataset.vocabulary, schema, counts)
    learner = Learner(encoder, config, counts, steps, features)
    started_from: dict[str, Any] = {"initial": _fingerprint(initial)}
    if learned is not None:
        before = learned()
        started_from["initial"] = _fingerprint(before)
        learner.adopt(before)
        del before
    if encoder.popularity is not None:
        _check_popularity(config)
        encoder.popularity.copy_(config.temperature * torch.from_numpy(log_popularity(dataset, split)))
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(run_dir)
    if fresh is not None:
        started_from["fresh"] = fresh.model_dump()
    tables = table_sizes(dataset, encoder_config, config, counts)
    run = _Run(dataset, split, encoder_config, config, run_dir, learner, validate, started_from, tables)
    if (run_dir / TRAINING_STATE).exists():
        run.load()
    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=run.progress.step) as log, stop_request() as request:
        steps_left = batches.from_step(run.progress.step)
        while not run.has_stalled and (following := next(steps_left, None)) is not None:
            step, batch = following
            started = time.monotonic()
            outcome = learner.step(batch, step)
            _log_step(log, step, outcome, len(batch.targets) / (time.monotonic() - started))
            run.progress.step = step + 1
            run.watch(outcome.loss)
            epoch, place = divmod(step + 1, batches.per_epoch)
            if validate is not None and place == 0 and (epoch % config.validate_every == 0 or step + 1 == steps):
                log.add_scalar("validation", run.validate(), step)
            if on_step is not None:
                tokens, last = len(batch.targets), run.progress.last
                on_step(StepReport(step=step + 1, steps=steps, loss=outcome.loss, tokens=tokens, validation=last))
            ends = run.has_stalled or step + 1 == steps
            if ends or request.signal is not None or run.save_is_due:
                run.save()
            if request.signal is not None and not ends:
                name = signal.Signals(request.signal).name
                done = f"stopped by {name} after step {step + 1} of {steps}"
                message = f"{done}; saved: run it again to go on (train: with --resume)"
                raise TrainingStoppedError(message, request.signal)
    return run.finish(device)


def _check_popularity(config: TrainConfig) -> None:
    """Scores with a part for popularity need the rest to be learned without it.

    Against negatives that are drawn by popularity Q, u·e/τ learns log P(item | user) − log Q(item) + a constant; so
    u·e + τ·log Q of today ranks by what P is with the popularity of today.

    Raises:
        ConfigError: they would have popularity twice.
    """
    if config.negatives not in ("in-batch", "popularity") or config.log_q != "none":
        raise ConfigError(
            "popularity: is added to what is learned, which then must not hold it: draw negatives in-batch or by "
            "popularity, without log_q"
        )


def _fingerprint(weights: Mapping[str, Tensor] | None) -> str | None:
    if weights is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _log_step(log: SummaryWriter, step: int, outcome: StepOutcome, tokens_per_second: float) -> None:
    log.add_scalar("train/loss", outcome.loss, step)
    log.add_scalar("train/learning_rate", outcome.learning_rate, step)
    log.add_scalar("train/gradient_norm", outcome.grad_norm, step)
    log.add_scalar("train/tokens_per_second", tokens_per_second, step)


class _Run:
    """A run's folder and progress."""

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        encoder_config: EncoderConfig,
        config: TrainConfig,
        run_dir: Path,
        learner: Learner,
        validate: Validate | None,
        started_from: Mapping[str, Any],
        tables: Mapping[str, int],
    ) -> None:
        self.progress = _Progress()
        self._dataset, self._split, self._encoder_config, self._config = dataset, split, encoder_config, config
        self._run_dir, self._learner, self._validate = run_dir, learner, validate
        self._tables = tables
        self._next_save = time.monotonic() + _STATE_SECONDS
        self._settings: dict[str, Any] = {
            "encoder": encoder_config.model_dump(),
            # What "auto" came to is part of what was done.
            "training": config.model_dump() | {"sparse_items": learner.by_rows},
            "dataset": dataset.info.fingerprint,
            "split": split.info.model_dump(),
            "validation": validate is not None,
            **started_from,
        }

    @property
    def has_stalled(self) -> bool:
        """Whether validations have not got better for as long as patience lasts."""
        return self._config.patience is not None and self.progress.since_best >= self._config.patience

    @property
    def save_is_due(self) -> bool:
        return time.monotonic() >= self._next_save

    def watch(self, loss: float) -> None:
        """Take a step's loss into account.

        Raises:
            TrainingError: the run has come apart.
        """
        progress = self.progress
        before = loss if progress.loss is None else progress.loss
        progress.loss = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        progress.lowest_loss = min(progress.lowest_loss, progress.loss)
        if progress.loss > progress.lowest_loss + _RISE:
            found = f"the loss has risen to {progress.loss:.2f} from {progress.lowest_loss:.2f}"
            raise TrainingError(f"step {progress.step}: {found}; try a lower learning rate in a new run")

    def save(self) -> None:
        started = time.monotonic()
        save_state(self._run_dir / TRAINING_STATE, self._learner.tensors(), self._settings, asdict(self.progress))
        ended = time.monotonic()
        self._next_save = ended + max(_STATE_SECONDS, (ended - started) / _STATE_SHARE)

    def load(self) -> None:
        self.progress = _Progress(**load_state(self._run_dir / TRAINING_STATE, self._learner.tensors(), self._settings))

    def validate(self) -> float:
        """Validate, and keep the encoder if it is the best so far.

        A kill between the two files of a checkpoint does no harm: the state on disk is older than it, and the resumed
        run comes by here again.
        """
        assert self._validate is not None
        encoder, progress = self._learner.best_encoder, self.progress
        value = self._validate(encoder.eval())
        if not math.isfinite(value):
            raise TrainingError(f"step {progress.step}: validation gave {value}; the last checkpoint is kept")
        progress.last = value
        progress.since_best += 1
        if progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.since_best = value, progress.step, 0
            self._save_encoder(encoder, {"validation": value})
        return value

    def finish(self, device: torch.device | str) -> UserEncoder:
        """Write the encoder that is kept, unless validation did, and return it."""
        if self._validate is not None:
            return load_checkpoint(self._run_dir, device)[0]
        encoder = self._learner.best_encoder
        self._save_encoder(encoder, {})
        return encoder.eval()

    def _save_encoder(self, encoder: UserEncoder, found: dict[str, float]) -> None:
        info = CheckpointInfo(
            encoder=self._encoder_config,
            actions=tuple(action.value for action in self._dataset.info.actions),
            kinds=self._dataset.info.kinds,
            dataset=self._dataset.info.fingerprint,
            split=self._split.info.model_dump(),
            training=self._settings["training"] | {"steps": self.progress.step, "tables": self._tables} | found,
        )
        save_checkpoint(self._run_dir, encoder, info)
