"""Softmax loss over cosine similarities, sampled or full, with logits that are never stored.

    loss_t = −log( e^{s_t⁺} / (e^{s_t⁺} + Σ_{r: item r ≠ target t} e^{s_tr}) ),   s_tr = u_t·e_r / τ

with item vectors e of unit length; r runs over the negatives that the batch shares, or over the whole catalogue (the
full softmax). The loss of arXiv 2402.17152's public tables; that of SASRec with many negatives. With the log-sum-exp
L_t of the denominator and the probabilities p_tr = e^{s_tr − L_t}, and g the gradient of the losses,

    du_t = g_t/τ · (Σ_r p_tr e_r − (1 − p_t⁺) e⁺);   de_r = 1/τ · Σ_t g_t p_tr u_t    (and the positive's share)

The forward pass keeps a running maximum and sum over tiles of items (Milakov, Gimelshein: "Online normalizer
calculation for softmax", arXiv 1805.02867) and, beside it, Σ_r p_tr e_r, which the tile in hand gives for one more
product: the backward pass then computes the logits once more for de alone. Between the two passes O(T·D + R·D) is
kept, whatever T × R.

A position leaves out the negatives that equal its target. Negatives are sorted first, so these are neighbours, and
each position names them by two numbers; with the whole catalogue they are `target` and `target + 1`.

Legend: T positions, R negatives, N items of the table, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.softmax_loss_cpu import backward_cpu, forward_cpu
from retrieval.kernels.softmax_loss_reference import EPS, softmax_loss_reference

__all__ = ["softmax_loss"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MAX_TRITON_WIDTH = 256


def softmax_loss(
    users_TD: Tensor,
    targets: Tensor,
    item_table: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    backend: Backend = "auto",
) -> Tensor:
    """Loss of each position (formula above); differentiable in users and item table.

    Args:
        users_TD: user embeddings of unit length `[T, D]`: bfloat16, float16 or float32 (float64 but for "triton").
            Products are of this dtype, sums are float32. "triton" takes float32 products at the precision of
            `torch.get_float32_matmul_precision()`, and D ≤ 256.
        targets: rows of the items that came next, int64 `[T]`.
        item_table: unnormalised item table `[N, D]`, floating; the gradient goes through the normalisation.
        negatives: rows shared by all positions, int64 `[R]`, in any order, repeats count twice; None for the whole
            table. Rows outside the table are not looked for.
        temperature: τ > 0.
        backend: see `kernels.backend`.

    Returns:
        `[T]` losses, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or τ are not as above.
        ConfigError: the backend cannot run here.
    """
    _check(users_TD, targets, item_table, negatives, temperature)
    chosen = resolve_backend(backend, users_TD.device)
    if chosen == "triton" and (users_TD.dtype == torch.float64 or users_TD.shape[1] > _MAX_TRITON_WIDTH):
        described = f"{users_TD.dtype} of width {users_TD.shape[1]}"
        raise ValueError(f"softmax_loss: backend 'triton' does not take {described}")
    if chosen == "reference":
        out = softmax_loss_reference(users_TD, targets, item_table, negatives, temperature=temperature)
        return out.to(_wide(users_TD))
    items, wanted, first, last = _gather(targets, item_table, negatives)
    items, wanted = items.to(users_TD.dtype), wanted.to(users_TD.dtype)
    wide = _wide(users_TD)
    positive = (users_TD.to(wide) * wanted.to(wide)).sum(-1) / temperature
    with_mean = users_TD.requires_grad and torch.is_grad_enabled()
    losses: Tensor = _forward(users_TD, items, positive, first, last, 1 / temperature, with_mean, chosen)[0]
    return losses


def _gather(targets: Tensor, table: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors `[R, D]` to contrast with and `[T, D]` wanted, and the range of contrasts that each leaves out."""
    if negatives is None:
        items = functional.normalize(table, dim=-1, eps=EPS)
        first = targets.to(torch.int32)
        return items, functional.embedding(targets, items), first, first + 1
    negatives = negatives.sort().values
    # One look-up for both, so that the backward pass makes one gradient of the table's size. (On a GPU it sorts the
    # rows named, and needs no atomics.)
    rows = functional.embedding(torch.cat([targets, negatives]), table)
    unit = functional.normalize(rows, dim=-1, eps=EPS)
    wanted, items = unit.split([len(targets), len(negatives)])
    first = torch.searchsorted(negatives, targets, out_int32=True)
    return items, wanted, first, torch.searchsorted(negatives, targets, right=True, out_int32=True)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("retrieval::softmax_loss", mutates_args=())
def _forward(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    with_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Losses over the items but r in [first, last) and the positive logit, and expected items Σ_r p_r e_r."""
    if backend == "triton":
        from retrieval.kernels.softmax_loss_triton import forward_triton

        return forward_triton(users, items, positive, first, last, scale, with_mean)
    return forward_cpu(users, items, positive, first, last, scale, with_mean)


@_forward.register_fake
def _(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    with_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(positive), users.new_empty(users.shape[0] if with_mean else 0, users.shape[1])


@torch.library.custom_op("retrieval::softmax_loss_backward", mutates_args=())
def _backward(
    grad: Tensor, users: Tensor, items: Tensor, lse: Tensor, first: Tensor, last: Tensor, scale: float, backend: str
) -> Tensor:
    """Gradient of the items, `[R, D]`."""
    if backend == "triton":
        from retrieval.kernels.softmax_loss_triton import backward_triton

        return backward_triton(grad, users, items, lse, first, last, scale)
    return backward_cpu(grad, users, items, lse, first, last, scale)


@_backward.register_fake
def _(
    grad: Tensor, users: Tensor, items: Tensor, lse: Tensor, first: Tensor, last: Tensor, scale: float, backend: str
) -> Tensor:
    return items.new_empty(items.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    users, items, positive, first, last, ctx.scale, _, ctx.backend = inputs
    losses, mean = output
    ctx.mark_non_differentiable(mean)
    ctx.save_for_backward(users, items, positive, first, last, losses, mean)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    users, items, positive, first, last, losses, mean = ctx.saved_tensors
    dusers = ditems = None
    if ctx.needs_input_grad[0]:
        assert mean.shape[0] == users.shape[0], "the forward pass was told that users need no gradient"
        dusers = (mean * (ctx.scale * grad).unsqueeze(1)).to(users.dtype)
    if ctx.needs_input_grad[1]:
        ditems = _backward(grad, users, items, positive + losses, first, last, ctx.scale, ctx.backend)
    # −g·(1 − p⁺), which stays exact where p⁺ is nearly 1.
    return dusers, ditems, grad * torch.expm1(-losses), *([None] * 5)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _check(users: Tensor, targets: Tensor, table: Tensor, negatives: Tensor | None, temperature: float) -> None:
    if users.ndim != 2 or table.ndim != 2 or users.shape[1] != table.shape[1] or users.shape[1] == 0:
        raise ValueError(f"softmax_loss: users {tuple(users.shape)} and table {tuple(table.shape)} are not [·, D ≥ 1]")
    if users.dtype not in _DTYPES or table.dtype not in _DTYPES:
        raise ValueError(f"softmax_loss: users {users.dtype} or table {table.dtype} is no floating dtype")
    for name, rows in (("targets", targets), ("negatives", negatives)):
        if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
            raise ValueError(f"softmax_loss: {name} {tuple(rows.shape)} {rows.dtype} are not one axis of int64")
    if len(targets) != len(users):
        raise ValueError(f"softmax_loss: {len(targets)} targets for {len(users)} users")
    if not temperature > 0:
        raise ValueError(f"softmax_loss: temperature {temperature} is not positive")
