# mypy: disable-error-code="no-untyped-def"
"""Fused forward pass of HSTU attention in Triton.

One program computes BLOCK_M queries of one head and walks over the blocks of keys that they may see. The bias is
computed in registers from the tables and the timestamps. There is no softmax, so no running maximum: tiles are summed
up, and the norm divides the sum.

Not timed on a GPU yet: the launch configurations are chosen by resources (no spills, shared memory), not by speed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.hstu_attention_cpu import Masks
from retrieval.kernels.hstu_attention_tile import (
    find_block,
    key_ranges,
    load_block,
    load_times,
    product,
    row_scale,
    store_block,
    tile_scores,
    tile_visible,
)
from retrieval.kernels.time_bucket import bucket_edges

__all__ = ["LaunchConfig", "aot_cases", "forward", "launch_config", "problem_arguments", "problem_signature"]


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
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
    row, start, length, m0 = find_block(tl.program_id(0), offsets, num_rows, BLOCK_M, BLOCK_B)
    if m0 >= length:
        return
    history = length
    if TARGETS:
        history = (length - tl.load(num_targets + row)).to(tl.int32)
    m = m0 + tl.arange(0, BLOCK_M)
    q_MD = load_block(q + head * q_head, start, m0, length, q_token, BLOCK_M, D, BLOCK_D)
    tq_M = load_times(query_times, start, m0, length, BLOCK_M)
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    low, first, own, second = key_ranges(m0, length, history, window, contextual, BLOCK_M, BLOCK_N)
    for block in range(0, first + second):
        n0 = tl.where(block < first, low + block * BLOCK_N, own + (block - first) * BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        k_ND = load_block(k + head * k_head, start, n0, length, k_token, BLOCK_N, D, BLOCK_D)
        v_NV = load_block(v + head * v_head, start, n0, length, v_token, BLOCK_N, V, BLOCK_V)
        t_N = load_times(timestamps, start, n0, length, BLOCK_N)
        score_MN, _, _, _ = tile_scores(
            q_MD, k_ND, alpha, m, n, tq_M, t_N, pos_table, num_positions, time_table, edges, history, POS, TIME
        )
        seen_MN = tile_visible(m, n, length, history, window, contextual)
        value_MN = tl.where(seen_MN, score_MN * tl.sigmoid(score_MN), 0.0)
        acc_MV += product(value_MN.to(v_NV.dtype), v_NV)
    acc_MV *= row_scale(m, history, window, contextual, inverse_norm, COUNT)[:, None]
    store_block(out + head * V, acc_MV, start, m0, length, H * V, BLOCK_M, V, BLOCK_V)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Tile and launch of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def launch_config(qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig:
    """Tile of the forward kernel. By registers and shared memory of compiled kernels; not tuned by time."""
    width = max(padded(qk_dim), padded(v_dim))
    if itemsize == 4:
        if width > 128:
            return LaunchConfig(16, 16, 4, 1)
        return LaunchConfig(32, 32, 4, 2) if width <= 64 else LaunchConfig(16, 16, 4, 2)
    if width <= 32:
        return LaunchConfig(64, 32, 4, 2)
    return LaunchConfig(64, 32, 8, 2) if width <= 128 else LaunchConfig(32, 32, 8, 1)


def padded(dim: int) -> int:
    """Width of a tile for heads of size `dim`: tensor cores want a power of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))


def rows_per_look(num_rows: int) -> int:
    """Offsets that a program reads at once to find its row."""
    return min(1024, max(16, triton.next_power_of_2(num_rows)))


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check(q: Tensor, v: Tensor) -> None:
    """Refuse what the kernels do not do."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hstu_attention: backend 'triton' takes float32, float16 and bfloat16, not {q.dtype}")
    if max(q.shape[2], v.shape[2]) > 256:
        raise ValueError(f"hstu_attention: heads of {q.shape[2]} and {v.shape[2]} are wider than 256")


def problem_arguments(
    q: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that all kernels share, runtime and constexpr ones."""
    offsets, timestamps, query_times = where
    pos, time = tables
    # An absent table still needs a pointer, which is never followed.
    arguments = {
        "pos_table": offsets if pos is None else pos.contiguous(),
        "time_table": offsets if time is None else time.contiguous(),
        "edges": bucket_edges(q.device),
        "offsets": offsets.contiguous(),
        "timestamps": timestamps.contiguous(),
        "query_times": query_times.contiguous(),
        "num_targets": offsets if masks.num_targets is None else masks.num_targets.contiguous(),
        "num_rows": len(offsets) - 1,
        "num_positions": 1 if pos is None else len(pos),
        "alpha": masks.alpha,
        "inverse_norm": 0.0 if masks.norm is None else 1.0 / masks.norm,
        "window": masks.window,
        "contextual": masks.contextual,
    }
    constants = {
        "H": q.shape[1],
        "D": q.shape[2],
        "V": v.shape[2],
        "POS": pos is not None,
        "TIME": time is not None,
        "COUNT": masks.norm is None,
        "TARGETS": masks.num_targets is not None,
        "BLOCK_D": padded(q.shape[2]),
        "BLOCK_V": padded(v.shape[2]),
        "BLOCK_B": rows_per_look(len(offsets) - 1),
    }
    return arguments, constants


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`hstu_attention`; `where` is offsets, timestamps and query times, `tables` those of position and time."""
    check(q, v)
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    arguments, constants = problem_arguments(q, v, where, tables, masks)
    if len(q) == 0:
        return out
    config = config or launch_config(q.shape[2], v.shape[2], q.element_size())
    grid = (len(q) // config.block_m + len(where[0]) - 1, q.shape[1])
    _forward_kernel[grid](
        q=q,
        k=k,
        v=v,
        out=out,
        **arguments,
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def problem_signature() -> dict[str, str]:
    """Types of `problem_arguments`, for ahead-of-time compilation; tables in float32."""
    pointers = {"pos_table": "*fp32", "time_table": "*fp32"}
    pointers |= dict.fromkeys(("edges", "offsets", "timestamps", "query_times", "num_targets"), "*i64")
    scalars = {"num_rows": "i32", "num_positions": "i32", "alpha": "fp32", "inverse_norm": "fp32"}
    return pointers | scalars | {"window": "i32", "contextual": "i32"}


def problem_constants(dim: int, *, targets: bool = True, heads: int = 2) -> dict[str, Any]:
    """Constexpr arguments of a compiled case: everything on but for the targets, which are asked for."""
    switches = {"POS": True, "TIME": True, "COUNT": False, "TARGETS": targets}
    sizes = {"H": heads, "D": dim, "V": dim, "BLOCK_D": padded(dim), "BLOCK_V": padded(dim), "BLOCK_B": 128}
    return switches | sizes


# Widths and types that are compiled ahead of time: the published ones, and the ends of the range.
AOT_SHAPES = ((25, "bf16"), (50, "bf16"), (64, "bf16"), (128, "bf16"), (256, "bf16"), (50, "fp32"), (128, "fp32"))


def aot_cases() -> list[AotCase]:
    """The forward kernel at its default configurations."""
    strides = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")
    cases = []
    for dim, dtype in AOT_SHAPES:
        config = launch_config(dim, dim, 4 if dtype == "fp32" else 2)
        constants = problem_constants(dim) | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
        signature = pointers | problem_signature() | dict.fromkeys(strides, "i32")
        cases.append(
            AotCase(
                name=f"forward d{dim} {dtype}",
                kernel=_forward_kernel,
                signature=signature | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        )
    return cases
