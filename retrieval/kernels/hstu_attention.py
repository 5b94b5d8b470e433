"""HSTU's pointwise attention with relative position and time bias, on jagged batches.

    out_i = 1/c_i · Σ_{j ≤ i} SiLU(q_i·k_j + pos[i − j] + time[bucket(tq_i − t_j)]) · v_j

within each row of the batch; c_i is a constant, or the number of visible keys i + 1. There is no softmax and no
1/√d. tq_i is the time at which the item after i is asked for. Source: "Actions Speak Louder than Words", arXiv
2402.17152, equation 2 and section 3.2, with the bias tables of its public research code.

Legend: B rows, T tokens, H heads, D query/key width, V value width, N length of a row, P positions of the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, time_bucket, time_bucket_reference

__all__ = ["AttentionPlan", "hstu_attention", "hstu_attention_reference", "plan_attention"]

# Scores that one step holds at once: on a CPU they should stay in the L2 cache (1 MiB of float32), on a GPU
# they only need to be large enough to hide launch costs.
_SCORES_PER_STEP = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """Rows of similar length that are padded to `length` and attended to together.

    Attributes:
        rows: number of rows.
        length: their greatest length.
        tokens: place of each of their tokens in the batch, int64 `[t]`.
        slots: place of each of their tokens in the padded `[rows * length]`, int64 `[t]`; None without padding.
        buckets: time buckets of all pairs, int32 `[rows * length * length]`.
    """

    rows: int
    length: int
    tokens: Tensor
    slots: Tensor | None
    buckets: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """`[T, H, D]` of the batch → `[H, rows, length, D]` of the group, zero on padding."""
        picked = x.index_select(0, self.tokens)
        if self.slots is not None:
            padded = x.new_zeros(self.rows * self.length, *x.shape[1:])
            picked = padded.index_copy_(0, self.slots, picked)
        return picked.view(self.rows, self.length, *x.shape[1:]).permute(2, 0, 1, 3).contiguous()

    def unpad_into(self, out: Tensor, padded: Tensor) -> None:
        """Write `[H, rows, length, D]` of the group to its tokens in `[T, H, D]` of the batch."""
        heads, _, _, width = padded.shape
        flat = padded.permute(1, 2, 0, 3).reshape(self.rows * self.length, heads, width)
        out.index_copy_(0, self.tokens, flat if self.slots is None else flat.index_select(0, self.slots))


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers share for one batch: rows grouped by length, and the time bucket of every pair.

    Build with `plan_attention`.
    """

    offsets: Tensor
    groups: tuple[_RowGroup, ...]


def _length_groups(lengths: Tensor, budget: int) -> Iterator[Tensor]:
    """Indices of non-empty rows, longest first, cut so that rows × longest² stays within `budget`."""
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    count = sum(length > 0 for length in sorted_lengths)
    start = 0
    while start < count:
        end = min(count, start + max(1, budget // sorted_lengths[start] ** 2))
        yield order[start:end]
        start = end


def plan_attention(offsets: Tensor, timestamps: Tensor, query_times: Tensor) -> AttentionPlan:
    """Prepare attention over one batch.

    Args:
        offsets: row b holds tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`, on the CPU.
        timestamps: time of each token in seconds, int64 `[T]`.
        query_times: time at which the item after each token is asked for, in seconds, int64 `[T]`.
    """
    device = timestamps.device
    lengths = offsets.diff()
    budget = _SCORES_PER_STEP.get(device.type, _SCORES_PER_STEP["cpu"])
    groups = []
    for rows in _length_groups(lengths, budget):
        length = int(lengths[rows[0]])
        place = torch.arange(length)
        inside = place < lengths[rows].unsqueeze(1)
        tokens = (offsets[rows].unsqueeze(1) + place)[inside].to(device)
        slots = None if bool(inside.all()) else inside.view(-1).nonzero().squeeze(1).to(device)
        group = _RowGroup(len(rows), length, tokens, slots, tokens)
        t = group.pad(timestamps.view(-1, 1, 1)).view(len(rows), 1, length)
        tq = group.pad(query_times.view(-1, 1, 1)).view(len(rows), length, 1)
        groups.append(_RowGroup(len(rows), length, tokens, slots, time_bucket(tq - t).view(-1)))
    return AttentionPlan(offsets, tuple(groups))


def _row_scale(length: int, norm: float | None, like: Tensor) -> Tensor:
    """1/c_i of each position as a column `[N, 1]`."""
    if norm is not None:
        return like.new_full((length, 1), 1.0 / norm)
    return torch.arange(1, length + 1, device=like.device, dtype=like.dtype).reciprocal_().unsqueeze(1)


def _toeplitz(table: Tensor, length: int) -> Tensor:
    """`[N, N]` with `table[i − j]` on and below the diagonal; what is above it is never used."""
    place = torch.arange(length, device=table.device)
    return table[(place.unsqueeze(1) - place).clamp_(min=0)]


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """Sums of the diagonals i − j = 0 … N − 1 of a lower-triangular `[N, N]`: the adjoint of `_toeplitz`."""
    length = len(matrix)
    place = torch.arange(length, device=matrix.device)
    distance = (place.unsqueeze(1) - place).clamp_(min=0)
    return matrix.new_zeros(length).index_add_(0, distance.view(-1), matrix.reshape(-1))


class _HSTUAttention(torch.autograd.Function):
    """Scores are recomputed in the backward pass: nothing of size N × N outlives a step."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        plan: AttentionPlan,
        norm: float | None,
    ) -> Tensor:
        out = torch.empty_like(v)
        for group, bias in _biases(plan, pos_table, time_table, q):
            k_g, v_g = group.pad(k), group.pad(v)
            scale = _row_scale(group.length, norm, v)
            out_g = torch.empty_like(v_g)
            for head, q_h in enumerate(group.pad(q)):
                attention = functional.silu(_scores(bias, q_h, k_g[head]), inplace=True).tril_()
                torch.bmm(attention, v_g[head], out=out_g[head])
            group.unpad_into(out, out_g.mul_(scale))
        ctx.save_for_backward(q, k, v, pos_table, time_table)
        ctx.plan, ctx.norm = plan, norm
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pos_table, time_table = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dpos = torch.zeros_like(pos_table) if pos_table is not None else None
        dtime = torch.zeros_like(time_table) if time_table is not None else None
        for group, bias in _biases(ctx.plan, pos_table, time_table, q):
            q_g, k_g, v_g = group.pad(q), group.pad(k), group.pad(v)
            dout_g = group.pad(grads[0]).mul_(_row_scale(group.length, ctx.norm, v))
            dq_g, dk_g, dv_g = torch.empty_like(q_g), torch.empty_like(k_g), torch.empty_like(v_g)
            dbias: Tensor | None = None
            for head in range(q.shape[1]):
                scores = _scores(bias, q_g[head], k_g[head])
                attention = functional.silu(scores).tril_()
                torch.bmm(attention.mT, dout_g[head], out=dv_g[head])
                dscores = torch.bmm(dout_g[head], v_g[head].mT, out=attention)
                dscores = torch.ops.aten.silu_backward(dscores, scores).tril_()
                torch.bmm(dscores, k_g[head], out=dq_g[head])
                torch.bmm(dscores.mT, q_g[head], out=dk_g[head])
                dbias = dscores if dbias is None else dbias.add_(dscores)
            for grad, padded in ((dq, dq_g), (dk, dk_g), (dv, dv_g)):
                group.unpad_into(grad, padded)
            assert dbias is not None
            if dpos is not None:
                dpos[: group.length] += _diagonal_sums(dbias.sum(0))
            if dtime is not None:
                dtime += torch.bincount(group.buckets, dbias.view(-1), NUM_TIME_BUCKETS)
        return dq, dk, dv, dpos, dtime, None, None


def _scores(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q, k.mT) if bias is None else torch.baddbmm(bias, q, k.mT)


def _biases(
    plan: AttentionPlan, pos_table: Tensor | None, time_table: Tensor | None, like: Tensor
) -> Iterator[tuple[_RowGroup, Tensor | None]]:
    """Each group with its bias `[rows, N, N]`, or None where there are no tables."""
    longest = max((group.length for group in plan.groups), default=0)
    pos = _toeplitz(pos_table, longest) if pos_table is not None else None
    for group in plan.groups:
        n = group.length
        shape = (group.rows, n, n)
        if time_table is None:
            yield group, None if pos is None else pos[:n, :n].expand(shape)
            continue
        bias = time_table.index_select(0, group.buckets).view(shape)
        yield group, bias if pos is None else bias.add_(pos[:n, :n])


def hstu_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    plan: AttentionPlan,
    *,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
) -> Tensor:
    """Attention of every token to itself and the tokens before it in its row (formula above).

    Args:
        q_THD: queries `[T, H, D]`.
        k_THD: keys `[T, H, D]`.
        v_THV: values `[T, H, V]`.
        plan: the batch's `plan_attention`.
        pos_table: bias of distance i − j, `[P]` with P ≥ the longest row, shared by heads; None for no such bias.
        time_table: bias of time bucket, `[129]`, shared by heads; None for no such bias.
        norm: the constant c; None divides by the number of visible keys.

    Returns:
        `[T, H, V]`.

    Raises:
        ValueError: shapes do not fit each other.
    """
    _check_shapes(q_THD, k_THD, v_THV, plan, pos_table, time_table)
    out: Tensor = _HSTUAttention.apply(q_THD, k_THD, v_THV, pos_table, time_table, plan, norm)
    return out


def hstu_attention_reference(
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
) -> Tensor:
    """As `hstu_attention`, row by row in plain differentiable torch; any floating dtype."""
    outs = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THD, k_THD, v_THV))
        scores = q @ k.mT
        if pos_table is not None:
            scores = scores + _toeplitz(pos_table, end - start)
        if time_table is not None:
            delta = query_times[start:end].unsqueeze(1) - timestamps[start:end]
            scores = scores + time_table[time_bucket_reference(delta).long()]
        attention = functional.silu(scores).tril() * _row_scale(end - start, norm, v_THV)
        outs.append((attention @ v).transpose(0, 1))
    return torch.cat(outs)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, pos_table: Tensor | None, time_table: Tensor | None
) -> None:
    tokens = int(plan.offsets[-1])
    if q.ndim != 3 or q.shape != k.shape or v.ndim != 3 or v.shape[:2] != q.shape[:2] or len(q) != tokens:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"hstu_attention: {shapes} do not fit each other and {tokens} tokens")
    longest = max((group.length for group in plan.groups), default=0)
    if pos_table is not None and (pos_table.ndim != 1 or len(pos_table) < longest):
        raise ValueError(f"hstu_attention: pos_table {tuple(pos_table.shape)} is too short for a row of {longest}")
    if time_table is not None and time_table.shape != (NUM_TIME_BUCKETS,):
        raise ValueError(f"hstu_attention: time_table {tuple(time_table.shape)} is not ({NUM_TIME_BUCKETS},)")
