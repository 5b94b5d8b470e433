# mypy: disable-error-code="no-untyped-def"
"""Fused backward pass of HSTU attention in Triton. Scores are computed again; nothing of size N × N is stored.

Deterministic: no atomics. Three passes over the tiles:

1. `_key_kernel`, a program per block of keys and head: dK and dV in registers. The time table's gradient is summed per
   bucket in registers too; each program writes its own row of 129, and one sum over programs follows.
2. `_query_kernel`, a program per block of queries and head: dQ in registers.
3. The position table's gradient: `hstu_attention_positions_triton.py`.

Fast: pass 1 also adds dQ to memory with float32 atomics, and pass 2 falls away: two tile products fewer of nine, but
the order of additions, so the last bits of dQ, change from run to run. All else is the same code.

Not timed on a GPU yet: the default launches are chosen by resources (no spills, shared memory), not by speed.
"""

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.hstu_attention_cpu import Masks
from retrieval.kernels.hstu_attention_positions_triton import position_gradient
from retrieval.kernels.hstu_attention_tile import (
    find_block,
    history_of,
    key_ranges,
    load_block,
    load_times,
    product,
    query_ranges,
    row_scale,
    store_block,
    tile_scores,
    tile_slopes,
    tile_visible,
)
from retrieval.kernels.hstu_attention_triton import (
    check,
    heads,
    padded,
    problem_arguments,
    problem_constants,
    problem_signature,
)
from retrieval.kernels.launch import LaunchConfig, tuned
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

__all__ = ["aot_cases", "backward", "launch_config"]

Pass = Literal["keys", "queries"]
_BUCKETS = tl.constexpr(256)
_LAST_BUCKET = tl.constexpr(128)
# Fewer than the forward pass compiles ahead of time, as there are more kernels.
_AOT_SHAPES = ((25, "bf16"), (50, "bf16"), (128, "bf16"), (50, "fp32"))


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    dout,
    dq,
    dk,
    dv,
    dtime,
    target_sums,
    batch,
    num_tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    POS: tl.constexpr,
    TIME: tl.constexpr,
    COUNT: tl.constexpr,
    TARGETS: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    head = tl.program_id(1)
    row, start, length, n0 = find_block(batch, tl.program_id(0), BLOCK_N, BLOCK_B)
    if n0 >= length:
        return
    history = history_of(batch, row, length, TARGETS)
    n = n0 + tl.arange(0, BLOCK_N)
    k_ND = load_block(k, head, start, n0, length, BLOCK_N, D, BLOCK_D)
    v_NV = load_block(v, head, start, n0, length, BLOCK_N, V, BLOCK_V)
    t_N = load_times(batch.timestamps, start, n0, length, BLOCK_N)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    by_bucket = tl.zeros([_BUCKETS], tl.float32)
    from_targets_N = tl.zeros([BLOCK_N], tl.float32)
    bucket_ids = tl.arange(0, _BUCKETS)
    low, first, own, second = query_ranges(batch, n0, length, history, BLOCK_M, BLOCK_N)
    for block in range(0, first + second):
        m0 = tl.where(block < first, low + block * BLOCK_M, own + (block - first) * BLOCK_M)
        m = m0 + tl.arange(0, BLOCK_M)
        q_MD = load_block(q, head, start, m0, length, BLOCK_M, D, BLOCK_D)
        dout_MV = load_block(dout, head, start, m0, length, BLOCK_M, V, BLOCK_V)
        tq_M = load_times(batch.query_times, start, m0, length, BLOCK_M)
        score_MN, bucket_MN, least, most = tile_scores(batch, q_MD, k_ND, m, n, tq_M, t_N, history, POS, TIME)
        dvalue_MN = product(dout_MV, tl.trans(v_NV))
        scale_M = row_scale(batch, m, history, COUNT)
        seen_MN = tile_visible(batch, m, n, length, history)
        dscore_MN, attention_MN = tile_slopes(score_MN, dvalue_MN, scale_M, seen_MN)
        dv_NV += product(tl.trans(attention_MN.to(dout_MV.dtype)), dout_MV)
        dk_ND += product(tl.trans(dscore_MN.to(q_MD.dtype)), q_MD)
        if TIME:
            for bucket in range(least, most + 1):
                total = tl.sum(tl.sum(tl.where(bucket_MN == bucket, dscore_MN, 0.0), 1), 0)
                by_bucket += tl.where(bucket_ids == bucket, total, 0.0)
        if TARGETS and POS:
            from_targets_N += tl.sum(tl.where((m >= history)[:, None], dscore_MN, 0.0), 0)
        if FAST:
            dq_MD = product(dscore_MN.to(k_ND.dtype), k_ND) * batch.alpha
            token = tl.arange(0, BLOCK_M)
            d = tl.arange(0, BLOCK_D)
            place = dq + (start + m0) * (H * D) + head * D + (token[:, None] * (H * D) + d[None, :])
            tl.atomic_add(place, dq_MD, mask=(m < length)[:, None] & (d < D)[None, :], sem="relaxed")
    store_block(dk + head * D, dk_ND * batch.alpha, start, n0, length, H * D, BLOCK_N, D, BLOCK_D)
    store_block(dv + head * V, dv_NV, start, n0, length, H * V, BLOCK_N, V, BLOCK_V)
    if TIME:
        mine = (tl.program_id(0).to(tl.int64) * H + head) * (_LAST_BUCKET + 1)
        tl.store(dtime + mine + bucket_ids, by_bucket, mask=bucket_ids <= _LAST_BUCKET)
    if TARGETS and POS:
        # A target's pair with itself is at distance 0, one with the history at the key's distance from its end.
        sums = target_sums + head.to(tl.int64) * num_tokens + start + n
        tl.store(sums, tl.where(n < history, from_targets_N, 0.0), mask=n < length)
        sums += num_tokens.to(tl.int64) * H
        tl.store(sums, tl.where(n < history, 0.0, from_targets_N), mask=n < length)


@triton.jit
def _query_kernel(
    q,
    k,
    v,
    dout,
    dq,
    batch,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    POS: tl.constexpr,
    TIME: tl.constexpr,
    COUNT: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    head = tl.program_id(1)
    row, start, length, m0 = find_block(batch, tl.program_id(0), BLOCK_M, BLOCK_B)
    if m0 >= length:
        return
    history = history_of(batch, row, length, TARGETS)
    m = m0 + tl.arange(0, BLOCK_M)
    q_MD = load_block(q, head, start, m0, length, BLOCK_M, D, BLOCK_D)
    dout_MV = load_block(dout, head, start, m0, length, BLOCK_M, V, BLOCK_V)
    tq_M = load_times(batch.query_times, start, m0, length, BLOCK_M)
    scale_M = row_scale(batch, m, history, COUNT)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low, first, own, second = key_ranges(batch, m0, length, history, BLOCK_M, BLOCK_N)
    for block in range(0, first + second):
        n0 = tl.where(block < first, low + block * BLOCK_N, own + (block - first) * BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        k_ND = load_block(k, head, start, n0, length, BLOCK_N, D, BLOCK_D)
        v_NV = load_block(v, head, start, n0, length, BLOCK_N, V, BLOCK_V)
        t_N = load_times(batch.timestamps, start, n0, length, BLOCK_N)
        score_MN, _, _, _ = tile_scores(batch, q_MD, k_ND, m, n, tq_M, t_N, history, POS, TIME)
        dvalue_MN = product(dout_MV, tl.trans(v_NV))
        seen_MN = tile_visible(batch, m, n, length, history)
        dscore_MN, _ = tile_slopes(score_MN, dvalue_MN, scale_M, seen_MN)
        dq_MD += product(dscore_MN.to(k_ND.dtype), k_ND)
    store_block(dq + head * D, dq_MD * batch.alpha, start, m0, length, H * D, BLOCK_M, D, BLOCK_D)


def launch_config(kernel: Pass, qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig:
    """Default tile of a pass. By registers and shared memory of compiled kernels, not by time."""
    width = max(padded(qk_dim), padded(v_dim))
    if itemsize == 4:
        if kernel == "keys":
            return LaunchConfig(16, 16, 8, 1)
        return LaunchConfig(16, 16, 4, 1) if width > 128 else LaunchConfig(32, 16, 4, 1)
    if width <= 64:
        return LaunchConfig(32, 32, 4, 2)
    if width <= 128:
        return LaunchConfig(32, 32, 8, 2) if kernel == "keys" else LaunchConfig(32, 16, 8, 2)
    return LaunchConfig(32, 32, 8, 1)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and of both tables; arguments as those of `forward`."""
    check(q, v)
    batch, constants = problem_arguments(q, v, where, tables, masks)
    arguments: dict[str, Any] = {"q": heads(q), "k": heads(k), "v": heads(v), "dout": heads(dout), "batch": batch}
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    pos, time = tables
    tokens, num_heads, rows = len(q), q.shape[1], len(where[0]) - 1
    if tokens == 0:
        dpos, dtime = (None if table is None else torch.zeros_like(table) for table in tables)
        return dq, dk, dv, dpos, dtime
    sizes = (q.shape[2], v.shape[2], q.element_size())
    config = tuned("keys", q.device, *sizes) or launch_config("keys", *sizes)
    programs = tokens // config.block_n + rows
    dq_sums = dq if deterministic else torch.zeros(dq.shape, device=q.device, dtype=torch.float32)
    # Programs past a row's end write nothing.
    partial = q.new_zeros(0 if time is None else programs * num_heads, NUM_TIME_BUCKETS, dtype=torch.float32)
    targets = constants["TARGETS"] and pos is not None
    target_sums = torch.empty(2 if targets else 0, num_heads, tokens, device=q.device, dtype=torch.float32)
    outputs = {"dq": dq_sums, "dk": dk, "dv": dv, "dtime": partial, "target_sums": target_sums}
    fast = {"FAST": not deterministic, "num_tokens": tokens}
    _key_kernel[programs, num_heads](**arguments, **outputs, **constants, **fast, **config.arguments())
    if deterministic:
        config = tuned("queries", q.device, *sizes) or launch_config("queries", *sizes)
        grid = (tokens // config.block_m + rows, num_heads)
        _query_kernel[grid](**arguments, dq=dq, **constants, **config.arguments())
    dpos = None
    if pos is not None:
        dpos = position_gradient(pos, arguments, constants, target_sums, sizes)
    dtime = None if time is None else partial.sum(0).to(time.dtype)
    return dq_sums.to(q.dtype), dk, dv, dpos, dtime


def aot_cases() -> list[AotCase]:
    """All kernels at their default configurations."""
    cases = []
    for dim, dtype in _AOT_SHAPES:
        shared = problem_signature(dtype, "q", "k", "v", "dout")
        outputs = dict.fromkeys(("dk", "dv"), f"*{dtype}")
        sums = dict.fromkeys(("dtime", "target_sums"), "*fp32") | {"num_tokens": "i32"}
        key_signature = shared | outputs | sums
        kernels: list[tuple[str, Pass, Any, dict[str, Any], dict[str, Any]]] = [
            ("keys", "keys", _key_kernel, key_signature | {"dq": f"*{dtype}"}, {"FAST": False}),
            ("queries", "queries", _query_kernel, shared | {"dq": f"*{dtype}"}, {}),
        ]
        if dim == 50:
            fast = ("keys, fast", "keys", _key_kernel, key_signature | {"dq": "*fp32"}, {"FAST": True})
            kernels.append(fast)  # type: ignore[arg-type]
        for name, kind, kernel, signature, switches in kernels:
            config = launch_config(kind, dim, dim, 4 if dtype == "fp32" else 2)
            blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            cases.append(
                AotCase(
                    name=f"backward {name} d{dim} {dtype}",
                    kernel=kernel,
                    signature=signature | dict.fromkeys(problem_constants(dim) | switches | blocks, "constexpr"),
                    constexprs=problem_constants(dim) | switches | blocks,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            )
    return cases
