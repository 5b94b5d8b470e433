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
    find_block,
    load_block,
    load_times,
    product,
    row_scale,
    tile_scores,
    tile_slopes,
    tile_visible,
)
from retrieval.kernels.hstu_attention_triton import LaunchConfig, padded, problem_constants, problem_signature

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
    pos_table,
    time_table,
    edges,
    offsets,
    timestamps,
    query_times,
    num_targets,
    num_rows,
    num_positions,
    alpha,
    inverse_norm,
    window,
    contextual,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    dout_token,
    dout_head,
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
    row, start, length, apart = find_block(tl.program_id(0), offsets, num_rows, BLOCK, BLOCK_B)
    if apart >= length:
        return
    history = length
    if TARGETS:
        history = (length - tl.load(num_targets + row)).to(tl.int32)
    prefix = tl.minimum(contextual, history)
    i = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    # Tiles of queries `apart` places after their keys; then those of the prefix's queries, `apart` places before.
    after = tl.maximum(tl.cdiv(history - apart, BLOCK), 0)
    after = tl.where(apart - BLOCK + 1 < window + tl.maximum(prefix - 1, 0), after, 0)
    before = tl.minimum(tl.cdiv(prefix, BLOCK), tl.maximum(tl.cdiv(history - apart, BLOCK), 0))
    for block in range(0, after + before):
        ahead = block >= after
        tile = tl.where(ahead, block - after, block) * BLOCK
        m0 = tl.where(ahead, tile, tile + apart)
        n0 = tl.where(ahead, tile + apart, tile)
        m = m0 + i
        n = n0 + i
        q_MD = load_block(q + head * q_head, start, m0, length, q_token, BLOCK, D, BLOCK_D)
        dout_MV = load_block(dout + head * dout_head, start, m0, length, dout_token, BLOCK, V, BLOCK_V)
        tq_M = load_times(query_times, start, m0, length, BLOCK)
        k_ND = load_block(k + head * k_head, start, n0, length, k_token, BLOCK, D, BLOCK_D)
        v_NV = load_block(v + head * v_head, start, n0, length, v_token, BLOCK, V, BLOCK_V)
        t_N = load_times(timestamps, start, n0, length, BLOCK)
        score_MN, _, _, _ = tile_scores(
            q_MD, k_ND, alpha, m, n, tq_M, t_N, pos_table, num_positions, time_table, edges, history, POS, TIME
        )
        dvalue_MN = product(dout_MV, tl.trans(v_NV))
        scale_M = row_scale(m, history, window, contextual, inverse_norm, COUNT)
        seen_MN = tile_visible(m, n, length, history, window, contextual)
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
    offsets,
    num_targets,
    num_rows,
    num_positions,
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
    for b0 in range(0, num_rows, ROWS):
        b = b0 + tl.arange(0, ROWS)
        start = tl.load(offsets + b, mask=b < num_rows, other=0)
        length = tl.load(offsets + b + 1, mask=b < num_rows, other=0) - start
        program = start // BLOCK + b + step
        for head in range(0, H):
            mine = partial + (program * H + head)[:, None] * (2 * BLOCK) + i[None, :]
            acc += tl.load(mine, mask=(step * BLOCK < length)[:, None], other=0.0)
            # The next program's distances below its own block are this block's.
            acc += tl.load(mine + (2 * H + 1) * BLOCK, mask=((step + 1) * BLOCK < length)[:, None], other=0.0)
            if TARGETS:
                history = length - tl.load(num_targets + b, mask=b < num_rows, other=0)
                key = history[:, None] - distance[None, :]
                sums = target_sums + head * num_tokens.to(tl.int64) + start[:, None] + key
                acc += tl.load(sums, mask=(b < num_rows)[:, None] & (key >= 0) & (distance > 0)[None, :], other=0.0)
    tl.store(dpos + distance, tl.sum(acc, 0), mask=distance < num_positions)


def launch_config(qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig:
    """Side of the square tile. By registers and shared memory of compiled kernels; not tuned by time."""
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
    config = launch_config(*sizes)
    block, tokens, heads, rows = config.block_n, len(arguments["timestamps"]), constants["H"], arguments["num_rows"]
    programs = tokens // block + rows
    partial = torch.empty(programs, heads, 2, block, device=pos.device, dtype=torch.float32)
    launch = {"BLOCK": block, "num_warps": config.num_warps, "num_stages": config.num_stages}
    _distance_kernel[programs, heads](**arguments, partial=partial, **constants, **launch)
    dpos = torch.empty(len(pos), device=pos.device, dtype=torch.float32)
    _fold_kernel[(triton.cdiv(len(pos), block),)](
        partial=partial,
        target_sums=target_sums,
        dpos=dpos,
        offsets=arguments["offsets"],
        num_targets=arguments["num_targets"],
        num_rows=rows,
        num_positions=len(pos),
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
        tensors = dict.fromkeys(("q", "k", "v", "dout"), f"*{dtype}")
        strides = {f"{name}_{axis}": "i32" for name in tensors for axis in ("token", "head")}
        config = launch_config(dim, dim, 4 if dtype == "fp32" else 2)
        constants = problem_constants(dim) | {"BLOCK": config.block_n}
        signature = tensors | problem_signature() | strides | {"partial": "*fp32"}
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
    signature = dict.fromkeys(("partial", "target_sums", "dpos"), "*fp32")
    signature |= dict.fromkeys(("offsets", "num_targets"), "*i64")
    signature |= dict.fromkeys(("num_rows", "num_positions", "num_tokens"), "i32")
    values = {"H": 2, "TARGETS": True, "BLOCK": 32, "ROWS": _FOLDED_ROWS}
    signature |= dict.fromkeys(values, "constexpr")
    return AotCase(name="backward fold", kernel=_fold_kernel, signature=signature, constexprs=values)
