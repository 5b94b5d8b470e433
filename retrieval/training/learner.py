"""One training step: batch → loss → gradient → update. Every random choice in it follows from seed and step.

Legend: T tokens, D width, N items, U rows of the item table that a step names.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from retrieval.data.item_features import ItemFeatures
from retrieval.data.sequences import TrainingBatch
from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import ConfigError, TrainingError
from retrieval.training.config import TrainConfig
from retrieval.training.item_table import ItemTable
from retrieval.training.loss import next_item_loss
from retrieval.training.negatives import Negatives, NegativeSampler
from retrieval.training.optimizer import EncoderOptimizer, updates_by_rows
from retrieval.training.schedule import learning_rate_at

__all__ = ["Learner", "StepOutcome"]

_TABLE = "item_embedding.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """Mean loss, length of the gradient before clipping, and the rate of a step."""

    loss: float
    grad_norm: float
    learning_rate: float


class Learner:
    """An encoder with all that changes as it learns.

    Args:
        encoder: learns in place.
        config: hyperparameters.
        item_counts: training events of each item, int64 `[N]`.
        steps: of the whole run, for the schedule.
        features: of every item, where `config.item_features` names some.

    Raises:
        ConfigError: hyperparameters that exclude each other.
    """

    def __init__(
        self,
        encoder: UserEncoder,
        config: TrainConfig,
        item_counts: NDArray[np.int64],
        steps: int,
        features: ItemFeatures | None = None,
    ) -> None:
        self.encoder, self._config, self._steps = encoder, config, steps
        self.by_rows = updates_by_rows(config, encoder.config.num_items)
        self._model: nn.Module = encoder
        self._item_table: ItemTable | None = None
        if features is not None:
            assert config.item_features is not None
            table = ItemTable(features, config.item_features, item_counts, encoder.config.width).to(encoder.device)
            self._item_table, self._model = table, nn.ModuleList([encoder, table])
        self._optimizer = EncoderOptimizer(
            self._model, encoder.item_embedding.weight, weight_decay=config.weight_decay, by_rows=self.by_rows
        )
        # So many uniform draws cost what the whole catalogue costs, and are noisier.
        everything = config.negatives == "uniform" and config.num_negatives >= encoder.config.num_items
        kind = "full" if everything and not self.by_rows else config.negatives
        self._sampler = NegativeSampler(
            kind,
            config.num_negatives,
            shared=config.shared_negatives,
            item_counts=item_counts,
            # What nobody could choose was turned down by nobody: as negatives, items that wait for their first event
            # would teach that whatever they share with each other, being new for instance, is not wanted.
            pool=None if features is None else np.flatnonzero(item_counts),
        )
        self._average: AveragedModel | None = None
        if config.ema_decay is not None:
            self._average = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    @property
    def best_encoder(self) -> UserEncoder:
        """What is evaluated and kept: the running mean where there is one, with finished item embeddings."""
        model = self._model if self._average is None else self._average.module
        if isinstance(model, UserEncoder):
            return model
        assert isinstance(model, nn.ModuleList)
        encoder = copy.deepcopy(model[0])
        assert isinstance(encoder, UserEncoder)
        with torch.no_grad():
            encoder.item_embedding.weight.copy_(model[1](encoder.item_embedding.weight))
        return encoder

    def tensors(self) -> dict[str, Tensor]:
        """All that changes, by name, not copied: what is written into these tensors is the state."""
        tensors = {f"model.{name}": one for name, one in self._model.state_dict().items()}
        tensors |= {f"optimizer.{name}": one for name, one in self._optimizer.tensors().items()}
        if self._average is not None:
            tensors |= {f"average.{name}": one for name, one in self._average.state_dict().items()}
        return tensors

    @torch.no_grad()
    def adopt(self, learned: Mapping[str, Tensor]) -> None:
        """Go on from what another learner of the same settings had learned, all of it, by the names of `tensors`.

        Raises:
            ConfigError: it has learned something else; nothing has been changed.
        """
        tensors = self.tensors()
        for name in sorted(tensors.keys() | learned.keys()):
            now, before = (tuple(one[name].shape) if name in one else None for one in (tensors, learned))
            if now != before:
                raise ConfigError(f"{name}: was learned as {before} and is {now} now; start from scratch")
        for name, tensor in tensors.items():
            tensor.copy_(learned[name])

    def step(self, batch: TrainingBatch, step: int) -> StepOutcome:
        """Learn from a batch; `step` counts from 0.

        Raises:
            TrainingError: the loss or its gradient is not finite; nothing has been changed.
        """
        config = self._config
        seed = int(np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        rate = learning_rate_at(step, self._steps, config.learning_rate, config.schedule, config.warmup_steps)
        if not batch.weights.any():
            return StepOutcome(loss=0.0, grad_norm=0.0, learning_rate=rate)
        self.encoder.train()
        loss, table, rows = self._loss(batch, torch.Generator().manual_seed(seed))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(_diverged(step, "loss", value))
        loss.backward()
        learned = [*self._optimizer.whole, *([table] if rows is not None else [])]
        norm = torch.nn.utils.get_total_norm([one.grad for one in learned if one.grad is not None])
        # A norm that is finite bounds every gradient and its square; from those AdamW makes finite weights. So no
        # state that is ever saved holds a number that is not finite.
        if not math.isfinite(float(norm)):
            raise TrainingError(_diverged(step, "gradient", float(norm)))
        if config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(learned, config.clip_norm, norm)
        self._optimizer.step(rate, rows, table.grad if rows is not None else None)
        if self._average is not None:
            self._average.update_parameters(self._model)
        return StepOutcome(loss=value, grad_norm=float(norm), learning_rate=rate)

    def _loss(self, batch: TrainingBatch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of a batch, the item table that it was computed with, and by rows the rows that this holds."""
        device = self.encoder.device
        asked = torch.from_numpy(np.flatnonzero(batch.weights))
        items, targets = torch.from_numpy(batch.inputs.items), torch.from_numpy(batch.targets)[asked]
        weights = torch.from_numpy(batch.weights)[asked]
        negatives = self._sampler.draw(targets, generator)
        table: Tensor = self.encoder.item_embedding.weight
        rows = None
        if self.by_rows:
            # Encoder and loss see a small table of the rows that the step names, and places in it for their numbers.
            # The gradient is then of the small table's size, and each row's is in one piece.
            real = (items < len(table)) & torch.from_numpy(batch.inputs.main)
            rows, items, targets, negatives = _renumber(items, real, targets, negatives)
            rows = rows.to(device)
            table = table.detach()[rows].requires_grad_()
        item_table = table
        if self._item_table is not None:
            item_table = self._item_table(table, rows, generator)
        inputs = replace(JaggedTensors.of(batch.inputs, device), items=items.to(device))
        bfloat16 = self._config.precision == "bfloat16"
        # On a CPU the encoder's products are small: rounding their operands takes longer than it saves.
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and device.type != "cpu"):
            users: Tensor = functional_call(self.encoder, {_TABLE: item_table}, (inputs,))
            if len(asked) < len(users):
                users = users.index_select(0, asked.to(device))
            if bfloat16:  # Norms are float32 under autocast, and the loss's products follow the users' type.
                users = users.bfloat16()
            loss = next_item_loss(
                users,
                targets.to(device),
                _on(negatives, device),
                item_table,
                temperature=self._config.temperature,
                log_q=self._config.log_q,
                weights=weights.to(device),
            )
        return loss, table, rows


def _renumber(
    items: Tensor, real: Tensor, targets: Tensor, negatives: Negatives
) -> tuple[Tensor, Tensor, Tensor, Negatives]:
    """Rows named, ascending without repeats `[U]`, and the arguments with each row's place among them for its number.

    Inputs that are not real, which name no row (a cloze encoder's mask, tokens of other kinds), stay as they are.
    """
    assert negatives.rows is not None
    named = torch.cat([items[real], targets, negatives.rows.flatten()])
    rows, places = named.unique(return_inverse=True)
    of_items, of_targets, of_negatives = places.split([int(real.sum()), len(targets), negatives.rows.numel()])
    items = items.masked_scatter(real, of_items)
    return rows, items, of_targets, replace(negatives, rows=of_negatives.view_as(negatives.rows))


def _on(negatives: Negatives, device: torch.device) -> Negatives:
    parts = {field.name: getattr(negatives, field.name) for field in fields(negatives)}
    return Negatives(**{name: one if one is None else one.to(device) for name, one in parts.items()})


def _diverged(step: int, what: str, value: float) -> str:
    return f"step {step + 1}: the {what} is {value}; the last checkpoint is kept, try a lower learning rate"
