# mypy: disable-error-code="no-untyped-def"
"""Fused forward pass of HSTU attention in Triton.

One program computes BLOCK_M queries of one head and walks over the blocks of keys that they may see. The bias is
computed in registers from the tables and the timestamps. There is no softmax, so no running maximum: tiles are summed
up, and the norm divides the sum.

Not timed on a GPU yet: the default launches are chosen by resources (no spills, shared memory), not by speed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.hstu_attention_cpu import Masks
from retrieval.kernels.hstu_attention_tile import (
    Batch,
    Heads,
    find_block,
    history_of,
    key_ranges,
    load_block,
    load_times,
    product,
    row_scale,
    store_block,
    tile_scores,
    tile_visible,
)
from retrieval.kernels.launch import LaunchConfig, tuned
from retrieval.kernels.time_bucket import bucket_edges

__all__ = ["aot_cases", "forward", "heads", "launch_config", "problem_arguments", "problem_signature"]


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    out,
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
    tq_M = load_times(batch.query_times, start, m0, length, BLOCK_M)
    acc_MV = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    low, first, own, second = key_ranges(batch, m0, length, history, BLOCK_M, BLOCK_N)
    for block in range(0, first + second):
        n0 = tl.where(block < first, low + block * BLOCK_N, own + (block - first) * BLOCK_N)
        n = n0 + tl.arange(0, BLOCK_N)
        k_ND = load_block(k, head, start, n0, length, BLOCK_N, D, BLOCK_D)
        v_NV = load_block(v, head, start, n0, length, BLOCK_N, V, BLOCK_V)
        t_N = load_times(batch.timestamps, start, n0, length, BLOCK_N)
        score_MN, _, _, _ = tile_scores(batch, q_MD, k_ND, m, n, tq_M, t_N, history, POS, TIME)
        seen_MN = tile_visible(batch, m, n, length, history)
        value_MN = tl.where(seen_MN, score_MN * tl.sigmoid(score_MN), 0.0)
        acc_MV += product(value_MN.to(v_NV.dtype), v_NV)
    acc_MV *= row_scale(batch, m, history, COUNT)[:, None]
    store_block(out + head * V, acc_MV, start, m0, length, H * V, BLOCK_M, V, BLOCK_V)


def launch_config(qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig:
    """Default tile of the forward kernel. By registers and shared memory of compiled kernels, not by time."""
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


def check(q: Tensor, v: Tensor) -> None:
    """Refuse what the kernels do not do."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hstu_attention: backend 'triton' takes float32, float16 and bfloat16, not {q.dtype}")
    if max(q.shape[2], v.shape[2]) > 256:
        raise ValueError(f"hstu_attention: heads of {q.shape[2]} and {v.shape[2]} are wider than 256")


def heads(x: Tensor) -> Heads:
    """A `[T, H, width]` tensor as the kernels take it, copied if its last axis is not contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Heads(x, x.stride(0), x.stride(1))


def problem_arguments(
    q: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
) -> tuple[Batch, dict[str, Any]]:
    """What all kernels share: the batch, and the constexpr arguments."""
    offsets, timestamps, query_times = where
    pos, time = tables
    batch = Batch(
        pos_table=offsets if pos is None else pos.contiguous(),
        time_table=offsets if time is None else time.contiguous(),
        edges=bucket_edges(q.device),
        offsets=offsets.contiguous(),
        timestamps=timestamps.contiguous(),
        query_times=query_times.contiguous(),
        num_targets=offsets if masks.num_targets is None else masks.num_targets.contiguous(),
        num_rows=len(offsets) - 1,
        num_positions=1 if pos is None else len(pos),
        alpha=masks.alpha,
        inverse_norm=0.0 if masks.norm is None else 1.0 / masks.norm,
        window=masks.window,
        contextual=masks.contextual,
    )
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
    return batch, constants


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
) -> Tensor:
    """`hstu_attention`; `where` is offsets, timestamps and query times, `tables` those of position and time."""
    check(q, v)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    batch, constants = problem_arguments(q, v, where, tables, masks)
    if len(q) == 0:
        return out
    sizes = (q.shape[2], v.shape[2], q.element_size())
    config = tuned("forward", q.device, *sizes) or launch_config(*sizes)
    grid = (len(q) // config.block_m + len(where[0]) - 1, q.shape[1])
    _forward_kernel[grid](q=heads(q), k=heads(k), v=heads(v), out=out, batch=batch, **constants, **config.arguments())
    return out


def problem_signature(dtype: str, *tensors: str) -> dict[str, Any]:
    """Types of the batch and of `[T, H, width]` tensors, for ahead-of-time compilation; tables in float32."""
    pointers, integers = ("*i64",) * 5, ("i32",) * 2
    batch = Batch("*fp32", "*fp32", *pointers, *integers, "fp32", "fp32", *integers)
    return dict.fromkeys(tensors, Heads(f"*{dtype}", "i32", "i32")) | {"batch": batch}


def problem_constants(dim: int, *, targets: bool = True, heads: int = 2) -> dict[str, Any]:
    """Constexpr arguments of a compiled case: everything on but for the targets, which are asked for."""
    switches = {"POS": True, "TIME": True, "COUNT": False, "TARGETS": targets}
    sizes = {"H": heads, "D": dim, "V": dim, "BLOCK_D": padded(dim), "BLOCK_V": padded(dim), "BLOCK_B": 128}
    return switches | sizes


# Widths and types that are compiled ahead of time: the published ones, and the ends of the range.
AOT_SHAPES = ((25, "bf16"), (50, "bf16"), (64, "bf16"), (128, "bf16"), (256, "bf16"), (50, "fp32"), (128, "fp32"))


def aot_cases() -> list[AotCase]:
    """The forward kernel at its default configurations."""
    cases = []
    for dim, dtype in AOT_SHAPES:
        config = launch_config(dim, dim, 4 if dtype == "fp32" else 2)
        constants = problem_constants(dim) | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        signature = problem_signature(dtype, "q", "k", "v") | {"out": f"*{dtype}"}
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
