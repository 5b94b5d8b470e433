"""HSTU's pointwise attention with relative position and time bias, on jagged batches.

    out_i = 1/c_i · Σ_{j visible to i} SiLU(α·q_i·k_j + pos[|p_i − p_j|] + time[bucket(|tq_i − t_j|)]) · v_j

within each row of the batch; c_i is a constant, or the number of keys that i sees. There is no softmax and no 1/√d.
tq_i is the time at which the item after i is asked for. Source: "Actions Speak Louder than Words", arXiv
2402.17152, equation 2 and section 3.2, with the bias tables of its public research code.

What i sees. A row of n tokens is a history of h = n − num_targets tokens, the first c = min(contextual, h) of which
are its contextual prefix, and then targets. Each token has a rank: 0 in the prefix, then one more per token of the
history; all targets have the rank that the history's next token would have. (Without a prefix the first token has
rank 0, so ranks are places.) Then i sees

- itself;
- every token of lower rank by less than `window`; targets therefore see the history and never each other;
- from the prefix: the whole history, before and after it, whatever the window.

With a window w, a token of the history sees w tokens, itself included; the prefix counts as one place, and falls out
of the window like any other. These are the masks of the public production code (meta-recsys/generative-recommenders).

Positions: p_i = min(i, h), the place in the row; targets all stand on the place after the history, so that a target's
output does not depend on the other targets. Times: each target has its own query time and its own time as a key.

Nothing of size N × N is kept between forward and backward, by any backend.

Legend: B rows, T tokens, H heads, D query/key width, V value width, N length of a row, P positions of the table.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrieval.kernels import hstu_attention_cpu
from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.hstu_attention_cpu import Masks
from retrieval.kernels.hstu_attention_reference import UNBOUNDED, hstu_attention_reference
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

__all__ = ["AttentionPlan", "hstu_attention", "hstu_attention_reference", "plan_attention"]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers share for one batch; `plan_attention` makes it.

    Attributes:
        where: offsets, timestamps and query times, where the backend wants them.
        prepared: the CPU backend's time buckets of all pairs.
        max_length: length of the longest row; None where finding out would wait for a GPU.
        backend: the implementation that it was made for.
    """

    where: tuple[Tensor, Tensor, Tensor]
    prepared: Tensor | None
    max_length: int | None
    backend: Backend


def plan_attention(
    offsets: Tensor, timestamps: Tensor, query_times: Tensor, *, time_bias: bool = True, backend: Backend = "auto"
) -> AttentionPlan:
    """Do once per batch what `hstu_attention` would otherwise do once per layer.

    Args:
        offsets: row b holds tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`.
        timestamps: time of each token in seconds, int64 `[T]`.
        query_times: time at which the item after each token is asked for, in seconds, int64 `[T]`.
        time_bias: whether any layer will use a time table.
        backend: implementation to prepare for.
    """
    chosen = resolve_backend(backend, timestamps.device)
    max_length = None
    if not torch.compiler.is_compiling() and offsets.device.type == "cpu":
        max_length = int(offsets.diff().max()) if offsets.shape[0] > 1 else 0
    prepared = None
    if chosen == "cpu" and time_bias:
        prepared = torch.ops.retrieval.hstu_attention_prepare(offsets, timestamps, query_times)
    if chosen == "triton":
        offsets = offsets.to(timestamps.device, non_blocking=True)
    return AttentionPlan((offsets, timestamps, query_times), prepared, max_length, chosen)


@torch.library.custom_op("retrieval::hstu_attention_prepare", mutates_args=())
def _prepare(offsets: Tensor, timestamps: Tensor, query_times: Tensor) -> Tensor:
    return hstu_attention_cpu.prepare(offsets, timestamps, query_times)


@_prepare.register_fake
def _(offsets: Tensor, timestamps: Tensor, query_times: Tensor) -> Tensor:
    return timestamps.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=hstu_attention_cpu.bucket_type())


@torch.library.custom_op("retrieval::hstu_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    prepared: Tensor | None,
    norm: float | None,
    alpha: float,
    window: int,
    contextual: int,
    deterministic: bool,
    backend: str,
) -> Tensor:
    where, tables = (offsets, timestamps, query_times), (pos_table, time_table)
    masks = Masks(norm=norm, alpha=alpha, window=window, contextual=contextual, num_targets=num_targets)
    if backend == "triton":
        from retrieval.kernels import hstu_attention_triton

        return hstu_attention_triton.forward(q, k, v, where, tables, masks)
    return hstu_attention_cpu.forward(q, k, v, where, tables, masks, prepared)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("retrieval::hstu_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    prepared: Tensor | None,
    norm: float | None,
    alpha: float,
    window: int,
    contextual: int,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    where, tables = (offsets, timestamps, query_times), (pos_table, time_table)
    masks = Masks(norm=norm, alpha=alpha, window=window, contextual=contextual, num_targets=num_targets)
    if backend == "triton":
        from retrieval.kernels import hstu_attention_bwd_triton

        grads = hstu_attention_bwd_triton.backward(dout, q, k, v, where, tables, masks, deterministic)
    else:
        grads = hstu_attention_cpu.backward(dout, q, k, v, where, tables, masks, prepared)
    # An operator returns tensors only: an empty one stands for the gradient of an absent table.
    dpos, dtime = (q.new_empty(0) if grad is None else grad for grad in grads[3:])
    return *grads[:3], dpos, dtime


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_table: Tensor | None, time_table: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    tables = [q.new_empty(0) if table is None else torch.empty_like(table) for table in (pos_table, time_table)]
    return *grads, *tables


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dpos, dtime = torch.ops.retrieval.hstu_attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    tables = (
        grad if table is not None else None for grad, table in zip((dpos, dtime), ctx.saved_tensors[3:5], strict=True)
    )
    return dq, dk, dv, *tables, *([None] * 11)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def hstu_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    *,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
    alpha: float = 1.0,
    window: int | None = None,
    contextual: int = 0,
    num_targets: Tensor | None = None,
    prepared: Tensor | None = None,
    max_length: int | None = None,
    deterministic: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Attention within each row of a jagged batch (formula and masks: see the module).

    Args:
        q_THD: queries `[T, H, D]`, float32, bfloat16 or float16; sums are float32. (float64 but for "triton".)
        k_THD: keys `[T, H, D]`.
        v_THV: values `[T, H, V]`.
        offsets: row b holds tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`, on the CPU or beside the rest.
        timestamps: time of each token in seconds, int64 `[T]`, in any order (sorted within a row is fastest).
        query_times: time at which the item after each token is asked for, in seconds, int64 `[T]`.
        pos_table: bias of distance in positions, `[P]` with P ≥ the longest row, shared by heads; None for none.
        time_table: bias of time bucket, `[129]`, shared by heads; None for no such bias.
        norm: the constant c; None divides by the number of visible keys.
        alpha: α, factor of q·k.
        window: tokens that a token sees, itself included; None for all.
        contextual: length of the contextual prefix of every row.
        num_targets: targets at the end of each row, int64 `[B]`, each at most the row's length; None for none.
        prepared: `plan_attention(...).prepared`, spares the CPU backend the time buckets.
        max_length: length of the longest row if known, to check `pos_table` where `offsets` are on a GPU.
        deterministic: the gradients' bits are the same on every run. False lets "triton" add up the gradient of q
            with atomics, in one pass less over the scores and in no fixed order. Other backends always are.
        backend: implementation; see `kernels.backend`.

    Returns:
        `[T, H, V]` in the dtype of `v_THV`.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
        ConfigError: the backend cannot run here.
    """
    _check(q_THD, k_THD, v_THV, (offsets, timestamps, query_times), pos_table, time_table, num_targets)
    if (window is not None and window < 1) or contextual < 0 or (norm is not None and norm <= 0):
        raise ValueError(f"hstu_attention: window {window}, contextual {contextual}, norm {norm}: out of range")
    if pos_table is not None and max_length is not None and pos_table.shape[0] < max_length:
        raise ValueError(f"hstu_attention: pos_table {tuple(pos_table.shape)} is too short for a row of {max_length}")
    chosen = resolve_backend(backend, q_THD.device)
    if chosen == "reference":
        return hstu_attention_reference(
            q_THD,
            k_THD,
            v_THV,
            offsets,
            timestamps,
            query_times,
            pos_table=pos_table,
            time_table=time_table,
            norm=norm,
            alpha=alpha,
            window=window,
            contextual=contextual,
            num_targets=num_targets,
        )
    if chosen == "triton":
        offsets = offsets.to(q_THD.device)
        num_targets = None if num_targets is None else num_targets.to(q_THD.device)
    out: Tensor = _forward(
        q_THD,
        k_THD,
        v_THV,
        pos_table,
        time_table,
        offsets,
        timestamps,
        query_times,
        num_targets,
        prepared,
        norm,
        alpha,
        UNBOUNDED if window is None else min(window, UNBOUNDED),
        contextual,
        deterministic,
        chosen,
    )
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    pos_table: Tensor | None,
    time_table: Tensor | None,
    num_targets: Tensor | None,
) -> None:
    offsets, *times = where
    if q.ndim != 3 or q.shape != k.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"hstu_attention: {shapes} do not fit each other")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"hstu_attention: q {q.dtype}, k {k.dtype}, v {v.dtype} are not one floating dtype")
    if any(t.shape != q.shape[:1] or t.dtype != torch.int64 for t in times):
        raise ValueError(f"hstu_attention: timestamps and query_times are not int64 of {q.shape[0]} tokens")
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"hstu_attention: offsets {offsets.dtype} {tuple(offsets.shape)} are not int64 [B + 1]")
    if not torch.compiler.is_compiling() and offsets.device.type == "cpu" and int(offsets[-1]) != q.shape[0]:
        raise ValueError(f"hstu_attention: {q.shape[0]} tokens do not fit offsets that end at {int(offsets[-1])}")
    if num_targets is not None and (num_targets.shape != (offsets.shape[0] - 1,) or num_targets.dtype != torch.int64):
        raise ValueError(
            f"hstu_attention: num_targets {tuple(num_targets.shape)} is not int64 of {offsets.shape[0] - 1}"
        )
    if pos_table is not None and (pos_table.ndim != 1 or pos_table.shape[0] == 0):
        raise ValueError(f"hstu_attention: pos_table {tuple(pos_table.shape)} is not [P] with P ≥ 1")
    if time_table is not None and time_table.shape != (NUM_TIME_BUCKETS,):
        raise ValueError(f"hstu_attention: time_table {tuple(time_table.shape)} is not ({NUM_TIME_BUCKETS},)")
