"""HSTU attention row by row in plain differentiable torch, and the definition of its masks.

`hstu_attention.py` has the formula and the words; here they are as code that the CPU implementation shares.
"""

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.time_bucket import time_bucket_reference

__all__ = ["UNBOUNDED", "distances", "hstu_attention_reference", "visible", "visible_counts"]

# A window that no row fills; small enough to be added to a position in int32.
UNBOUNDED = 1 << 30


def visible(query: Tensor, key: Tensor, history: Tensor, window: int, contextual: int) -> Tensor:
    """Whether places `query` see places `key`, in rows whose first `history` tokens are no targets; all broadcast."""
    prefix = history.clamp(max=contextual)
    shift = (prefix - 1).clamp(min=0)

    def rank(place: Tensor) -> Tensor:
        return (torch.minimum(place, history) - shift).clamp(min=0)

    gap = rank(query) - rank(key)
    seen = (gap > 0) & (gap < window) | (query == key)
    return seen | (query < prefix) & (key < history) if contextual else seen


def visible_counts(query: Tensor, history: Tensor, window: int, contextual: int) -> Tensor:
    """How many keys each of the places `query` sees: the sums of `visible` in closed form."""
    prefix = history.clamp(max=contextual)
    place = torch.minimum(query, history)
    plain = (place - prefix + 1).clamp(max=window)
    reaches_prefix = place - (prefix - 1).clamp(min=0) < window
    return torch.where(query < prefix, history, plain + prefix * reaches_prefix)


def distances(query: Tensor, key: Tensor, history: Tensor) -> Tensor:
    """Index into the position table; targets all stand on the place after the history."""
    return (torch.minimum(query, history) - torch.minimum(key, history)).abs()


def hstu_attention_reference(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    *,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
    alpha: float = 1.0,
    window: int | None = None,
    contextual: int = 0,
    num_targets: Tensor | None = None,
) -> Tensor:
    """As `hstu_attention`; any floating dtype."""
    outs = [v_THV[:0]]
    bounds = offsets.tolist()
    targets = [0] * (len(bounds) - 1) if num_targets is None else num_targets.tolist()
    for start, end, candidates in zip(bounds[:-1], bounds[1:], targets, strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THD, k_THD, v_THV))
        key = torch.arange(end - start, device=q.device)
        query, history = key.unsqueeze(1), torch.tensor(end - start - candidates, device=q.device)
        scores = alpha * (q @ k.mT)
        if pos_table is not None:
            scores = scores + pos_table[distances(query, key, history)]
        if time_table is not None:
            delta = query_times[start:end].unsqueeze(1) - timestamps[start:end]
            scores = scores + time_table[time_bucket_reference(delta).long()]
        seen = visible(query, key, history, window or UNBOUNDED, contextual)
        count = seen.sum(1, keepdim=True).to(q.dtype) if norm is None else norm
        attention = (functional.silu(scores) * seen / count).to(v.dtype)
        outs.append((attention @ v).transpose(0, 1))
    return torch.cat(outs)
