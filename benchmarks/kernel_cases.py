"""The shapes, inputs, variants and references of `benchmarks.kernels`.

Legend: B rows, N longest row, T tokens, H heads, D query/key width, V value width (equal here), C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.gated_norm import gated_norm
from retrieval.kernels.gated_norm_reference import gated_norm_reference
from retrieval.kernels.hstu_attention import hstu_attention, hstu_attention_reference, plan_attention
from retrieval.kernels.hstu_decode import hstu_decode
from retrieval.kernels.hstu_decode_reference import hstu_decode_reference
from retrieval.kernels.softmax_loss import softmax_loss
from retrieval.kernels.softmax_loss_reference import softmax_loss_reference
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, time_bucket_reference

__all__ = ["CASES", "Case", "attention_case"]

Makers = list[Callable[[], "Case"]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem and all who solve it.

    Attributes:
        op: name of the operation.
        shape: what the row says of the problem.
        dtype: of the inputs.
        leaves: inputs that want gradients.
        grad: gradient of the output; None for what has no backward pass.
        variants: functions that return the output.
        exact: float32 output, then gradients of the leaves.
        forward: floating-point operations and least bytes.
        backward: likewise.
    """

    op: str
    shape: str
    dtype: torch.dtype
    leaves: list[Tensor]
    grad: Tensor | None
    variants: Mapping[str, Callable[[], Tensor]]
    exact: Callable[[], list[Tensor]]
    forward: tuple[float, float]
    backward: tuple[float, float] = (0.0, 0.0)


def _ours(device: torch.device) -> Literal["cpu", "triton"]:
    return "triton" if device.type == "cuda" else "cpu"


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _lengths(kind: str, longest: int, tokens: int) -> Tensor:
    """Row lengths of about `tokens` in all, the longest first."""
    g = torch.Generator().manual_seed(0)
    if kind == "full":
        return torch.full((max(1, tokens // longest),), longest)
    if kind == "one-long":
        return torch.tensor([longest] + [64] * max(1, (tokens - longest) // 64))
    if kind == "uniform":
        drawn = torch.randint(1, longest + 1, (max(2, 2 * tokens // longest),), generator=g)
    else:  # log-normal, median a quarter of the longest
        drawn = (torch.randn(max(2, 3 * tokens // longest), generator=g).exp() * longest / 4).long()
    drawn = drawn.clamp(1, longest)
    drawn[0] = longest
    return drawn


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a jagged batch are, and when their events were."""

    lengths: Tensor
    offsets: Tensor
    timestamps: Tensor
    query_times: Tensor

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "_Rows":
        g = _generator(torch.device("cpu"))
        offsets = functional.pad(lengths.cumsum(0), (1, 0))
        gaps = torch.exp(torch.rand(int(offsets[-1]), generator=g) * 14).long()
        times = (10**9 + gaps.cumsum(0)).to(device)
        return cls(lengths, offsets, times, times + 3600)

    def slots(self, device: torch.device) -> Tensor:
        """Place of each token in a padded batch, `[T]`."""
        longest, rows = int(self.lengths.max()), torch.arange(len(self.lengths))
        shift = torch.repeat_interleave(rows * longest - self.offsets[:-1], self.lengths)
        return (shift + torch.arange(len(shift))).to(device)


def attention_case(
    kind: str, longest: int, tokens: int, width: int, bias: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    """HSTU attention, heads 4, divided by the longest row."""
    heads, g = 4, _generator(device)
    rows = _Rows.of(_lengths(kind, longest, tokens), device)
    total = int(rows.offsets[-1])
    q, k, v = (
        torch.randn(total, heads, width, generator=g, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    tables = [torch.randn(n, generator=g, device=device).requires_grad_() for n in (longest, NUM_TIME_BUCKETS)]
    pos_table, time_table = tables if bias else (None, None)
    leaves = [q, k, v, *(tables if bias else [])]
    grad = torch.randn(total, heads, width, generator=g, device=device).to(dtype)
    where = (rows.offsets, rows.timestamps, rows.query_times)
    plan = plan_attention(*where, time_bias=bias, backend=_ours(device))

    def ours() -> Tensor:
        return hstu_attention(
            q,
            k,
            v,
            *plan.where,
            pos_table=pos_table,
            time_table=time_table,
            norm=float(longest),
            alpha=width**-0.5,
            prepared=plan.prepared,
            max_length=plan.max_length,
            backend=_ours(device),
        )

    slots, batch = rows.slots(device), len(rows.lengths)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    distance = (torch.arange(longest)[:, None] - torch.arange(longest)).abs().to(device) if bias else None

    @torch.no_grad()
    def padded_buckets() -> Tensor:
        """Of all pairs, `[B, N, N]`; in training, all layers share them."""
        key, query = (
            t.new_zeros(batch * longest).index_copy(0, slots, t).view(batch, longest) for t in (where[1], where[2])
        )
        return torch.stack([time_bucket_reference(b[:, None] - a) for a, b in zip(key, query, strict=True)]).long()

    buckets: list[Tensor] = []

    def eager() -> Tensor:
        padded = (
            x.new_zeros(batch * longest, heads, width)
            .index_copy(0, slots, x)
            .view(batch, longest, heads, width)
            .transpose(1, 2)
            for x in (q, k, v)
        )
        queries, keys, values = padded
        scores = (queries @ keys.mT) * width**-0.5
        if pos_table is not None and time_table is not None:
            assert distance is not None
            if not buckets:
                buckets.append(padded_buckets())
            scores = scores + (pos_table[distance] + time_table[buckets[0]]).to(dtype).unsqueeze(1)
        weights = (functional.silu(scores) / longest).masked_fill(~causal, 0)
        return (weights @ values).transpose(1, 2).flatten(0, 1).index_select(0, slots)

    def exact() -> list[Tensor]:
        """One row at a time: float32 scores of a whole batch would not fit."""
        parts: list[list[Tensor]] = []
        table_grads = [torch.zeros_like(table) for table in tables] if bias else []
        for start, end in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist(), strict=True):
            row = a, b, c = [x[start:end].detach().float().requires_grad_() for x in (q, k, v)]
            used = [table.detach().clone().requires_grad_() for table in tables] if bias else []
            out = hstu_attention_reference(
                a,
                b,
                c,
                torch.tensor([0, end - start]),
                rows.timestamps[start:end],
                rows.query_times[start:end],
                pos_table=used[0] if bias else None,
                time_table=used[1] if bias else None,
                norm=float(longest),
                alpha=width**-0.5,
            )
            grads = torch.autograd.grad(out, [*row, *used], grad[start:end].float())
            parts.append([out.detach(), *grads[:3]])
            for whole, part in zip(table_grads, grads[3:], strict=True):
                whole += part
        return [torch.cat(column) for column in zip(*parts, strict=True)] + table_grads

    pairs = heads * float((rows.lengths * (rows.lengths + 1) // 2).sum())
    size = q.element_size() * q.numel()
    return Case(
        op="hstu_attention",
        shape=f"{kind} N{longest} B{batch} T{total} H{heads} d{width} {'bias' if bias else 'plain'}",
        dtype=dtype,
        leaves=leaves,
        grad=grad,
        variants={_ours(device): ours, "eager": eager},
        exact=exact,
        forward=(4 * pairs * width, 4 * size + 16 * total),
        backward=(10 * pairs * width, 7 * size + 16 * total),
    )


def _sdpa(longest: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Softmax attention of torch, causal, at the shapes of the full-length cases."""
    heads, batch, g = 4, max(1, tokens // longest), _generator(device)
    shape = (batch, heads, longest, width)
    leaves = queries, keys, values = [
        torch.randn(shape, generator=g, device=device).to(dtype).requires_grad_() for _ in range(3)
    ]
    grad = torch.randn(shape, generator=g, device=device).to(dtype)

    def exact() -> list[Tensor]:
        parts = []
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        for row in range(batch):
            q, k, v = inputs = [x[row].detach().float().requires_grad_() for x in leaves]
            out = (q @ k.mT * width**-0.5).masked_fill(~causal, -torch.inf).softmax(-1) @ v
            parts.append([out.detach(), *torch.autograd.grad(out, inputs, grad[row].float())])
        return [torch.stack(column) for column in zip(*parts, strict=True)]

    pairs, size = batch * heads * longest * (longest + 1) / 2, grad.element_size() * grad.numel()
    return Case(
        op="hstu_attention",
        shape=f"full N{longest} B{batch} T{batch * longest} H{heads} d{width} softmax",
        dtype=dtype,
        leaves=leaves,
        grad=grad,
        variants={"sdpa": lambda: functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)},
        exact=exact,
        forward=(4 * pairs * width, 4 * size),
        backward=(10 * pairs * width, 7 * size),
    )


def _attention_cases(device: torch.device, quick: bool) -> Makers:
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    if quick:
        sizes, widths, tokens, jagged = [64, 256], [32], 512, (128, 32)
    elif device.type == "cuda":
        sizes, widths, tokens, jagged = [256, 1024, 4096, 16384], [32, 64, 128, 256], 1 << 16, (4096, 64)
    else:
        sizes, widths, tokens, jagged = [256, 1024], [32, 64], 1 << 12, (512, 64)
    makers: Makers = []
    for longest in sizes:
        for width in widths:
            makers += [partial(attention_case, "full", longest, tokens, width, b, half, device) for b in (True, False)]
            makers.append(partial(_sdpa, longest, tokens, width, half, device))
    for kind in ("uniform", "log-normal", "one-long"):
        makers.append(partial(attention_case, kind, jagged[0], tokens, jagged[1], True, half, device))
    if device.type == "cuda":
        # The published ML-1M models: head sizes that are no powers of two.
        for width in (25, 50):
            makers.append(partial(attention_case, "log-normal", 200, 128 * 130, width, True, torch.float32, device))
    return makers


def _decode(batch: int, queries: int, longest: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The last positions of each row against all of its keys, with both biases."""
    heads, g = 4, _generator(device)
    rows = _Rows.of(torch.full((batch,), longest), device)
    q = torch.randn(batch, queries, heads, width, generator=g, device=device).to(dtype)
    k, v = (torch.randn(batch * longest, heads, width, generator=g, device=device).to(dtype) for _ in range(2))
    tables = [torch.randn(n, generator=g, device=device) for n in (longest, NUM_TIME_BUCKETS)]
    positions = torch.arange(longest - queries, longest, device=device).expand(batch, queries).contiguous()
    asked = rows.query_times.view(batch, longest)[:, longest - queries :].contiguous()
    where = (rows.offsets.to(device), rows.timestamps, asked, positions)

    def ours() -> Tensor:
        return hstu_decode(
            q,
            k,
            v,
            *where,
            pos_table=tables[0],
            time_table=tables[1],
            norm=float(longest),
            max_length=longest,
            backend=_ours(device),
        )

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hstu_decode_reference(q, k, v, *where, tables[0], tables[1], norm=float(longest), alpha=1.0)

    pairs = heads * batch * sum(range(longest - queries + 1, longest + 1))
    size = q.element_size() * (2 * q.numel() + 2 * k.numel())
    return Case(
        op="hstu_decode",
        shape=f"B{batch} M{queries} N{longest} H{heads} d{width} bias",
        dtype=dtype,
        leaves=[],
        grad=None,
        variants={_ours(device): ours, "eager": lambda: reference(q, k, v)},
        exact=lambda: [reference(q.float(), k.float(), v.float())],
        forward=(4.0 * pairs * width, size + 8 * batch * longest),
    )


def _decode_cases(device: torch.device, quick: bool) -> Makers:
    if device.type == "cuda":
        shapes = [(64, m, n, d) for m in (1, 64) for n in (256, 1024, 4096, 16384) for d in (64, 128)]
        return [partial(_decode, *shape, torch.bfloat16, device) for shape in shapes]
    shapes = [(4, 1, 256, 32), (4, 16, 256, 32)] if quick else [(16, m, n, 50) for m in (1, 64) for n in (200, 1024)]
    return [partial(_decode, *shape, torch.float32, device) for shape in shapes]


def _gate(tokens: int, channels: int, p: float, dtype: torch.dtype, device: torch.device) -> Case:
    """The gate; only without dropout can plain torch be compared, whose mask would be another."""
    g = _generator(device)
    leaves = [torch.randn(tokens, channels, generator=g, device=device).to(dtype).requires_grad_() for _ in range(2)]
    grad = torch.randn(tokens, channels, generator=g, device=device).to(dtype)

    def eager() -> Tensor:
        return leaves[1] * functional.layer_norm(leaves[0], (channels,), eps=1e-6)

    def exact() -> list[Tensor]:
        wide = [x.detach().float().requires_grad_() for x in leaves]
        out = gated_norm_reference(wide[0], wide[1], p=p, seed=7)
        return [out.detach(), *torch.autograd.grad(out, wide, grad.float())]

    seed = torch.tensor(7, device=device)
    ours = partial(gated_norm, leaves[0], leaves[1], p=p, seed=seed, backend=_ours(device))
    size = grad.element_size() * grad.numel()
    return Case(
        op="gated_norm",
        shape=f"T{tokens} C{channels} p{p}",
        dtype=dtype,
        leaves=leaves,
        grad=grad,
        variants={_ours(device): ours} | ({} if p else {"eager": eager}),
        exact=exact,
        forward=(0.0, 3 * size),
        backward=(0.0, 5 * size),
    )


def _gate_cases(device: torch.device, quick: bool) -> Makers:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        shapes = [(1 << 16, 50), (1 << 16, 256), (1 << 16, 1024)]
    else:
        shapes = [(1 << 11, 50)] if quick else [(14000, 50), (14000, 256)]
    return [partial(_gate, *shape, p, dtype, device) for shape in shapes for p in (0.0, 0.2)]


def _loss(tokens: int, items: int, negatives: int | None, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The loss of every position at temperature 0.05; `negatives` None is the full softmax."""
    g = _generator(device)
    unit = functional.normalize(torch.randn(tokens, width, generator=g, device=device), dim=1)
    users = unit.to(dtype).requires_grad_()
    table = torch.randn(items, width, generator=g, device=device).requires_grad_()
    targets = torch.randint(items, (tokens,), generator=g, device=device)
    rows = None if negatives is None else torch.randint(items, (negatives,), generator=g, device=device)
    weights = torch.rand(tokens, generator=g, device=device) / tokens

    def loss(backend: Literal["reference", "cpu", "triton"]) -> Tensor:
        # Plain torch multiplies like with like.
        named = table.to(dtype) if backend == "reference" else table
        return softmax_loss(users, targets, named, rows, temperature=0.05, weights=weights, backend=backend)

    def exact() -> list[Tensor]:
        wide = [x.detach().float().requires_grad_() for x in (users, table)]
        out = softmax_loss_reference(wide[0], targets, wide[1], rows, temperature=0.05, weights=weights)
        return [out.detach(), *torch.autograd.grad(out, wide)]

    count = items if negatives is None else negatives
    size = users.element_size() * width * (tokens + count) + 4 * tokens
    return Case(
        op="softmax_loss",
        shape=f"T{tokens} R{count}{' full' if negatives is None else ''} D{width}",
        dtype=dtype,
        leaves=[users, table],
        grad=torch.ones((), device=device),
        variants={_ours(device): partial(loss, _ours(device)), "eager": partial(loss, "reference")},
        exact=exact,
        forward=(0.0, size),
        backward=(0.0, 2 * size),
    )


def _loss_cases(device: torch.device, quick: bool) -> Makers:
    if device.type == "cuda":
        shapes = [(14000, 100_000, r, d) for r in (512, 4096, None) for d in (50, 64, 128, 256)]
        dtypes = [torch.bfloat16, torch.float32]
    else:
        dtypes = [torch.float32]
        shapes = [(512, 1000, 128, 50), (512, 1000, None, 50)]
        if not quick:
            shapes = [(14000, 27278, 512, 50), (14000, 27278, 4096, 50), (1000, 100_000, None, 50)]
    return [partial(_loss, *shape, dtype, device) for shape in shapes for dtype in dtypes]


CASES: Mapping[str, Callable[[torch.device, bool], Makers]] = {
    "hstu_attention": _attention_cases,
    "hstu_decode": _decode_cases,
    "gated_norm": _gate_cases,
    "softmax_loss": _loss_cases,
}
