"""SASRec (Kang, McAuley: "Self-attentive sequential recommendation", ICDM 2018)."""

from torch import Tensor, nn
from torch.nn import functional

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import SASRecConfig
from retrieval.encoder.protocol import UserEncoder, normalize
from retrieval.encoder.transformer import TransformerBlock

__all__ = ["SASRecEncoder"]


class SASRecEncoder(UserEncoder):
    """Causal Transformer blocks over items and learned positions; output of unit length, as all encoders here."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        shape = (config.width, config.num_heads, config.hidden, config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(*shape, causal=True, activation=functional.relu) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def _encode(self, x_TD: Tensor, tokens: JaggedTensors) -> Tensor:
        for block in self.blocks:
            x_TD = block(x_TD, tokens.offsets)
        return normalize(self.norm(x_TD))
