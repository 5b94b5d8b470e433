"""`softmax_loss` in plain differentiable torch, with all logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["EPS", "softmax_loss_reference"]

# Least length that an item's row is divided by: that of the encoder's `normalize`.
EPS = 1e-6


def softmax_loss_reference(
    users_TD: Tensor,
    targets: Tensor,
    item_table: Tensor,
    negatives: Tensor | None,
    *,
    temperature: float,
    weights: Tensor | None = None,
    negative_bias: Tensor | None = None,
    positive_bias: Tensor | None = None,
) -> Tensor:
    """As `softmax_loss.softmax_loss`; any floating dtype, `[T, R]` logits, `[T, R, D]` for own negatives."""
    if negatives is None:
        negatives = torch.arange(len(item_table), device=targets.device)
    wanted = functional.normalize(functional.embedding(targets, item_table), dim=-1, eps=EPS)
    contrast = functional.normalize(functional.embedding(negatives, item_table), dim=-1, eps=EPS)
    positive = (users_TD * wanted).sum(-1, keepdim=True) / temperature
    negative = (users_TD.unsqueeze(1) @ contrast.mT).squeeze(1) if negatives.ndim == 2 else users_TD @ contrast.T
    negative = negative / temperature
    if positive_bias is not None:
        positive = positive + positive_bias.unsqueeze(1)
    if negative_bias is not None:
        negative = negative + negative_bias
    negative = negative.masked_fill(targets.unsqueeze(1) == negatives, -torch.inf)
    logits = torch.cat([positive, negative], dim=1)
    losses = functional.cross_entropy(logits, targets.new_zeros(len(targets)), reduction="none")
    return losses.sum() if weights is None else (losses * weights).sum()
