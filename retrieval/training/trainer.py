"""Training by masked next-item prediction (arXiv 2402.17152, section 2.2, retrieval)."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from retrieval.config import Config
from retrieval.data.dataset import Dataset
from retrieval.data.sequences import TrainingBatch, gather_training
from retrieval.data.splits import Split
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.checkpoint import CheckpointInfo, save_checkpoint
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.model import HSTUEncoder
from retrieval.errors import InputError, TrainingError
from retrieval.training.loss import sampled_softmax_loss, uniform_negatives
from retrieval.training.state import load_state, save_state

__all__ = ["StepReport", "TrainConfig", "train"]

_STATE = "training-state.safetensors"
_STATE_SECONDS = 60.0


class TrainConfig(Config):
    """Hyperparameters; defaults are those of the public tables, but for negatives that a batch shares.

    Attributes:
        epochs: passes over the users.
        batch_size: users per step.
        learning_rate: of AdamW with betas (0.9, 0.98).
        weight_decay: of AdamW.
        num_negatives: items that each step contrasts with.
        temperature: τ of the softmax.
        seed: determines initial weights, order, negatives and dropout; on a CPU, the run bit for bit.
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    num_negatives: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.05, gt=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What is known after a step; `loss` is the step's mean, `tokens` counts those of this step."""

    step: int
    steps: int
    loss: float
    tokens: int


class _Batches:
    """Training batches in an order that only the seed and the epoch decide."""

    def __init__(self, dataset: Dataset, split: Split, config: TrainConfig, max_length: int) -> None:
        self.dataset, self.config, self.max_length = dataset, config, max_length
        self.ends = split.train_ends
        self.users = np.flatnonzero(split.train_ends - dataset.offsets[:-1] >= 2)
        self.per_epoch = math.ceil(len(self.users) / config.batch_size)

    def from_step(self, first: int) -> Iterator[tuple[int, TrainingBatch]]:
        """Number and contents of each step from `first` (counted from 0) to the last."""
        for step in range(first, self.per_epoch * self.config.epochs):
            epoch, place = divmod(step, self.per_epoch)
            if step == first or place == 0:
                order = np.random.default_rng([self.config.seed, epoch]).permutation(self.users)
            users = order[place * self.config.batch_size : (place + 1) * self.config.batch_size]
            yield step, self._gather(users)

    def _gather(self, users: NDArray[np.int64]) -> TrainingBatch:
        starts = self.dataset.offsets[users]
        return gather_training(self.dataset.events, starts, self.ends[users], self.dataset.positive, self.max_length)


def train(
    dataset: Dataset,
    split: Split,
    encoder_config: HSTUConfig,
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepReport], None] | None = None,
) -> HSTUEncoder:
    """Train an encoder and write it to `run_dir`, with TensorBoard logs beside it.

    A killed run that is started again with `resume` ends with the same weights as one that was never killed.

    Args:
        dataset: the events.
        split: which of them train.
        encoder_config: shape of the encoder.
        config: hyperparameters.
        run_dir: folder of this run.
        resume: continue the run in `run_dir` if it holds one.
        device: where to train.
        on_step: called after every step.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        InputError: `run_dir` holds a run and `resume` is false.
        CheckpointError: `run_dir` holds a run with other settings.
        TrainingError: the loss is no longer finite.
    """
    state_file = run_dir / _STATE
    if not resume and any((run_dir / name).exists() for name in (_STATE, "encoder.json")):
        raise InputError(f"{run_dir}: holds a training run already; continue it with --resume or name a new folder")
    run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    encoder = HSTUEncoder(encoder_config).to(device)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    header: dict[str, Any] = {
        "encoder": encoder_config.model_dump(),
        "training": config.model_dump(),
        "dataset": dataset.info.fingerprint,
        "split": split.info.model_dump(),
    }
    done = load_state(state_file, encoder, optimizer, header) if state_file.exists() else 0
    batches = _Batches(dataset, split, config, encoder_config.max_length)
    steps = batches.per_epoch * config.epochs
    saved_at = time.monotonic()
    with SummaryWriter(str(run_dir / "tensorboard"), purge_step=done) as log:
        for step, batch in batches.from_step(done):
            loss = _step(encoder, optimizer, batch, config, step)
            log.add_scalar("train/loss", loss, step)
            if on_step is not None:
                on_step(StepReport(step=step + 1, steps=steps, loss=loss, tokens=len(batch.targets)))
            if time.monotonic() - saved_at > _STATE_SECONDS or step + 1 == steps:
                save_state(state_file, encoder, optimizer, header | {"step": step + 1})
                saved_at = time.monotonic()
    info = CheckpointInfo(
        encoder=encoder_config,
        actions=tuple(action.value for action in dataset.info.actions),
        dataset=dataset.info.fingerprint,
        split=split.info.model_dump(),
        training=config.model_dump() | {"steps": steps},
    )
    save_checkpoint(run_dir, encoder, info)
    return encoder.eval()


def _step(
    encoder: HSTUEncoder, optimizer: torch.optim.Optimizer, batch: TrainingBatch, config: TrainConfig, step: int
) -> float:
    """One update; every random choice in it follows from the seed and the step's number."""
    seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    encoder.train()
    users = encoder(JaggedTensors.of(batch.inputs, encoder.device))
    asked = torch.from_numpy(batch.mask).to(encoder.device)
    targets = torch.from_numpy(batch.targets).to(encoder.device)[asked]
    negatives = uniform_negatives(encoder.config.num_items, config.num_negatives, generator).to(encoder.device)
    if len(targets) == 0:
        return 0.0
    loss = sampled_softmax_loss(users[asked], targets, negatives, encoder.item_embedding.weight, config.temperature)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step + 1}: the loss is {value}; the last checkpoint is kept, try a lower learning rate"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value
