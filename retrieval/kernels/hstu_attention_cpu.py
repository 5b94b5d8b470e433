"""HSTU attention on a CPU.

The compiled kernel of `hstu_attention_native` does what training and serving mostly ask for. The rest (a contextual
prefix, targets, float64, a machine without a compiler) is done here in torch operations: rows of similar length are
padded together and worked off in blocks of queries.

A step is one block of queries of one group of rows, with all keys up to the block's end: it skips most of what
causality masks, and its scores stay in the cache. Nothing of size N × N outlives a step but the time buckets, one
int32 per pair, which all layers share; where even they would be large, each step computes its own again.

Legend: see `hstu_attention.py`; R rows of a group, M queries of a step, N their keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels import hstu_attention_native as native
from retrieval.kernels.hstu_attention_reference import UNBOUNDED, distances, visible, visible_counts
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, time_bucket

__all__ = ["Masks", "backward", "bucket_type", "forward", "prepare"]

# Scores that one step holds at once: they should stay in the L2 cache (1 MiB of float32).
_SCORES_PER_STEP = 1 << 18
# Queries of a step: fewer skip more of what causality masks, more make better matrix products.
_QUERIES_PER_STEP = 64
# Time buckets that a prepared batch keeps, int32 (128 MiB) or uint8.
_MOST_BUCKETS = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """What is not a tensor with gradients; as in `hstu_attention`, with `UNBOUNDED` for no window."""

    norm: float | None
    alpha: float
    window: int
    contextual: int
    num_targets: Tensor | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are padded to `length` together.

    Attributes:
        rows: their indices in the batch, int64 `[R]`.
        length: the greatest of their lengths.
        gather: token of the batch in each place, int64 `[R * length]`; padding repeats the row's last token.
        slots: places that are not padding, int64 `[t]`; None without padding.
    """

    rows: Tensor
    length: int
    gather: Tensor
    slots: Tensor | None

    def pad(self, x_TXX: Tensor) -> Tensor:
        """`[T, H, D]` of the batch → `[H, R, length, D]`, at least float32."""
        picked = x_TXX.index_select(0, self.gather).view(len(self.rows), self.length, *x_TXX.shape[1:])
        return picked.permute(2, 0, 1, 3).contiguous().to(_working_type(x_TXX))

    def unpad_into(self, out_TXX: Tensor, padded: Tensor) -> None:
        """Write `[H, R, length, D]` to its tokens in `[T, H, D]` of the batch."""
        heads, _, _, width = padded.shape
        flat = padded.permute(1, 2, 0, 3).reshape(-1, heads, width).to(out_TXX.dtype)
        if self.slots is None:
            out_TXX.index_copy_(0, self.gather, flat)
        else:
            out_TXX.index_copy_(0, self.gather.index_select(0, self.slots), flat.index_select(0, self.slots))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First query and end of each step."""
        most = max(16, min(_QUERIES_PER_STEP, _SCORES_PER_STEP // self.length))
        count = -(-self.length // most)
        size = -(-self.length // count)
        for first in range(0, self.length, size):
            yield first, min(first + size, self.length)


@dataclass(frozen=True, slots=True)
class _Step:
    """One block of queries of a group; `bias` is `[R, M, N]` or broadcasts to it."""

    group: _Group
    first: int
    end: int
    keys: slice
    seen: Tensor | None
    distance: Tensor | None
    buckets: Tensor | None
    bias: Tensor | None

    def mask_(self, matrix: Tensor) -> Tensor:
        """Zero what the queries do not see, in place."""
        if self.seen is not None:
            return matrix.mul_(self.seen)
        # Causal only: keys before the block are all seen.
        matrix[..., self.first :].tril_()
        return matrix


def _working_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _groups(offsets: Tensor) -> Iterator[_Group]:
    """Non-empty rows, longest first, cut so that a step of each group keeps to `_SCORES_PER_STEP`."""
    lengths = offsets.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    count = sum(length > 0 for length in sorted_lengths)
    start = 0
    while start < count:
        length = sorted_lengths[start]
        most = max(1, _SCORES_PER_STEP // (min(length, _QUERIES_PER_STEP) * length))
        # Padding costs time: a group ends where rows are less than three quarters of its longest.
        end = start + 1
        while end < min(count, start + most) and 4 * sorted_lengths[end] >= 3 * length:
            end += 1
        rows = order[start:end]
        place, last = torch.arange(length), lengths[rows].unsqueeze(1) - 1
        gather = (offsets[rows].unsqueeze(1) + torch.minimum(place, last)).view(-1)
        padded = sorted_lengths[end - 1] < length
        yield _Group(rows, length, gather, (place <= last).view(-1).nonzero().squeeze(1) if padded else None)
        start = end


def _block_buckets(group: _Group, first: int, end: int, keys: slice, times: Tensor, query_times: Tensor) -> Tensor:
    """Time buckets of a step, int32 `[R * M * N]`."""
    shape = (len(group.rows), group.length)
    t = times.index_select(0, group.gather).view(shape)[:, None, keys]
    tq = query_times.index_select(0, group.gather).view(shape)[:, first:end, None]
    return time_bucket(tq - t).view(-1)


def bucket_type() -> torch.dtype:
    """Type of the buckets that `prepare` makes; each implementation has its own layout of them."""
    return torch.uint8 if native.available() else torch.int32


def prepare(offsets: Tensor, timestamps: Tensor, query_times: Tensor) -> Tensor:
    """Time buckets of all pairs that causality leaves; empty where they would be too many."""
    offsets = offsets.cpu()
    if native.available():
        lengths = offsets.diff()
        pairs = int((lengths * (lengths + 1) // 2).sum())
        if pairs > _MOST_BUCKETS:
            return torch.empty(0, dtype=torch.uint8)
        return native.time_buckets((offsets, timestamps, query_times), pairs)
    steps = [(group, first, end) for group in _groups(offsets) for first, end in group.blocks()]
    total = sum(len(group.rows) * (end - first) * end for group, first, end in steps)
    if total > _MOST_BUCKETS:
        return torch.empty(0, dtype=torch.int32)
    buckets = torch.empty(total, dtype=torch.int32)
    start = 0
    for group, first, end in steps:
        part = _block_buckets(group, first, end, slice(0, end), timestamps, query_times)
        buckets[start : start + len(part)] = part
        start += len(part)
    return buckets


def _compiled(q: Tensor, masks: Masks) -> bool:
    """Whether the compiled kernel does this case."""
    plain = not masks.contextual and masks.num_targets is None
    return plain and _working_type(q) == torch.float32 and native.available()


def _kept(prepared: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Prepared buckets, if there are any in the layout that goes with this type."""
    return prepared if prepared is not None and prepared.dtype == dtype and len(prepared) else None


def _check_table(pos_table: Tensor | None, longest: int) -> None:
    if pos_table is not None and len(pos_table) < longest:
        raise ValueError(f"hstu_attention: pos_table {tuple(pos_table.shape)} is too short for a row of {longest}")


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


class _Batch:
    """Walks over the steps of one batch and makes each step's bias."""

    def __init__(
        self,
        offsets: Tensor,
        timestamps: Tensor,
        query_times: Tensor,
        tables: tuple[Tensor | None, Tensor | None],
        masks: Masks,
        prepared: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.offsets, self.timestamps, self.query_times, self.masks = offsets.cpu(), timestamps, query_times, masks
        self.pos, self.time = (None if table is None else table.detach().to(dtype) for table in tables)
        # Prepared buckets are laid out for keys from the row's first to the block's end.
        self.prepared = None if masks.contextual else _kept(prepared, torch.int32)
        _check_table(self.pos, _longest(self.offsets))

    def groups(self) -> Iterator[tuple[_Group, Iterator[_Step]]]:
        """Each group with its steps; the steps must be used up before the next group is taken."""
        start = 0
        for group in _groups(self.offsets):
            yield group, self._steps(group, start)
            start += sum(len(group.rows) * (end - first) * end for first, end in group.blocks())

    def scale(self, group: _Group, dtype: torch.dtype) -> Tensor:
        """1/c of each place, 0 on padding, `[R, length, 1]` or broadcasting to it."""
        place, lengths = torch.arange(group.length), self.offsets.diff()[group.rows].unsqueeze(1)
        if self.masks.norm is None:
            count = visible_counts(place, self._history(group), self.masks.window, self.masks.contextual)
            scale = count.to(dtype).reciprocal()
        else:
            scale = torch.full((len(group.rows), group.length), 1 / self.masks.norm, dtype=dtype)
        return (scale * (place < lengths)).unsqueeze(2)

    def _history(self, group: _Group) -> Tensor:
        """Tokens of each row that are no targets, `[R, 1]`."""
        history = self.offsets.diff()[group.rows].unsqueeze(1)
        if self.masks.num_targets is not None:
            history = history - self.masks.num_targets.cpu()[group.rows].unsqueeze(1)
        return history

    def _steps(self, group: _Group, start: int) -> Iterator[_Step]:
        masks = self.masks
        plain = masks.window == UNBOUNDED and not masks.contextual and masks.num_targets is None
        for first, end in group.blocks():
            low = 0 if masks.contextual or masks.num_targets is not None else max(0, first - masks.window + 1)
            keys = slice(low, group.length if first < masks.contextual else end)
            query, key = torch.arange(first, end).unsqueeze(1), torch.arange(keys.start, keys.stop)
            seen = distance = None
            if plain:
                distance = (query - key).clamp_(min=0)
            else:
                history = self._history(group).unsqueeze(2)
                seen = visible(query, key, history, masks.window, masks.contextual)
                distance = distances(
                    query, key, history if masks.num_targets is not None else query.new_tensor(UNBOUNDED)
                )
            buckets = self._buckets(group, first, end, keys, start) if self.time is not None else None
            start += len(group.rows) * (end - first) * end
            bias = self._bias((len(group.rows), end - first, len(key)), distance, buckets)
            yield _Step(group, first, end, keys, seen, distance, buckets, bias)

    def _buckets(self, group: _Group, first: int, end: int, keys: slice, start: int) -> Tensor:
        if self.prepared is None:
            return _block_buckets(group, first, end, keys, self.timestamps, self.query_times)
        shape = (len(group.rows), end - first, end)
        part = self.prepared[start : start + shape[0] * shape[1] * shape[2]]
        return part if keys.start == 0 else part.view(shape)[..., keys].reshape(-1)

    def _bias(self, shape: tuple[int, int, int], distance: Tensor, buckets: Tensor | None) -> Tensor | None:
        pos = None if self.pos is None else self.pos.take(distance)
        if self.time is None or buckets is None:
            return None if pos is None else pos.expand(shape)
        bias = self.time.index_select(0, buckets).view(shape)
        return bias if pos is None else bias.add_(pos)


def _scores(step: _Step, q: Tensor, k: Tensor, alpha: float) -> Tensor:
    if step.bias is None:
        return torch.bmm(q, k.mT).mul_(alpha)
    return torch.baddbmm(step.bias, q, k.mT, alpha=alpha)


class _Options(TypedDict):
    norm: float | None
    alpha: float
    window: int


def _options(masks: Masks) -> _Options:
    return {"norm": masks.norm, "alpha": masks.alpha, "window": masks.window}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
    prepared: Tensor | None,
) -> Tensor:
    """`hstu_attention`; `where` is offsets, timestamps and query times, `tables` those of position and time."""
    if _compiled(q, masks):
        _check_table(tables[0], _longest(where[0]))
        return native.forward(q, k, v, where, tables, _kept(prepared, torch.uint8), **_options(masks))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    dtype = _working_type(q)
    batch = _Batch(*where, tables, masks, prepared, dtype)
    for group, steps in batch.groups():
        q_g, k_g, v_g = group.pad(q), group.pad(k), group.pad(v)
        out_g = torch.empty_like(v_g)
        for step in steps:
            queries = slice(step.first, step.end)
            for head in range(q.shape[1]):
                scores = _scores(step, q_g[head, :, queries], k_g[head, :, step.keys], masks.alpha)
                attention = step.mask_(functional.silu(scores, inplace=True))
                out_g[head, :, queries] = torch.bmm(attention, v_g[head, :, step.keys])
        group.unpad_into(out, out_g.mul_(batch.scale(group, dtype)))
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    masks: Masks,
    prepared: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and of both tables; scores are computed again."""
    if _compiled(q, masks):
        longest, buckets = _longest(where[0]), _kept(prepared, torch.uint8)
        _check_table(tables[0], longest)
        return native.backward(dout, q, k, v, where, tables, buckets, **_options(masks), longest=longest)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dtype = _working_type(q)
    dpos, dtime = (None if table is None else torch.zeros(len(table), dtype=dtype) for table in tables)
    batch = _Batch(*where, tables, masks, prepared, dtype)
    for group, steps in batch.groups():
        q_g, k_g, v_g = group.pad(q), group.pad(k), group.pad(v)
        dout_g = group.pad(dout).mul_(batch.scale(group, dtype))
        dq_g, dk_g, dv_g = torch.empty_like(q_g), torch.zeros_like(k_g), torch.zeros_like(v_g)
        for step in steps:
            queries, keys = slice(step.first, step.end), step.keys
            dbias: Tensor | None = None
            for head in range(q.shape[1]):
                q_h, k_h, dout_h = q_g[head, :, queries], k_g[head, :, keys], dout_g[head, :, queries]
                scores = _scores(step, q_h, k_h, masks.alpha)
                attention = step.mask_(functional.silu(scores))
                dv_g[head, :, keys].baddbmm_(attention.mT, dout_h)
                dscores = torch.bmm(dout_h, v_g[head, :, keys].mT, out=attention)
                dscores = step.mask_(torch.ops.aten.silu_backward(dscores, scores))
                dq_g[head, :, queries] = torch.bmm(dscores, k_h).mul_(masks.alpha)
                dk_g[head, :, keys].baddbmm_(dscores.mT, q_h, alpha=masks.alpha)
                dbias = dscores if dbias is None else dbias.add_(dscores)
            assert dbias is not None
            _add_table_gradients(step, dbias, dpos, dtime)
        for grad, padded in ((dq, dq_g), (dk, dk_g), (dv, dv_g)):
            group.unpad_into(grad, padded)
    return dq, dk, dv, _like(dpos, tables[0]), _like(dtime, tables[1])


def _like(grad: Tensor | None, table: Tensor | None) -> Tensor | None:
    return None if grad is None or table is None else grad.to(table.dtype)


def _add_table_gradients(step: _Step, dbias: Tensor, dpos: Tensor | None, dtime: Tensor | None) -> None:
    """Add a step's bias gradients `[R, M, N]` to those of the tables."""
    if dpos is not None:
        assert step.distance is not None
        if step.seen is None:
            sums = _diagonal_sums(dbias.sum(0))
            dpos[: len(sums)] += sums
        else:
            distance = step.distance.expand(dbias.shape) if step.distance.ndim == 3 else step.distance
            by_distance = dbias if step.distance.ndim == 3 else dbias.sum(0)
            dpos.index_add_(0, distance.reshape(-1), by_distance.reshape(-1))
    if dtime is not None:
        assert step.buckets is not None
        dtime += torch.bincount(step.buckets, dbias.view(-1), NUM_TIME_BUCKETS)


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """Sums over the distances 0 … N − 1 of `[M, N]` whose last query stands on the last key."""
    queries, keys = matrix.shape
    # Reversed rows, each one place longer than the next row's shift: reading them as one place shorter skews them, so
    # that a diagonal becomes a column.
    skewed = matrix.new_zeros(queries, keys + queries)
    skewed[:, :keys] = matrix.flip(1)
    width = keys + queries - 1
    return skewed.view(-1)[: queries * width].view(queries, width).sum(0)[queries - 1 :]
