"""`hstu_decode` on the CPU, without padding.

One query per row and short rows: all keys of several rows at once, as segments; the query is repeated for each of
its keys, and products and weighted values are summed in the cache. Otherwise row by row as two small matrix products.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.time_bucket import time_bucket

__all__ = ["decode_cpu"]

# Elements of keys that one step of whole rows holds: temporaries of 1 MiB stay in the L2 cache.
_ELEMENTS_PER_STEP = 1 << 18
# Mean elements of a row's keys from which two matrix products per row cost less than the segments' extra traffic.
_LONG_ROW = 1 << 15


def decode_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    query_positions: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    *,
    norm: float | None,
    alpha: float,
) -> Tensor:
    """See `hstu_decode`."""
    rows, queries = q.shape[:2]
    lengths = offsets.diff()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:3], v.shape[2], dtype=wide)
    if not len(k) or not queries:
        return out.to(q.dtype)
    scaled = q.to(wide) * alpha
    row_of_key = torch.repeat_interleave(lengths)
    distance = query_positions[row_of_key] - (torch.arange(len(k)) - offsets[row_of_key]).unsqueeze(1)
    bias = _bias(distance, query_times[row_of_key] - timestamps.unsqueeze(1), pos_table, time_table).to(wide)
    hidden = distance < 0
    mask = hidden if bool(hidden.any()) else None
    if queries > 1 or k.numel() >= _LONG_ROW * rows:
        _by_row(out, scaled, k, v, offsets.tolist(), bias, mask)
    else:
        _by_segment(out, scaled, k, v, offsets.tolist(), row_of_key, bias, mask)
    if norm is None:
        out /= torch.minimum(lengths.unsqueeze(1), query_positions + 1).clamp_(min=1).view(rows, queries, 1, 1)
    else:
        out /= norm
    return out.to(q.dtype)


def _bias(distance: Tensor, delta: Tensor, pos_table: Tensor | None, time_table: Tensor | None) -> Tensor:
    """Sum of both biases, `[T, M]`."""
    bias = torch.zeros(distance.shape)
    if pos_table is not None:
        bias = bias + pos_table.index_select(0, distance.clamp(min=0).view(-1)).view(distance.shape)
    if time_table is not None:
        bias = bias + time_table.index_select(0, time_bucket(delta).view(-1)).view(distance.shape)
    return bias


def _by_segment(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: list[int], row_of_key: Tensor, bias: Tensor, mask: Tensor | None
) -> None:
    """For one query per row: bias and mask `[T, 1]`."""
    q_BHD, out_BHV = q.squeeze(1), out.squeeze(1)
    for start, end in _steps(ends, max(1, _ELEMENTS_PER_STEP // (q_BHD[0].numel()))):
        rows = row_of_key[start:end]
        scores_tH = q_BHD.index_select(0, rows).mul_(k[start:end]).sum(-1).add_(bias[start:end])
        attention_tH = functional.silu(scores_tH, inplace=True)
        if mask is not None:
            attention_tH.masked_fill_(mask[start:end], 0)
        out_BHV.index_add_(0, rows, attention_tH.unsqueeze(-1) * v[start:end])


def _by_row(out: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: list[int], bias: Tensor, mask: Tensor | None) -> None:
    """For any number of queries per row: bias and mask `[T, M]`."""
    for row, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        k_HDL, v_HLV = k[start:end].to(q.dtype).permute(1, 2, 0), v[start:end].to(q.dtype).transpose(0, 1)
        scores_HML = torch.baddbmm(bias[start:end].t().unsqueeze(0), q[row].transpose(0, 1), k_HDL)
        attention_HML = functional.silu(scores_HML, inplace=True)
        if mask is not None:
            attention_HML.masked_fill_(mask[start:end].t(), 0)
        out[row] = torch.bmm(attention_HML, v_HLV).transpose(0, 1)


def _steps(ends: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Tokens of consecutive whole rows, at most `budget` of them unless one row alone has more."""
    start = 0
    for end, following in zip(ends[1:], [*ends[2:], None], strict=True):
        if end > start and (following is None or following - start > budget):
            yield start, end
            start = end
