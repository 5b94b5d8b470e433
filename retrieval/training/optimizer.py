"""AdamW (arXiv 1711.05101, algorithm 2) over an encoder, with an item table that is updated whole or by rows.

Whole: every step decays the moments of every row and moves it, also where its gradient is 0. The work of a step grows
with the catalogue: three arrays `[N, D]` read and written.

By rows: each row has its own AdamW, whose clock stands still while no step names the row. A step reads and writes the
rows that it names and no others, so its work does not depend on N. For a row that every step names the two are the
same. For others they differ: a rest does not decay the moments, does not move the row on what momentum is left, nor
apply weight decay; and the bias correction counts the row's own updates, so that a row's first one is as long as in
the first step of the run.

Legend: N items, U rows named by a step, D width.
"""

import torch
from torch import Tensor, nn

from retrieval.errors import ConfigError
from retrieval.training.config import TrainConfig

__all__ = ["EncoderOptimizer", "RowAdamW", "updates_by_rows"]

_BETAS = (0.9, 0.98)
_EPS = 1e-8
_AUTO_ITEMS = 100_000


def updates_by_rows(config: TrainConfig, num_items: int) -> bool:
    """Whether a run updates its item table by rows.

    Raises:
        ConfigError: it cannot, because the loss or the running mean of the weights needs the whole table every step.
    """
    full = config.negatives == "full"
    by_rows = config.sparse_items
    if by_rows == "auto":
        by_rows = num_items > _AUTO_ITEMS and not full
    if by_rows and full:
        raise ConfigError("sparse_items: the full softmax has a gradient for every row; sample negatives instead")
    if by_rows and config.ema_decay is not None:
        raise ConfigError(
            "ema_decay: a running mean of the weights changes every row of the item table at every step, which "
            "sparse_items is there to avoid; leave one of them out"
        )
    return by_rows


class RowAdamW:
    """AdamW by rows (see the module) of one table `[N, D]`.

    Attributes:
        mean: first moments `[N, D]`.
        square: second moments `[N, D]`.
        updates: how often each row was updated, int32 `[N]`.
    """

    def __init__(self, table: Tensor, weight_decay: float) -> None:
        self._table, self._weight_decay = table, weight_decay
        # On a CPU, zeros are pages that the system hands out when they are first written: rows that no step ever
        # names cost no memory.
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.updates = torch.zeros(len(table), dtype=torch.int32, device=table.device)

    @torch.no_grad()
    def step(self, rows: Tensor, gradient_UD: Tensor, learning_rate: float) -> None:
        """Update the rows named, int64 `[U]` without repeats."""
        first, second = _BETAS
        updates = self.updates[rows] + 1
        mean = self.mean[rows].lerp_(gradient_UD, 1 - first)
        square = self.square[rows].mul_(second).addcmul_(gradient_UD, gradient_UD, value=1 - second)
        age = updates.unsqueeze(1).to(mean.dtype)
        scale = (square / (1 - second**age)).sqrt_().add_(_EPS)
        values = self._table[rows].mul_(1 - learning_rate * self._weight_decay)
        values.addcdiv_(mean / (1 - first**age), scale, value=-learning_rate)
        self.updates[rows] = updates
        self.mean[rows], self.square[rows] = mean, square
        self._table[rows] = values


class EncoderOptimizer:
    """AdamW over all weights of an encoder; its item table whole or by rows."""

    def __init__(self, encoder: nn.Module, table: Tensor, *, weight_decay: float, by_rows: bool) -> None:
        self._rows = RowAdamW(table, weight_decay) if by_rows else None
        named = {name: one for name, one in encoder.named_parameters() if not (by_rows and one is table)}
        self.whole = list(named.values())
        self._adam = torch.optim.AdamW(self.whole, 0.0, _BETAS, _EPS, weight_decay=weight_decay, fused=True)
        self._tensors: dict[str, Tensor] = {}
        for name, parameter in named.items():
            # torch makes these at the first step. They must be there before, to take what a state file holds.
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            self._tensors |= {f"{name}.{key}": value for key, value in self._adam.state[parameter].items()}
        if self._rows is not None:
            self._tensors |= {f"rows.{key}": getattr(self._rows, key) for key in ("mean", "square", "updates")}

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, not copied: what is written into these tensors is the state."""
        return self._tensors

    def step(self, learning_rate: float, rows: Tensor | None = None, gradient_UD: Tensor | None = None) -> None:
        """Update the weights by their `grad`, and by rows the rows named by the gradient given; clear every `grad`."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        if self._rows is not None:
            assert rows is not None
            assert gradient_UD is not None
            self._rows.step(rows, gradient_UD, learning_rate)
