"""Sampled softmax over cosine similarities (the loss of arXiv 2402.17152's public tables)."""

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.encoder.model import normalize

__all__ = ["sampled_softmax_loss", "uniform_negatives"]


def uniform_negatives(num_items: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows to contrast with, shared by a whole batch: int64 `[R]`.

    Uniform with replacement; the whole catalogue where it is no larger than `count`, which makes the loss the
    full softmax.
    """
    if num_items <= count:
        return torch.arange(num_items)
    return torch.randint(num_items, (count,), generator=generator)


def sampled_softmax_loss(
    users_TD: Tensor, targets: Tensor, negatives: Tensor, item_table: Tensor, temperature: float
) -> Tensor:
    """Mean over T of −log( e^{u·e⁺/τ} / (e^{u·e⁺/τ} + Σ_r e^{u·e_r/τ}) ), item vectors e of unit length.

    A negative that equals the position's own target is left out of its sum.

    Args:
        users_TD: user embeddings of unit length `[T, D]`.
        targets: rows of the items that came next, int64 `[T]`.
        negatives: rows shared by all positions, int64 `[R]`.
        item_table: unnormalised item table `[N, D]`; gradients reach only the rows named.
        temperature: τ.

    Memory is of order T × R, whatever N is.
    """
    wanted = functional.embedding(targets, item_table)
    contrast = functional.embedding(negatives, item_table)
    positive = (users_TD * normalize(wanted)).sum(-1, keepdim=True)
    negative = users_TD @ normalize(contrast).T
    negative = negative.masked_fill(targets.unsqueeze(1) == negatives, -torch.inf)
    logits = torch.cat([positive, negative], dim=1) / temperature
    return functional.cross_entropy(logits, targets.new_zeros(len(targets)))
