"""`topk_scores` as two Triton kernels and a selection between them.

The first scores tiles of items and keeps of each group of 32 the greatest score alone. The K-th greatest of these is
reached by K items, so every item of the answer lies in one of the K groups that come first. The second scores the items
of these groups, K·32 a query, among which the answer is found. Neither writes down a score of every item, and K has no
limit but N. The two add up in different orders: an item is missed only if it equals the last answer but for rounding.

Launch configurations are unmeasured on GPUs.

Legend: B queries, N items, D width, K answers per query, G groups, S groups chosen of a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.topk_scores_reference import best_of

__all__ = ["aot_cases", "launch_config", "topk_scores_triton"]

_GROUP = 32
_CHOSEN = 4
"""Groups that a program of the second kernel scores."""
_WARPS, _CHOSEN_WARPS = 8, 4


@triton.jit
def _eligible(allowed_ptr, rows, items, HAS_ALLOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    there = rows < items
    if HAS_ALLOWED:
        byte = tl.load(allowed_ptr + (rows >> 3), mask=there, other=0).to(tl.int32)
        there = there & ((byte >> (rows & 7).to(tl.int32) & 1) == 1)
    return there


@triton.jit
def _maxima_kernel(  # type: ignore[no-untyped-def]
    queries_ptr, items_ptr, allowed_ptr, maxima_ptr, queries, items, groups, width, query_blocks,
    BQ: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    # Programs of one tile of items run side by side, so that it is read from memory once.
    tile = tl.program_id(0) // query_blocks
    q = (tl.program_id(0) % query_blocks) * BQ + tl.arange(0, BQ)
    n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    scores = tl.zeros([BQ, BN], tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        of_queries = (q[:, None] < queries) & (d[None, :] < width)
        asked = tl.load(queries_ptr + q[:, None].to(tl.int64) * width + d[None, :], mask=of_queries, other=0.0)
        of_items = (n[None, :] < items) & (d[:, None] < width)
        x = tl.load(items_ptr + n[None, :] * width + d[:, None], mask=of_items, other=0.0)
        # Full float32 products: TF32 would take other items for the best.
        scores = tl.dot(asked, x, scores, input_precision="ieee")
    scores = tl.where(_eligible(allowed_ptr, n, items, HAS_ALLOWED)[None, :], scores, float("-inf"))
    best = tl.max(tl.reshape(scores, [BQ, BN // GROUP, GROUP]), axis=2)
    g = tile.to(tl.int64) * (BN // GROUP) + tl.arange(0, BN // GROUP)
    wanted = (q[:, None] < queries) & (g[None, :] < groups)
    tl.store(maxima_ptr + q[:, None].to(tl.int64) * groups + g[None, :], best, mask=wanted)


@triton.jit
def _chosen_kernel(  # type: ignore[no-untyped-def]
    queries_ptr, items_ptr, allowed_ptr, chosen_ptr, scores_ptr, items, chosen, width, blocks,
    BS: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    query = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BS * GROUP + tl.arange(0, BS * GROUP)
    there = place < chosen * GROUP
    group = tl.load(chosen_ptr + query * chosen + place // GROUP, mask=there, other=0)
    n = group * GROUP + place % GROUP
    sums = tl.zeros([BS * GROUP], tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        asked = tl.load(queries_ptr + query * width + d, mask=d < width, other=0.0).to(tl.float32)
        wanted = (there & (n < items))[:, None] & (d[None, :] < width)
        x = tl.load(items_ptr + n[:, None] * width + d[None, :], mask=wanted, other=0.0).to(tl.float32)
        sums += tl.sum(x * asked[None, :], axis=1)
    sums = tl.where(_eligible(allowed_ptr, n, items, HAS_ALLOWED), sums, float("-inf"))
    tl.store(scores_ptr + query * chosen * GROUP + place, sums, mask=there)


def launch_config(queries: int, width: int) -> tuple[int, int, int]:
    """Queries, items and dimensions of a tile, powers of two. Unmeasured on GPUs."""
    return min(64, max(16, triton.next_power_of_2(queries))), 128, min(32, max(16, triton.next_power_of_2(width)))


def topk_scores_triton(queries_BD: Tensor, items_ND: Tensor, k: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `topk_scores.topk_scores`; float32, bfloat16 or float16.

    Raises:
        ValueError: the items are of another dtype.
    """
    if items_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"topk_scores: the Triton kernels do not take {items_ND.dtype}")
    (queries, width), items, device = queries_BD.shape, len(items_ND), items_ND.device
    groups = triton.cdiv(items, _GROUP)
    if not queries or not items:
        nothing = torch.empty(queries, 0, device=device)
        return best_of(nothing, nothing.long(), k)
    # One that is not finite asks for nothing, and spoils nothing.
    finite_B = queries_BD.isfinite().all(1)
    queries_BD, items_ND = queries_BD.where(finite_B[:, None], 0).contiguous(), items_ND.contiguous()
    bitmap = items_ND if allowed is None else allowed.contiguous()  # some pointer, where there is none to give
    block_q, block_n, block_d = launch_config(queries, width)
    query_blocks = triton.cdiv(queries, block_q)
    maxima_BG = torch.empty(queries, groups, dtype=torch.float32, device=device)
    _maxima_kernel[(query_blocks * triton.cdiv(items, block_n),)](
        queries_BD, items_ND, bitmap, maxima_BG, queries, items, groups, width, query_blocks,
        BQ=block_q, BN=block_n, BD=block_d, GROUP=_GROUP, HAS_ALLOWED=allowed is not None, num_warps=_WARPS,
    )  # fmt: skip
    chosen = min(k, groups)
    # In the order of their rows, so that equal scores come out by row.
    chosen_BS = maxima_BG.topk(chosen, dim=1, sorted=False).indices.sort(dim=1).values
    scores_BC = torch.empty(queries, chosen * _GROUP, dtype=torch.float32, device=device)
    blocks = triton.cdiv(chosen, _CHOSEN)
    _chosen_kernel[(queries * blocks,)](
        queries_BD, items_ND, bitmap, chosen_BS, scores_BC, items, chosen, width, blocks,
        BS=_CHOSEN, BD=block_d, GROUP=_GROUP, HAS_ALLOWED=allowed is not None, num_warps=_CHOSEN_WARPS,
    )  # fmt: skip
    rows_BC = (chosen_BS.unsqueeze(2) * _GROUP + torch.arange(_GROUP, device=device)).flatten(1)
    return best_of(scores_BC.masked_fill_(~finite_B[:, None], -torch.inf), rows_BC, k)


def aot_cases() -> list[AotCase]:
    """Both kernels for one query and many, at narrow, odd and wide rows, with a bitmap and without."""
    cases = []
    for queries, width, dtype, has_allowed in (
        (1, 64, "fp32", False), (256, 64, "fp32", True), (64, 50, "bf16", True), (256, 256, "fp16", False),
    ):  # fmt: skip
        block_q, block_n, block_d = launch_config(queries, width)
        tiles = {
            "BQ": block_q,
            "BN": block_n,
            "BS": _CHOSEN,
            "BD": block_d,
            "GROUP": _GROUP,
            "HAS_ALLOWED": has_allowed,
        }
        pointers = {"chosen_ptr": "*i64", "maxima_ptr": "*fp32", "scores_ptr": "*fp32"}
        pointers |= {"allowed_ptr": "*u8" if has_allowed else f"*{dtype}"}
        for kernel, warps in ((_maxima_kernel, _WARPS), (_chosen_kernel, _CHOSEN_WARPS)):
            types = {
                name: "constexpr"
                if name in tiles
                else pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
                for name in kernel.arg_names
            }
            values = {name: value for name, value in tiles.items() if name in kernel.arg_names}
            name = f"{kernel.__name__.strip('_')} B{queries} D{width} {dtype}{' bitmap' if has_allowed else ''}"
            cases.append(AotCase(name=name, kernel=kernel, signature=types, constexprs=values, num_warps=warps))
    return cases
