"""`topk_scores` in torch operations, a block of items at a time."""

import torch
from torch import Tensor

from retrieval.kernels.topk_scores_reference import best_of, unpacked

__all__ = ["topk_scores_cpu"]

_ELEMENTS = 1 << 22
"""Scores of a block."""


def topk_scores_cpu(queries_BD: Tensor, items_ND: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `topk_scores.topk_scores`."""
    kind = torch.float64 if items_ND.dtype == torch.float64 else torch.float32
    queries_BD, device = queries_BD.to(kind), items_ND.device
    mask = None if allowed is None else unpacked(allowed, len(items_ND))
    scores = torch.full((len(queries_BD), 0), -torch.inf, dtype=kind, device=device)
    rows = torch.full((len(queries_BD), 0), -1, dtype=torch.int64, device=device)
    size = max(k, _ELEMENTS // max(len(queries_BD), 1))
    for start in range(0, max(len(items_ND), 1), size):
        block = items_ND[start : start + size]
        here = queries_BD @ block.to(kind).T
        if mask is not None:
            here = here.masked_fill(~mask[start : start + size], -torch.inf)
        numbers = torch.arange(start, start + len(block), device=device).expand(len(queries_BD), -1)
        # What is best so far comes first, being of lower rows.
        scores, rows = best_of(torch.cat([scores, here], 1), torch.cat([rows, numbers], 1), k)
    return scores, rows
