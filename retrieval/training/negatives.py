"""Which items a training step contrasts its targets with, and how likely each was to be drawn."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["NegativeKind", "NegativeSampler", "Negatives"]

NegativeKind = Literal["full", "uniform", "popularity", "in-batch", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Negatives:
    """What a step contrasts with.

    Attributes:
        rows: int64 `[R]`, shared by the step's positions, or `[T, R]`, of each position's own; None for all items.
        log_expected: log of how often each of `rows` is expected among the R drawn, float32 of their shape.
        target_log_expected: the same of each target, float32 `[T]`.
    """

    rows: Tensor | None
    log_expected: Tensor | None = None
    target_log_expected: Tensor | None = None


class NegativeSampler:
    """Draws negatives with replacement; R draws cost O(R log N) at most, whatever the catalogue.

    full: none are drawn, the loss runs over all items.
    uniform: every item with chance 1/N, or of `pool` alone.
    popularity: with chance (c + 1) / Σ (c + 1), c the item's training events.
    in-batch: from the step's own targets, repeats included, so by popularity over many steps: Q = c / Σ c (Yi et al.,
        "Sampling-bias-corrected neural modeling", RecSys 2019). A target without training events counts as one event.
    mixed: ⌊R/2⌋ uniform, the others in-batch, and Q the mean over both (Yang et al., "Mixed negative sampling", WWW
        2020).

    Args:
        kind: as above.
        count: R, at least 1.
        shared: whether a step's positions share their negatives.
        item_counts: training events of each item, `[N]`.
        pool: rows of the items that may be negatives, all targets among them, ascending int64; None for all. For "full"
            and the uniform draws; the others draw by events anyway, or by one more than these.
    """

    def __init__(
        self,
        kind: NegativeKind,
        count: int,
        *,
        shared: bool,
        item_counts: NDArray[np.int64],
        pool: NDArray[np.int64] | None = None,
    ) -> None:
        self._kind, self._count, self._shared = kind, count, shared
        items = len(item_counts)
        self._pool = None if pool is None or len(pool) == items else torch.from_numpy(pool)
        if self._pool is None:
            uniform = torch.full((1,), 1 / items, dtype=torch.float64).expand(items)
        else:
            uniform = torch.zeros(items, dtype=torch.float64).index_fill(0, self._pool, 1 / len(self._pool))
        self._choices = items if self._pool is None else len(self._pool)
        if kind in ("full", "uniform"):
            self._chances = uniform
        elif kind == "popularity":
            # Whole numbers, so that every item has exactly its chance.
            self._ends = torch.from_numpy(item_counts + 1).cumsum(0)
            self._chances = torch.from_numpy(item_counts + 1) / self._ends[-1].double()
        else:
            share = self._uniform_draws() / count
            by_events = torch.from_numpy(item_counts) / float(max(item_counts.sum(), 1))
            if share == 0:  # every target of a step was drawn, whatever the counts say
                by_events = by_events.clamp(min=1 / max(item_counts.sum(), 1))
            self._chances = (1 - share) * by_events + share * uniform

    def draw(self, targets: Tensor, generator: torch.Generator) -> Negatives:
        """Draw for a step's targets, int64 `[T]` on the CPU; the same bits for the same state of the generator.

        In-batch and mixed negatives need T ≥ 1.
        """
        if self._kind == "full":
            return Negatives(rows=self._pool)
        shape = (self._count,) if self._shared else (len(targets), self._count)
        rows = self._rows(shape, targets, generator)
        return Negatives(
            rows=rows,
            log_expected=(self._chances[rows] * self._count).log().float(),
            target_log_expected=(self._chances[targets] * self._count).log().float(),
        )

    def _rows(self, shape: tuple[int, ...], targets: Tensor, generator: torch.Generator) -> Tensor:
        if self._kind == "popularity":
            events = torch.randint(int(self._ends[-1]), shape, generator=generator)
            return torch.searchsorted(self._ends, events, right=True)
        if self._kind == "uniform":
            return self._uniform(shape, generator)
        in_batch = targets[torch.randint(len(targets), shape, generator=generator)]
        if uniform := self._uniform_draws():
            in_batch[..., :uniform] = self._uniform((*shape[:-1], uniform), generator)
        return in_batch

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        drawn = torch.randint(self._choices, shape, generator=generator)
        return drawn if self._pool is None else self._pool[drawn]

    def _uniform_draws(self) -> int:
        """How many of R draws are uniform beside those from the batch."""
        return self._count // 2 if self._kind == "mixed" else 0
