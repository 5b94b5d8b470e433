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
        super().__init__(config, positions=config.max_length)
        shape = (config.width, config.num_heads, config.hidden, config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(*shape, causal=True, activation=functional.relu) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, batch: JaggedTensors) -> Tensor:
        """User embeddings after every token, `[T, D]`."""
        x = self._embed(self._look_up(batch), batch)
        for block in self.blocks:
            x = block(x, batch.offsets)
        return normalize(self.norm(x))
