"""`topk_scores` by writing all scores down: in the dtype given, sums of halves in float32."""

import torch
from torch import Tensor

__all__ = ["best_of", "topk_scores_reference", "unpacked"]


def topk_scores_reference(
    queries_BD: Tensor, items_ND: Tensor, k: int, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `topk_scores.topk_scores`; among equal scores always the lowest rows."""
    kind = torch.float64 if items_ND.dtype == torch.float64 else torch.float32
    # Queries take part in the items' precision, as on a GPU.
    scores_BN = queries_BD.to(items_ND.dtype).to(kind) @ items_ND.to(kind).T
    if allowed is not None:
        scores_BN = scores_BN.masked_fill(~unpacked(allowed, len(items_ND)), -torch.inf)
    rows_N = torch.arange(len(items_ND), device=items_ND.device)
    return best_of(scores_BN, rows_N.expand(len(queries_BD), -1), k)


def best_of(scores_BC: Tensor, rows_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of some candidates, equal ones in the order given; what is not finite is none: −inf and −1."""
    scores_BC = scores_BC.masked_fill(~scores_BC.isfinite(), -torch.inf)
    scores, places = scores_BC.sort(dim=1, descending=True, stable=True)
    scores, places = scores[:, :k], places[:, :k]
    rows = rows_BC.gather(1, places).masked_fill(scores == -torch.inf, -1)
    short = k - scores.shape[1]
    if short > 0:
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        rows = torch.nn.functional.pad(rows, (0, short), value=-1)
    return scores, rows


def unpacked(allowed: Tensor, count: int) -> Tensor:
    """A packed bitmap as bool `[count]`."""
    bits = torch.arange(8, device=allowed.device, dtype=torch.uint8)
    return (allowed.unsqueeze(1) >> bits & 1).flatten()[:count].bool()
