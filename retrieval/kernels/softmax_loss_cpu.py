"""`softmax_loss` on a CPU: logits exist for some positions at a time, once.

All logits of a few positions fit in the cache, so that their maximum and sum are known before the exponentials serve
both gradients: no running maximum and no second product of the backward pass.

Legend: see `softmax_loss.py`; M positions of a step.
"""

import torch
from torch import Tensor

from retrieval.kernels import softmax_loss_native

__all__ = ["forward_cpu"]

# Logits of a step, float32 4 MiB: on the way from the product over the exponential to two more products they should
# stay in the cache. Products of fewer than _LEAST_USERS rows waste BLAS's time.
_LOGITS_PER_STEP = 1 << 20
_LEAST_USERS = 16


def forward_cpu(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    bias: Tensor,
    first: Tensor,
    last: Tensor,
    weights: Tensor,
    scale: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[T]`, Σ_r p_tr e_r `[T, D]` and Σ_t w_t p_tr u_t `[R, D]`; see `softmax_loss`."""
    if users.dtype == torch.bfloat16 and len(users) and len(items) and softmax_loss_native.available():
        inputs = (users, items, positive, bias, first, last, weights, scale, with_gradients)
        return softmax_loss_native.forward(*inputs)
    wide = positive.dtype
    items = items.to(wide)
    first, last = first.long(), last.long()
    # One more column in the product adds the bias: a pass over the logits less.
    contrasts = torch.cat([items, bias.unsqueeze(1)], 1) if bias.numel() else items
    one = torch.ones(len(users), contrasts.shape[1] - items.shape[1], dtype=wide)
    losses = torch.zeros_like(positive)
    mean = torch.zeros(len(users) if with_gradients else 0, users.shape[1], dtype=wide)
    # Transposed: a product of few rows and many columns takes BLAS less time than its transpose.
    shares_DR = torch.zeros(users.shape[1], len(items) if with_gradients else 0, dtype=wide)
    if not len(items):
        return losses, mean, shares_DR.T
    step = max(_LEAST_USERS, _LOGITS_PER_STEP // len(items))
    buffer = torch.empty(min(step, len(users)), len(items), dtype=wide)
    for start in range(0, len(users), step):
        rows = slice(start, start + step)
        u_MD = users[rows].to(wide)
        p_MR = buffer[: len(u_MD)]
        torch.mm(torch.cat([u_MD * scale, one[rows]], 1), contrasts.T, out=p_MR)
        _leave_out(p_MR, first[rows], last[rows])
        # The maximum includes the positive, which makes it finite; the sum does not, so that log1p can be exact.
        top = torch.maximum(positive[rows], p_MR.amax(1))
        p_MR.sub_(top.unsqueeze(1)).exp_()
        above = top - positive[rows]
        losses[rows] = loss = torch.logaddexp(p_MR.sum(1).log_().add_(above), torch.zeros_like(top))
        if with_gradients:
            factor = (above - loss).exp_()
            mean[rows] = torch.mm(items.T, p_MR.T).mul_(factor).T
            shares_DR.addmm_((u_MD * (weights[rows] * factor).unsqueeze(1)).T, p_MR)
    return losses, mean, shares_DR.T.contiguous()


def _leave_out(logits_MR: Tensor, first: Tensor, last: Tensor) -> None:
    """−∞ in the places from `first` to `last` of each row that has any."""
    hit = (last > first).nonzero().squeeze(1)
    if len(hit):
        counts = (last - first)[hit]
        starts = hit * logits_MR.shape[1] + first[hit] - counts.cumsum(0) + counts
        places = torch.repeat_interleave(starts, counts) + torch.arange(int(counts.sum()))
        logits_MR.view(-1)[places] = -torch.inf
