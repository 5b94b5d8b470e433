"""The best items of each query by inner product, without a matrix of all scores.

    rows_b = the k items n, eligible ones only, with the greatest q_b·x_n, best first

Legend: B queries, N items, D width, K answers per query.
"""

import torch
from torch import Tensor

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.topk_scores_cpu import topk_scores_cpu
from retrieval.kernels.topk_scores_reference import topk_scores_reference

__all__ = ["topk_scores"]


def topk_scores(
    queries_BD: Tensor, items_ND: Tensor, k: int, allowed: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Score all items and keep the best of each query (formula above); no gradient.

    Memory beside the inputs grows with B·K and, by the Triton kernels, with B·N / 32; never with B·N.

    Args:
        queries_BD: float32, or what the items are. One that is not finite finds nothing.
        items_ND: floating; products of bfloat16 and float16 are summed in float32.
        k: K, at least 1.
        allowed: packed bitmap of the items to look at, the lowest bit first, uint8 `[ceil(N / 8)]`; None for all.
        backend: see `kernels.backend`.

    Returns:
        Scores, float32 (float64 of float64), and rows, int64, `[B, K]`: equal scores by row, but where more items are
        equal to the last than there is room for, any of them. −inf and −1 past the last.

    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    _check(queries_BD, items_ND, k, allowed)
    chosen = resolve_backend(backend, items_ND.device)
    if chosen == "reference":
        return topk_scores_reference(queries_BD, items_ND, k, allowed)
    scores, rows = _topk(queries_BD.to(items_ND.dtype), items_ND, k, allowed, chosen)
    return scores, rows


@torch.library.custom_op("retrieval::topk_scores", mutates_args=())
def _topk(queries: Tensor, items: Tensor, k: int, allowed: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from retrieval.kernels.topk_scores_triton import topk_scores_triton

        return topk_scores_triton(queries, items, k, allowed)
    return topk_scores_cpu(queries, items, k, allowed)


@_topk.register_fake
def _(queries: Tensor, items: Tensor, k: int, allowed: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    kind = torch.float64 if items.dtype == torch.float64 else torch.float32
    return queries.new_empty(shape, dtype=kind), queries.new_empty(shape, dtype=torch.int64)


def _check(queries: Tensor, items: Tensor, k: int, allowed: Tensor | None) -> None:
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1] or not items.shape[1]:
        raise ValueError(f"topk_scores: queries {tuple(queries.shape)} and items {tuple(items.shape)} do not fit")
    if not items.is_floating_point() or queries.dtype not in (torch.float32, items.dtype):
        raise ValueError(f"topk_scores: queries {queries.dtype} and items {items.dtype} do not fit")
    if k < 1:
        raise ValueError(f"topk_scores: k is {k}")
    if allowed is not None and (allowed.dtype != torch.uint8 or allowed.shape != (-(-len(items) // 8),)):
        raise ValueError(
            f"topk_scores: allowed {allowed.dtype} {tuple(allowed.shape)} is no bitmap of {len(items)} items"
        )
