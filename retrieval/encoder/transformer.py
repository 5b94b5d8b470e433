"""A Transformer block with the layer norm first, for SASRec and BERT4Rec."""

from collections.abc import Callable

from torch import Tensor, nn

from retrieval.encoder.softmax_attention import softmax_attention
from retrieval.kernels.dropout import dropout

__all__ = ["TransformerBlock"]


class TransformerBlock(nn.Module):
    """x + MHA(LN(x)), then x + FFN(LN(x)), on jagged batches.

    Args:
        width: D.
        num_heads: heads; they divide D.
        hidden: width inside the feed-forward network.
        dropout: probability, after attention and inside and after the network.
        causal: whether a token sees only itself and those before it.
        activation: of the network.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        dropout: float,
        *,
        causal: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.causal, self.activation = num_heads, dropout, causal, activation
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_TD: Tensor, offsets: Tensor) -> Tensor:
        """`[T, D]` → `[T, D]`."""
        q, k, v = self.qkv(self.attention_norm(x_TD)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = softmax_attention(q, k, v, offsets, causal=self.causal).flatten(1)
        x = x_TD + self._drop(self.output(attended))
        inner = self._drop(self.activation(self.expand(self.network_norm(x))))
        out: Tensor = x + self._drop(self.contract(inner))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, training=self.training)
