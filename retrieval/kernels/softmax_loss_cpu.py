"""`softmax_loss` on a CPU: logits exist one cache-sized block at a time.

Legend: see `softmax_loss.py`; M users of a step, C items of a step.
"""

import torch
from torch import Tensor

__all__ = ["backward_cpu", "forward_cpu"]

# Logits of a step, float32 1 MiB: they should stay in the L2 cache between the product and the exponential.
_USERS_PER_STEP = 512
_ITEMS_PER_STEP = 512


def forward_cpu(
    users: Tensor, items: Tensor, positive: Tensor, first: Tensor, last: Tensor, scale: float, with_mean: bool
) -> tuple[Tensor, Tensor]:
    """Losses `[T]` and expected item `[T, D]` (`[0, D]` without `with_mean`); see `softmax_loss`."""
    wide = positive.dtype
    items = items.to(wide)
    losses = torch.empty_like(positive)
    mean = users.new_empty(len(users) if with_mean else 0, users.shape[1])
    logits_of = _Logits(items, first, last)
    for rows in _steps(len(users), _USERS_PER_STEP):
        u_MD = users[rows].to(wide) * scale
        # The maximum includes the positive, which makes it finite; the sum does not, so that log1p can be exact.
        top, total = positive[rows].clone(), torch.zeros_like(positive[rows])
        sum_DM = torch.zeros_like(u_MD.T, memory_format=torch.contiguous_format)
        for columns in _steps(len(items), _ITEMS_PER_STEP):
            p_MC = logits_of(u_MD, rows, columns)
            risen = torch.maximum(top, p_MC.amax(1))
            decay = top.sub_(risen).exp_()
            p_MC.sub_(risen.unsqueeze(1)).exp_()
            total.mul_(decay).add_(p_MC.sum(1))
            if with_mean:
                sum_DM.mul_(decay).addmm_(items[columns].T, p_MC.T)
            top = risen
        above = top - positive[rows]
        losses[rows] = loss = torch.logaddexp(total.log_().add_(above), torch.zeros_like(total))
        if with_mean:
            mean[rows] = sum_DM.mul_((above - loss).exp_()).T.to(users.dtype)
    return losses, mean


def backward_cpu(
    grad: Tensor, users: Tensor, items: Tensor, lse: Tensor, first: Tensor, last: Tensor, scale: float
) -> Tensor:
    """Gradient of the items `[R, D]`; see `softmax_loss`."""
    wide = lse.dtype
    # One more column in the product subtracts the log-sum-exp: a pass over the logits less.
    ones = torch.ones(len(items), 1, dtype=wide)
    logits_of = _Logits(torch.cat([items.to(wide), ones], 1), first, last)
    # Transposed: a product of few rows and many columns takes BLAS two thirds of the time of its transpose.
    ditems_DR = torch.zeros(items.shape[1], items.shape[0], dtype=wide)
    for rows in _steps(len(users), _USERS_PER_STEP):
        u_MD = users[rows].to(wide) * scale
        weighted_MD = u_MD * grad[rows].unsqueeze(1)
        shifted = torch.cat([u_MD, -lse[rows].unsqueeze(1)], 1)
        for columns in _steps(len(items), _ITEMS_PER_STEP):
            p_MC = logits_of(shifted, rows, columns).exp_()
            ditems_DR[:, columns].addmm_(weighted_MD.T, p_MC)
    return ditems_DR.T.contiguous().to(items.dtype)


class _Logits:
    """Products of users with items, in one buffer that every step overwrites; −∞ at what a user leaves out."""

    def __init__(self, items: Tensor, first: Tensor, last: Tensor) -> None:
        self._items, self._first, self._last = items, first.long(), last.long()
        most = min(_USERS_PER_STEP, len(first)) * min(_ITEMS_PER_STEP, len(items))
        self._buffer = torch.empty(most, dtype=items.dtype)

    def __call__(self, users: Tensor, rows: slice, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        out = self._buffer[: len(users) * width].view(len(users), width)
        torch.mm(users, self._items[columns].T, out=out)
        begin = self._first[rows].clamp(min=columns.start)
        counts = self._last[rows].clamp(max=columns.stop) - begin
        hit = (counts > 0).nonzero().squeeze(1)
        if len(hit):
            # The places from `begin` to `last` of each row that has any.
            counts = counts[hit]
            starts = torch.repeat_interleave(
                hit * width + begin[hit] - columns.start - counts.cumsum(0) + counts, counts
            )
            out.view(-1)[starts + torch.arange(len(starts))] = -torch.inf
        return out


def _steps(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
