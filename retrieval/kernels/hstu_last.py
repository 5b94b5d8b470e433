"""All layers of an HSTU encoder for the last token of each row, fused: what a server computes for a history.

    U, V, Q, K = split(SiLU(LN(x) W))
    x ← x + W_o (U ⊙ LN(attention(Q, K, V))) + b        for each layer; then x at each row's last token

with the attention of `hstu_attention`, causal and without window. The last layer needs keys and values of all tokens,
but the query, gate and output of one. Source: arXiv 2402.17152, equations 1–3.

On a CPU the layers of one row follow each other in the cache; that takes half the time of one operation after the
other on a whole batch, and a third for a single row. There is no fused way on a GPU, nor for other types than float32.

Legend: B rows, T tokens in the batch, D width, H heads, Q query/key width, V value width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retrieval.kernels import hstu_last_native as native
from retrieval.kernels.hstu_last_reference import LayerWeights
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

__all__ = ["LayerWeights", "fits", "hstu_last"]


def fits(x_TD: Tensor) -> bool:
    """Whether `hstu_last` does these tokens: float32 on a CPU that has the compiled library, outside torch.compile."""
    if torch.compiler.is_compiling() or x_TD.device.type != "cpu" or x_TD.dtype != torch.float32:
        return False
    return native.available()


def hstu_last(
    x_TD: Tensor,
    layers: Sequence[LayerWeights],
    where: tuple[Tensor, Tensor, Tensor],
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    norm: float | None,
) -> Tensor:
    """Outputs of the last layer at each row's last token (formula above). Inference only.

    Args:
        x_TD: tokens, float32 `[T, D]` on the CPU.
        layers: weights, at least one layer's.
        where: offsets of the rows, int64 `[B + 1]`, none of which is empty; seconds of each token and of what is asked
            after it, int64 `[T]`, as in `hstu_attention`.
        heads: H.
        qk_dim: Q.
        v_dim: V.
        norm: what sums over keys are divided by; None divides by the number of visible keys.

    Returns:
        `[B, D]`.

    Raises:
        ValueError: shapes or dtypes do not fit each other, a row is empty or longer than a position table, or an input
            wants a gradient.
    """
    _check(x_TD, layers, where, heads * qk_dim, heads * v_dim)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (x_TD, *sum(layers, ()))):
        raise ValueError("hstu_last: has no gradient; call it under torch.no_grad() or torch.inference_mode()")
    return native.hstu_last_native(x_TD, layers, where, heads=heads, qk_dim=qk_dim, v_dim=v_dim, norm=norm)


def _check(
    x: Tensor, layers: Sequence[LayerWeights], where: tuple[Tensor, Tensor, Tensor], query: int, value: int
) -> None:
    if x.ndim != 2 or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"hstu_last: x {tuple(x.shape)} {x.dtype} on {x.device.type} is not float32 [T, D] on the CPU")
    width, (offsets, *times) = x.shape[1], where
    if any(t.shape != x.shape[:1] or t.dtype != torch.int64 for t in times):
        raise ValueError(f"hstu_last: times are not int64 of {x.shape[0]} tokens")
    lengths = offsets.diff().tolist()
    if offsets.dtype != torch.int64 or min(lengths, default=1) < 1 or sum(lengths) != x.shape[0]:
        raise ValueError(f"hstu_last: offsets are not int64 of rows that are not empty and hold {x.shape[0]} tokens")
    longest = max(lengths, default=0)
    shapes = [(width, 2 * value + 2 * query), (width, value), (width,)]
    for layer in layers:
        if [tuple(tensor.shape) for tensor in layer[:3]] != shapes or any(t.dtype != x.dtype for t in layer[:3]):
            raise ValueError(f"hstu_last: weights are not float32 of the shapes {shapes}")
        if layer.pos_table is not None and len(layer.pos_table) < longest:
            raise ValueError(f"hstu_last: pos_table {tuple(layer.pos_table.shape)} is too short for a row of {longest}")
        if layer.time_table is not None and layer.time_table.shape != (NUM_TIME_BUCKETS,):
            raise ValueError(f"hstu_last: time_table {tuple(layer.time_table.shape)} is not ({NUM_TIME_BUCKETS},)")
