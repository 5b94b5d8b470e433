"""`hstu_last` in plain torch: every layer for every token, of which the last of each row is kept."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from retrieval.kernels.gated_norm_reference import EPS, gated_norm_reference
from retrieval.kernels.hstu_attention_reference import hstu_attention_reference

__all__ = ["LayerWeights", "hstu_last_reference"]


class LayerWeights(NamedTuple):
    """Weights of one layer.

    Attributes:
        uvqk: W, `[D, 2·H·V + 2·H·Q]`.
        weight: W_o, `[D, H·V]`.
        bias: b, `[D]`.
        pos_table: bias of distance in positions, `[P]`; None for no such bias.
        time_table: bias of time bucket, `[129]`; None for no such bias.
    """

    uvqk: Tensor
    weight: Tensor
    bias: Tensor
    pos_table: Tensor | None
    time_table: Tensor | None


def hstu_last_reference(
    x_TD: Tensor,
    layers: Sequence[LayerWeights],
    where: tuple[Tensor, Tensor, Tensor],
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    norm: float | None,
) -> Tensor:
    """As `hstu_last`; any floating dtype."""
    value, query = heads * v_dim, heads * qk_dim
    for layer in layers:
        normed = functional.layer_norm(x_TD, x_TD.shape[-1:], eps=EPS)
        u, v, q, k = functional.silu(normed @ layer.uvqk).split((value, value, query, query), dim=-1)
        attended = hstu_attention_reference(
            q.unflatten(-1, (heads, qk_dim)),
            k.unflatten(-1, (heads, qk_dim)),
            v.unflatten(-1, (heads, v_dim)),
            *where,
            pos_table=layer.pos_table,
            time_table=layer.time_table,
            norm=norm,
        )
        gated = gated_norm_reference(attended.flatten(1), u, p=0.0, seed=0)
        x_TD = x_TD + gated @ layer.weight.T + layer.bias
    return x_TD[where[0][1:] - 1]
