"""Sampled and full softmax over cosine similarities (the loss of arXiv 2402.17152's public tables)."""

import torch
from torch import Tensor

from retrieval.kernels.softmax_loss import softmax_loss

__all__ = ["sampled_softmax_loss", "uniform_negatives"]


def uniform_negatives(num_items: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows to contrast with, shared by a whole batch: int64 `[R]`.

    Uniform with replacement; the whole catalogue, in order, where it is no larger than `count`, which makes the loss
    the full softmax.
    """
    if num_items <= count:
        return torch.arange(num_items)
    return torch.randint(num_items, (count,), generator=generator)


def sampled_softmax_loss(
    users_TD: Tensor, targets: Tensor, negatives: Tensor | None, item_table: Tensor, temperature: float
) -> Tensor:
    """Mean over T of −log( e^{u·e⁺/τ} / (e^{u·e⁺/τ} + Σ_r e^{u·e_r/τ}) ), item vectors e of unit length.

    A negative that equals the position's own target is left out of its sum.

    Args:
        users_TD: user embeddings of unit length `[T, D]`.
        targets: rows of the items that came next, int64 `[T]`.
        negatives: rows shared by all positions, int64 `[R]`; None, or all rows in order, for the full softmax.
        item_table: unnormalised item table `[N, D]`; gradients reach only the rows named.
        temperature: τ.

    Memory is of order (T + R) × D beside the table's gradient: see `kernels.softmax_loss`.
    """
    if negatives is not None and len(negatives) == len(item_table):
        # The whole table needs neither copies of its rows nor the search for collisions.
        everything = torch.arange(len(item_table), device=negatives.device)
        negatives = None if torch.equal(negatives, everything) else negatives
    return softmax_loss(users_TD, targets, item_table, negatives, temperature=temperature).mean()
