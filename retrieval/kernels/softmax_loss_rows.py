"""Softmax loss where every position has negatives of its own, as the public tables of arXiv 2402.17152 draw them.

The same sums as in `softmax_loss.py`, with negatives `[T, R]`. Vectors `[M, R, D]` exist for the products of one small
chunk of positions at a time, once; the sums read users and items where they lie. Gathering has no reuse between
positions: negatives that a batch shares are many times cheaper.

Torch operations on any device. Legend: T positions, R negatives of each, U items, D width, M positions of a chunk.
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["forward_rows"]

# Pairs of position and negative in a chunk: 6 MiB of gathered float32 at D = 50.
_PAIRS_PER_STEP = 1 << 15


def forward_rows(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    bias: Tensor,
    negatives: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[T]`, Σ_r p_tr e_r `[T, D]` and Σ_t w_t p_tr u_t `[U, D]`.

    Args:
        users: `[T, D]`.
        items: unit vectors `[U, D]`.
        positive: logits of the positives, `[T]`, float32 or float64.
        bias: added to the negatives' logits, `[T, R]`, or of no elements for none.
        negatives: rows of `items`, int64 `[T, R]`.
        targets: row that a position leaves out, int64 `[T]`.
        weights: w, `[T]`.
        scale: factor of the inner products.
        with_gradients: otherwise the sums are empty.
    """
    users, items = users.to(positive.dtype), items.to(positive.dtype)
    losses = torch.zeros_like(positive)
    mean = torch.zeros_like(users if with_gradients else users[:0])
    shares = torch.zeros_like(items if with_gradients else items[:0])
    count = negatives.shape[1]
    if not negatives.numel():
        return losses, mean, shares
    step = max(1, _PAIRS_PER_STEP // count)
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        chosen, u_MD = negatives[rows], users[rows]
        p_MR = torch.bmm(functional.embedding(chosen, items), u_MD.unsqueeze(2)).squeeze(2).mul_(scale)
        if bias.numel():
            p_MR.add_(bias[rows])
        p_MR.masked_fill_(chosen == targets[rows].unsqueeze(1), -torch.inf)
        # As in `softmax_loss_cpu.py`.
        top = torch.maximum(positive[rows], p_MR.amax(1))
        p_MR.sub_(top.unsqueeze(1)).exp_()
        above = top - positive[rows]
        losses[rows] = loss = torch.logaddexp(p_MR.sum(1).log_().add_(above), torch.zeros_like(top))
        if with_gradients:
            p_MR.mul_((above - loss).exp_().unsqueeze(1))
            mean[rows] = functional.embedding_bag(chosen, items, per_sample_weights=p_MR, mode="sum")
            named, sums = _column_sums(p_MR.mul_(weights[rows].unsqueeze(1)), u_MD, chosen)
            shares.index_add_(0, named, sums)
    return losses, mean, shares


def _column_sums(pairs: Tensor, users: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Items that are chosen, each once, and the sum of its users, times what stands at the pairs, for each."""
    ordered, place = chosen.flatten().sort(stable=True)
    named, counts = ordered.unique_consecutive(return_counts=True)
    owner = place.div(chosen.shape[1], rounding_mode="floor")
    sums = functional.embedding_bag(
        owner, users, counts.cumsum(0) - counts, per_sample_weights=pairs.flatten()[place], mode="sum"
    )
    return named, sums
