# mypy: disable-error-code="no-untyped-def"
"""`hstu_decode` as Triton kernels: a row's keys in fixed splits, then the sum over splits.

A program takes one split of a row's keys for one head and 1, 16 or 32 queries. With few queries it is bound by
reading K and V once: products and sums are elementwise in float32, each lane summing its own keys until the end. From
4 queries on it pads them to a matrix-product tile. Rows longer than a split leave float32 partial sums that a
second kernel adds in order: no atomics. Splits have a fixed length, so that a row's result depends neither on who
shares its batch nor on the GPU. Launch configurations are unmeasured on GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.hstu_attention_tile import bucket_of, product
from retrieval.kernels.time_bucket import bucket_edges

__all__ = ["LaunchConfig", "aot_cases", "decode_triton", "launch_config"]

SPLIT = 512
"""Keys of a row that one program reads."""

_FEWEST_FOR_DOT = 4


@triton.jit
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    times_ptr,
    query_times_ptr,
    positions_ptr,
    pos_table_ptr,
    time_table_ptr,
    edges_ptr,
    out_ptr,
    rows,
    queries,
    heads,
    num_positions,
    k_token,
    k_head,
    v_token,
    v_head,
    alpha,
    inverse_norm,
    D: tl.constexpr,
    V: tl.constexpr,
    POS: tl.constexpr,
    TIME: tl.constexpr,
    COUNT: tl.constexpr,
    PARTIAL: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    split = tl.program_id(1)
    start = tl.load(offsets_ptr + row)
    length = (tl.load(offsets_ptr + row + 1) - start).to(tl.int32)
    first = split * SPLIT_N
    if PARTIAL:  # noqa: SIM102 (decided when the kernel is compiled)
        if first >= length:
            return
    last = tl.minimum(first + SPLIT_N, length)

    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    query_M = row * queries + m
    is_query_M = m < queries
    position_M = tl.load(positions_ptr + query_M, mask=is_query_M, other=-1).to(tl.int32)
    if TIME:
        asked_M = tl.load(query_times_ptr + query_M, mask=is_query_M, other=0)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    q_at = q_ptr + (query_M[:, None] * heads + head) * D + d[None, :]
    q_MD = tl.load(q_at, mask=is_query_M[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_N if BLOCK_M == 1 else BLOCK_M, BLOCK_V], tl.float32)

    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        is_key_N = n < last
        token_N = start + n
        k_at = k_ptr + token_N[:, None] * k_token + head * k_head + d[None, :]
        v_at = v_ptr + token_N[:, None] * v_token + head * v_head + dv[None, :]
        k_ND = tl.load(k_at, mask=is_key_N[:, None] & (d < D)[None, :], other=0.0)
        v_NV = tl.load(v_at, mask=is_key_N[:, None] & (dv < V)[None, :], other=0.0)
        # [N, M] for one query and [M, N] for a tile: the keys' axis is where the products leave it.
        if BLOCK_M == 1:
            score = alpha * tl.sum(k_ND.to(tl.float32) * q_MD.to(tl.float32), 1)[:, None]
            distance = position_M[None, :] - n[:, None]
            visible = (distance >= 0) & is_key_N[:, None]
        else:
            score = alpha * product(q_MD, tl.trans(k_ND))
            distance = position_M[:, None] - n[None, :]
            visible = (distance >= 0) & is_key_N[None, :]
        if POS:
            # NaN outside the table: reading there is unsafe, and any number would pass for an answer.
            inside = visible & (distance < num_positions)
            score += tl.load(pos_table_ptr + distance, mask=inside, other=float("nan")).to(tl.float32)
        if TIME:
            time_N = tl.load(times_ptr + token_N, mask=is_key_N, other=0)
            delta = asked_M[None, :] - time_N[:, None] if BLOCK_M == 1 else asked_M[:, None] - time_N[None, :]
            score += tl.load(time_table_ptr + bucket_of(tl.abs(delta), edges_ptr)).to(tl.float32)
        attention = tl.where(visible, score * tl.sigmoid(score), 0.0)
        if BLOCK_M == 1:
            acc += attention * v_NV.to(tl.float32)
        else:
            acc += product(attention.to(v_NV.dtype), v_NV)

    if BLOCK_M == 1:
        acc = tl.sum(acc, 0)[None, :]
    if not PARTIAL:
        if COUNT:
            seen_M = tl.maximum(tl.minimum(position_M + 1, length), 1)
            acc = acc / seen_M.to(tl.float32)[:, None]
        else:
            acc = acc * inverse_norm
    out_at = out_ptr + (((split * rows + row) * queries + m[:, None]) * heads + head) * V + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_query_M[:, None] & (dv < V)[None, :])


@triton.jit
def _sum_kernel(
    partial_ptr,
    offsets_ptr,
    positions_ptr,
    out_ptr,
    queries,
    heads,
    inverse_norm,
    V: tl.constexpr,
    COUNT: tl.constexpr,
    SPLIT_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    query = place // heads
    row = query // queries
    length = tl.load(offsets_ptr + row + 1) - tl.load(offsets_ptr + row)
    dv = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    stride = tl.num_programs(0).to(tl.int64)
    for split in range(0, tl.cdiv(length.to(tl.int32), SPLIT_N)):
        acc += tl.load(partial_ptr + (split * stride + place) * V + dv, mask=dv < V, other=0.0)
    if COUNT:
        seen = tl.maximum(tl.minimum(tl.load(positions_ptr + query) + 1, length), 1)
        acc = acc / seen.to(tl.float32)
    else:
        acc = acc * inverse_norm
    tl.store(out_ptr + place * V + dv, acc.to(out_ptr.dtype.element_ty), mask=dv < V)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Block sizes and warps of `_split_kernel`."""

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int


def launch_config(queries: int, d: int, v: int, itemsize: int) -> LaunchConfig:
    """By shape alone; unmeasured on GPUs."""
    block_d, block_v = (max(16, triton.next_power_of_2(width)) for width in (d, v))
    widest = max(block_d, block_v)
    block_m, block_n = 1, min(64, max(16, 2048 // widest))
    if queries >= _FEWEST_FOR_DOT:
        most = 32 if itemsize < 4 and widest <= 64 else 16
        block_m, block_n = min(most, max(16, triton.next_power_of_2(queries))), 32
    # Of eight warps, ptxas gives each thread so few registers that matrix-product tiles spill.
    warps = 4 if widest <= 64 or block_m > 1 else 8
    return LaunchConfig(
        block_m=block_m, block_n=block_n, block_d=block_d, block_v=block_v, num_warps=warps, num_stages=2
    )


def decode_triton(
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
    max_length: int | None,
) -> Tensor:
    """See `hstu_decode`."""
    rows, queries, heads, d = q.shape
    width = v.shape[2]
    out = torch.empty((rows, queries, heads, width), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if max_length is None:
        max_length = int(offsets.diff().max())
    splits = max(1, -(-max_length // SPLIT))
    offsets = offsets.to(q.device, non_blocking=True)
    q, timestamps = q.contiguous(), timestamps.contiguous()
    query_times, query_positions = query_times.contiguous(), query_positions.contiguous()
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    target = out
    if splits > 1:
        target = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    config = launch_config(queries, d, width, q.element_size())
    inverse_norm = 0.0 if norm is None else 1.0 / norm
    grid = (rows * heads, splits, triton.cdiv(queries, config.block_m))
    _split_kernel[grid](
        q, k, v, offsets, timestamps, query_times, query_positions,
        # Tables that are not there are never read; some pointer has to be passed.
        q if pos_table is None else pos_table.contiguous(), q if time_table is None else time_table.contiguous(),
        bucket_edges(q.device), target,
        rows, queries, heads, 0 if pos_table is None else len(pos_table),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), alpha, inverse_norm,
        D=d, V=width, POS=pos_table is not None, TIME=time_table is not None, COUNT=norm is None,
        PARTIAL=splits > 1, SPLIT_N=SPLIT,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=config.block_d, BLOCK_V=config.block_v,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(rows * queries * heads,)](
            target, offsets, query_positions, out, queries, heads, inverse_norm,
            V=width, COUNT=norm is None, SPLIT_N=SPLIT, BLOCK_V=config.block_v, num_warps=1,
        )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """Both kernels; one query and tiles of queries; one split and several."""
    shapes = [(1, 50, 50, "bf16", False), (1, 25, 25, "fp32", True), (1, 128, 128, "bf16", True)]
    shapes += [(16, 50, 50, "fp32", False), (64, 64, 64, "bf16", True), (64, 128, 128, "bf16", True)]
    cases = []
    for queries, d, v, dtype, partial in shapes:
        config = launch_config(queries, d, v, 4 if dtype == "fp32" else 2)
        sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
        common = {"V": v, "COUNT": False, "SPLIT_N": SPLIT, "BLOCK_V": config.block_v}
        constants = common | sizes | {"D": d, "POS": True, "TIME": True, "PARTIAL": partial}
        name = f"M{queries} D{d} {dtype}{' partial' if partial else ''}"
        signature = _signature(_split_kernel, constants, dtype, "fp32" if partial else dtype)
        cases.append(
            AotCase(
                name=f"split {name}",
                kernel=_split_kernel,
                signature=signature,
                constexprs=constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        )
    common = {"V": 50, "COUNT": True, "SPLIT_N": SPLIT, "BLOCK_V": 64}
    signature = _signature(_sum_kernel, common, "bf16", "bf16")
    cases.append(AotCase(name="sum V50 bf16", kernel=_sum_kernel, signature=signature, constexprs=common, num_warps=1))
    return cases


def _signature(kernel: triton.JITFunction, constants: Mapping[str, object], dtype: str, out: str) -> dict[str, str]:
    known = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {"out_ptr": f"*{out}", "partial_ptr": "*fp32"}
    known |= dict.fromkeys(("pos_table_ptr", "time_table_ptr"), "*fp32")
    known |= dict.fromkeys(("alpha", "inverse_norm"), "fp32") | dict.fromkeys(constants, "constexpr")
    return {name: known.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
