"""Softmax loss over cosine similarities, sampled or full, with logits that are never stored.

    loss = Σ_t w_t · −log( e^{s_t⁺} / (e^{s_t⁺} + Σ_{r: item r ≠ target t} e^{s_tr}) ),   s_tr = u_t·e_r / τ + b_r

with item vectors e of unit length; r runs over the negatives that the batch shares, over negatives of the position's
own (`softmax_loss_rows.py`), or over the whole catalogue (the full softmax). The loss of arXiv 2402.17152's public
tables; that of SASRec with many negatives. With the log-sum-exp L_t of the denominator and p_tr = e^{s_tr − L_t},

    du_t = w_t/τ · (Σ_r p_tr e_r − (1 − p_t⁺) e⁺);   de_r = 1/τ · Σ_t w_t p_tr u_t    (and the positive's share)

The sum is a scalar so that its gradients are known but for one factor when it is computed: the forward pass computes
both sums above while the logits are at hand, and the backward pass multiplies. Kept between the passes is
O(T·D + R·D), whatever T × R.

A position leaves out the negatives that equal its target. Shared negatives are sorted first, so these are neighbours,
and each position names them by two numbers; with the whole catalogue they are `target` and `target + 1`.

Legend: T positions, R negatives, N items of the table, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.softmax_loss_cpu import forward_cpu
from retrieval.kernels.softmax_loss_reference import EPS, softmax_loss_reference
from retrieval.kernels.softmax_loss_rows import forward_rows

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
    weights: Tensor | None = None,
    negative_bias: Tensor | None = None,
    positive_bias: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sum of the positions' losses (formula above); differentiable in users and item table.

    Args:
        users_TD: user embeddings of unit length `[T, D]`: bfloat16, float16 or float32 (float64 but for "triton").
            Products are of this dtype, sums are float32; with negatives of the position's own all is float32.
            "triton" takes float32 products at the precision of `torch.get_float32_matmul_precision()`, and D ≤ 256.
        targets: rows of the items that came next, int64 `[T]`.
        item_table: unnormalised item table `[N, D]`, floating; the gradient goes through the normalisation.
        negatives: rows shared by all positions, int64 `[R]`, or of each position's own `[T, R]`, in any order, repeats
            count twice; None for the whole table. Rows outside the table are not looked for.
        temperature: τ > 0.
        weights: w, floating `[T]`; None for ones. A constant.
        negative_bias: b, added to the logits of the negatives, floating, of the shape of `negatives`. A constant.
        positive_bias: added to the logits of the targets, floating `[T]`. A constant.
        backend: see `kernels.backend`. Negatives of the position's own take the same torch operations on "cpu" and
            "triton".

    Returns:
        A scalar, float32 (float64 for float64); 0 for no positions.

    Raises:
        ValueError: shapes, dtypes or τ are not as above.
        ConfigError: the backend cannot run here.
    """
    _check(users_TD, targets, item_table, negatives, temperature)
    _check_constants(targets, negatives, weights, negative_bias, positive_bias)
    chosen = resolve_backend(backend, users_TD.device)
    if chosen == "triton" and (users_TD.dtype == torch.float64 or users_TD.shape[1] > _MAX_TRITON_WIDTH):
        described = f"{users_TD.dtype} of width {users_TD.shape[1]}"
        raise ValueError(f"softmax_loss: backend 'triton' does not take {described}")
    wide = torch.float64 if users_TD.dtype == torch.float64 else torch.float32
    constants = {"weights": weights, "negative_bias": negative_bias, "positive_bias": positive_bias}
    if chosen == "reference":
        out = softmax_loss_reference(users_TD, targets, item_table, negatives, temperature=temperature, **constants)
        return out.to(wide)
    weights = users_TD.new_ones(targets.shape[0], dtype=wide) if weights is None else weights.to(wide)
    bias = users_TD.new_empty(0, dtype=wide) if negative_bias is None else negative_bias.to(wide)
    if negatives is not None and negatives.ndim == 1:
        negatives, order = negatives.sort()
        bias = bias[order] if bias.numel() else bias
    items, wanted, from_, to = _gather(targets, item_table, negatives)
    items, wanted = items.to(users_TD.dtype), wanted.to(users_TD.dtype)
    positive = (users_TD.to(wide) * wanted.to(wide)).sum(-1) / temperature
    if positive_bias is not None:
        positive = positive + positive_bias.to(wide)
    with_gradients = torch.is_grad_enabled() and (users_TD.requires_grad or items.requires_grad)
    kind = "rows" if from_.ndim == 2 else chosen
    total: Tensor = _forward(
        users_TD, items, positive, bias, from_, to, weights, 1 / temperature, with_gradients, kind
    )[0]
    return total


def _gather(targets: Tensor, table: Tensor, negatives: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors to contrast with `[R, D]` and wanted `[T, D]`, and two numbers per position.

    These are the range of contrasts that it leaves out. With negatives of the position's own: its contrasts, `[T, R]`,
    and the one that it leaves out. Shared negatives are sorted already.
    """
    if negatives is None or negatives.ndim == 2:
        items = functional.normalize(table, dim=-1, eps=EPS)
        wanted = functional.embedding(targets, items)
        if negatives is not None:
            return items, wanted, negatives, targets
        first = targets.to(torch.int32)
        return items, wanted, first, first + 1
    # One look-up for both, so that the backward pass makes one gradient of the table's size. (On a GPU it sorts the
    # rows named, and needs no atomics.)
    rows = functional.embedding(torch.cat([targets, negatives]), table)
    unit = functional.normalize(rows, dim=-1, eps=EPS)
    wanted, items = unit.split([targets.shape[0], negatives.shape[0]])
    first = torch.searchsorted(negatives, targets, out_int32=True)
    return items, wanted, first, torch.searchsorted(negatives, targets, right=True, out_int32=True)


@torch.library.custom_op("retrieval::softmax_loss", mutates_args=())
def _forward(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    bias: Tensor,
    from_: Tensor,
    to: Tensor,
    weights: Tensor,
    scale: float,
    with_gradients: bool,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, the positions' losses `[T]`, Σ_r p_tr e_r `[T, D]` and Σ_t w_t p_tr u_t `[R, D]`, sums in float32.

    `from_` and `to` are what `_gather` tells of the positions. The last two are empty without gradients.
    """
    inputs = (users, items, positive, bias, from_, to, weights, scale, with_gradients)
    if kind == "rows":
        losses, mean, shares = forward_rows(*inputs)
    elif kind == "triton":
        from retrieval.kernels.softmax_loss_triton import forward_triton

        losses, mean, shares = forward_triton(*inputs)
    else:
        losses, mean, shares = forward_cpu(*inputs)
    return (losses * weights).sum(), losses, mean, shares


@_forward.register_fake
def _(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    bias: Tensor,
    from_: Tensor,
    to: Tensor,
    weights: Tensor,
    scale: float,
    with_gradients: bool,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = users.shape[1]
    mean, shares = (positive.new_empty(x.shape[0] if with_gradients else 0, width) for x in (users, items))
    return positive.new_empty(()), torch.empty_like(positive), mean, shares


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    users, _, _, _, _, _, weights, ctx.scale, ctx.complete, _ = inputs
    _, losses, mean, shares = output
    ctx.dtype = users.dtype
    ctx.mark_non_differentiable(losses, mean, shares)
    ctx.save_for_backward(weights, losses, mean, shares)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    weights, losses, mean, shares = ctx.saved_tensors
    weights = weights * grad
    # −w·(1 − p⁺), which stays exact where p⁺ is nearly 1.
    dpositive = weights * torch.expm1(-losses)
    if not ctx.complete:  # neither users nor items want a gradient
        return None, None, dpositive, *([None] * 7)
    dusers = (mean * (ctx.scale * weights).unsqueeze(1)).to(ctx.dtype)
    return dusers, (shares * (ctx.scale * grad)).to(ctx.dtype), dpositive, *([None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _check(users: Tensor, targets: Tensor, table: Tensor, negatives: Tensor | None, temperature: float) -> None:
    if users.ndim != 2 or table.ndim != 2 or users.shape[1] != table.shape[1] or users.shape[1] == 0:
        raise ValueError(f"softmax_loss: users {tuple(users.shape)} and table {tuple(table.shape)} are not [·, D ≥ 1]")
    if users.dtype not in _DTYPES or table.dtype not in _DTYPES:
        raise ValueError(f"softmax_loss: users {users.dtype} or table {table.dtype} is no floating dtype")
    for name, rows, axes in (("targets", targets, (1,)), ("negatives", negatives, (1, 2))):
        if rows is not None and (rows.ndim not in axes or rows.dtype != torch.int64):
            wanted = "one axis" if axes == (1,) else "one or two axes"
            raise ValueError(f"softmax_loss: {name} {tuple(rows.shape)} {rows.dtype} are not {wanted} of int64")
    if negatives is not None and negatives.ndim == 2 and negatives.shape[0] != targets.shape[0]:
        raise ValueError(f"softmax_loss: negatives of {negatives.shape[0]} positions for {targets.shape[0]} targets")
    if targets.shape[0] != users.shape[0]:
        raise ValueError(f"softmax_loss: {targets.shape[0]} targets for {users.shape[0]} users")
    if not temperature > 0:
        raise ValueError(f"softmax_loss: temperature {temperature} is not positive")


def _check_constants(
    targets: Tensor,
    negatives: Tensor | None,
    weights: Tensor | None,
    negative_bias: Tensor | None,
    positive_bias: Tensor | None,
) -> None:
    if negative_bias is not None and (negatives is None or negative_bias.shape != negatives.shape):
        shape = None if negatives is None else tuple(negatives.shape)
        raise ValueError(f"softmax_loss: negative_bias {tuple(negative_bias.shape)} for negatives {shape}")
    for name, values in (("weights", weights), ("positive_bias", positive_bias)):
        if values is not None and values.shape != targets.shape:
            raise ValueError(f"softmax_loss: {name} {tuple(values.shape)} for {targets.shape[0]} targets")
