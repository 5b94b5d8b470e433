# mypy: disable-error-code="no-untyped-def"
"""Gradient of HSTU attention's position table in Triton, without atomics and without anything of size N × N.

A position's gradient is the sum of the scores' gradients along a diagonal. One program of `_distance_kernel` walks
along a diagonal of square tiles of one row and head, so that its tile of sums has the same distances all the way; its
own diagonals are summed once, at the end. `_fold_kernel` adds the programs up in a fixed order. Scores are computed
again: two more tile products, for which nothing is read, changed and written per tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.hstu_attention_tile import (
    Batch,
    find_block,
    history_of,
    load_block,
    load_times,
    product,
    row_scale,
    tile_scores,
    tile_slopes,
    tile_visible,
)
from retrieval.kernels.hstu_attention_triton import padded, problem_constants, problem_signature
from retrieval.kernels.launch import LaunchConfig, tuned

__all__ = ["aot_cases", "launch_config", "position_gradient"]

_AOT_SHAPES = ((25, "bf16"), (50, "bf16"), (128, "bf16"), (50, "fp32"))
# Rows of the batch that the fold adds up at once.
_FOLDED_ROWS = 32


@triton.jit
def _distance_kernel(
    q,
    k,
    v,
    dout,
    partial,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    POS: tl.constexpr,
    TIME: tl.constexpr,
    COUNT: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    head = tl.program_id(1)
    row, start, length, apart = find_block(batch, tl.program_id(0), BLOCK, BLOCK_B)
    if apart >= length:
        return
    history = history_of(batch, row, length, TARGETS)
    prefix = tl.minimum(batch.contextual, history)
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    # Tiles of queries `apart` places after their keys; then those of the prefix's queries, `apart` places before.
    after = tl.maximum(tl.cdiv(history - apart, BLOCK), 0)
    after = tl.where(apart - BLOCK + 1 < batch.window + tl.maximum(prefix - 1, 0), after, 0)
    before = tl.minimum(tl.cdiv(prefix, BLOCK), tl.maximum(tl.cdiv(history - apart, BLOCK), 0))
    for block in range(0, after + before):
        ahead = block >= after
        tile = tl.where(ahead, block - after, block) * BLOCK
        m0 = tl.where(ahead, tile, tile + apart)
        n0 = tl.where(ahead, tile + apart, tile)
        m = m0 + i
        n = n0 + i
        q_MD = load_block(q, head, start, m0, length, BLOCK, D, BLOCK_D)
        dout_MV = load_block(dout, head, start, m0, length, BLOCK, V, BLOCK_V)
        tq_M = load_times(batch.query_times, start, m0, length, BLOCK)
        k_ND = load_block(k, head, start, n0, length, BLOCK, D, BLOCK_D)
        v_NV = load_block(v, head, start, n0, length, BLOCK, V, BLOCK_V)
        t_N = load_times(batch.timestamps, start, n0, length, BLOCK)
        score_MN, _, _, _ = tile_scores(batch, q_MD, k_ND, m, n, tq_M, t_N, history, POS, TIME)
        dvalue_MN = product(dout_MV, tl.trans(v_NV))
        scale_M = row_scale(batch, m, history, COUNT)
        seen_MN = tile_visible(batch, m, n, length, history)
        # Targets stand on one place and are summed up by key; a pair off the diagonal belongs to one walk only.
        seen_MN = seen_MN & (m < history)[:, None] & (n < history)[None, :]
        seen_MN = seen_MN & ((m[:, None] < n[None, :]) == ahead)
        dscore_MN, _ = tile_slopes(score_MN, dvalue_MN, scale_M, seen_MN)
        if ahead:
            acc += tl.trans(dscore_MN)
        else:
            acc += dscore_MN
    # Column r of the rolled tile holds the diagonals at distance apart + r (on and below row r) and apart + r − BLOCK.
    rolled = tl.gather(acc, (i[:, None] - i[None, :] + BLOCK) % BLOCK, 1)
    below = i[:, None] >= i[None, :]
    mine = partial + (tl.program_id(0).to(tl.int64) * H + head) * (2 * BLOCK) + i
    tl.store(mine, tl.sum(tl.where(below, rolled, 0.0), 0))
    tl.store(mine + BLOCK, tl.sum(tl.where(below, 0.0, rolled), 0))


@triton.jit
def _fold_kernel(
    partial,
    target_sums,
    dpos,
    batch,
    num_tokens,
    H: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    step = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    distance = step * BLOCK + i
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for b0 in range(0, batch.num_rows, ROWS):
        b = b0 + tl.arange(0, ROWS)
        start = tl.load(batch.offsets + b, mask=b < batch.num_rows, other=0)
        length = tl.load(batch.offsets + b + 1, mask=b < batch.num_rows, other=0) - start
        program = start // BLOCK + b + step
        for head in range(0, H):
            mine = partial + (program * H + head)[:, None] * (2 * BLOCK) + i[None, :]
            acc += tl.load(mine, mask=(step * BLOCK < length)[:, None], other=0.0)
            # The next program's distances below its own block are this block's.
            acc += tl.load(mine + (2 * H + 1) * BLOCK, mask=((step + 1) * BLOCK < length)[:, None], other=0.0)
            if TARGETS:
                history = length - tl.load(batch.num_targets + b, mask=b < batch.num_rows, other=0)
                key = history[:, None] - distance[None, :]
                sums = target_sums + head * num_tokens.to(tl.int64) + start[:, None] + key
                acc += tl.load(
                    sums, mask=(b < batch.num_rows)[:, None] & (key >= 0) & (distance > 0)[None, :], other=0.0
                )
    tl.store(dpos + distance, tl.sum(acc, 0), mask=distance < batch.num_positions)


def launch_config(qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig:
    """Default side of the square tile. By registers and shared memory of compiled kernels, not by time."""
    width = max(padded(qk_dim), padded(v_dim))
    if itemsize == 4 or width > 128:
        return LaunchConfig(16, 16, 4, 1)
    return LaunchConfig(32, 32, 4, 2) if width <= 64 else LaunchConfig(32, 32, 8, 2)


def position_gradient(
    pos: Tensor,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    target_sums: Tensor,
    sizes: tuple[int, int, int],
) -> Tensor:
    """Gradient of the position table.

    Args:
        pos: the table.
        arguments: the kernels' runtime arguments.
        constants: their constexpr ones.
        target_sums: by head and key token, what targets add: of history keys, and of themselves; empty for none.
        sizes: width of queries, width of values, bytes of an element.
    """
    batch: Batch = arguments["batch"]
    config = tuned("distances", pos.device, *sizes) or launch_config(*sizes)
    block, tokens, heads, rows = config.block_n, len(batch.timestamps), constants["H"], batch.num_rows
    programs = tokens // block + rows
    partial = torch.empty(programs, heads, 2, block, device=pos.device, dtype=torch.float32)
    launch = {"BLOCK": block, "num_warps": config.num_warps, "num_stages": config.num_stages}
    _distance_kernel[programs, heads](**arguments, partial=partial, **constants, **launch)
    dpos = torch.empty(len(pos), device=pos.device, dtype=torch.float32)
    _fold_kernel[(triton.cdiv(len(pos), block),)](
        partial=partial,
        target_sums=target_sums,
        dpos=dpos,
        batch=batch,
        num_tokens=tokens,
        H=heads,
        TARGETS=constants["TARGETS"],
        BLOCK=block,
        ROWS=_FOLDED_ROWS,
        num_warps=4,
    )
    if len(target_sums):
        dpos[0] += target_sums[1].sum()
    return dpos.to(pos.dtype)


def aot_cases() -> list[AotCase]:
    """Both kernels at their default configurations."""
    cases = [_fold_case()]
    for dim, dtype in _AOT_SHAPES:
        config = launch_config(dim, dim, 4 if dtype == "fp32" else 2)
        constants = problem_constants(dim) | {"BLOCK": config.block_n}
        signature = problem_signature(dtype, "q", "k", "v", "dout") | {"partial": "*fp32"}
        cases.append(
            AotCase(
                name=f"distances d{dim} {dtype}",
                kernel=_distance_kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        )
    return cases


def _fold_case() -> AotCase:
    signature: dict[str, Any] = dict.fromkeys(("partial", "target_sums", "dpos"), "*fp32")
    signature |= problem_signature("bf16") | {"num_tokens": "i32"}
    values = {"H": 2, "TARGETS": True, "BLOCK": 32, "ROWS": _FOLDED_ROWS}
    signature |= dict.fromkeys(values, "constexpr")
    return AotCase(name="backward fold", kernel=_fold_kernel, signature=signature, constexprs=values)
