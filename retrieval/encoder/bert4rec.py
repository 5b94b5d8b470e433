"""BERT4Rec (Sun et al.: "Sequential recommendation with bidirectional encoder representations", CIKM 2019)."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import BERT4RecConfig
from retrieval.encoder.protocol import UserEncoder, normalize
from retrieval.encoder.transformer import TransformerBlock

__all__ = ["BERT4RecEncoder"]


class BERT4RecEncoder(UserEncoder):
    """Transformer blocks that see both ways; learns by guessing masked items.

    Item row `num_items`, one past the table, stands for a masked item. A user's embedding is that of a mask put after
    the history.
    """

    objective: ClassVar[Literal["next", "cloze"]] = "cloze"

    def __init__(self, config: BERT4RecConfig) -> None:
        super().__init__(config)
        self.mask_embedding = nn.Parameter(torch.empty(config.width))
        nn.init.trunc_normal_(self.mask_embedding, std=0.02)
        shape = (config.width, config.num_heads, config.hidden, config.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(*shape, causal=False, activation=functional.gelu) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, batch: JaggedTensors) -> Tensor:
        """Embeddings at every token, `[T, D]`; at a masked one, of what may stand there."""
        masked = batch.items == self.config.num_items
        items = self.item_embedding(batch.items.masked_fill(masked, 0))
        x = self._embed(torch.where(masked.unsqueeze(1), self.mask_embedding, items), batch)
        for block in self.blocks:
            x = block(x, batch.offsets)
        return normalize(self.norm(x))

    def last(self, batch: JaggedTensors) -> Tensor:
        """Embeddings of a mask after each row, `[B, D]`; rows of the full length give up their first event for it."""
        appended = self._with_mask(batch)
        out: Tensor = self(appended)
        return out[(appended.offsets[1:] - 1).to(out.device)]

    def _with_mask(self, batch: JaggedTensors) -> JaggedTensors:
        lengths = batch.offsets.diff()
        kept = lengths.clamp(max=self.config.max_length - 1)
        offsets = torch.cat([batch.offsets[:1], (kept + 1).cumsum(0)])
        last = (offsets[1:] - 1).to(self.device)
        # Each token from the one that stands as far from the row's end; the mask first stands for the last event.
        shift = torch.repeat_interleave(batch.offsets[1:] - offsets[1:] + 1, kept + 1)
        index = (torch.arange(len(shift)) + shift).to(self.device)
        index[last] -= 1
        ends = batch.query_times[index[last]]
        return replace(
            batch,
            offsets=offsets,
            items=batch.items[index].index_fill(0, last, self.config.num_items),
            actions=batch.actions[index].index_fill(0, last, 0),
            timestamps=batch.timestamps[index].index_copy(0, last, ends),
            query_times=batch.query_times[index].index_copy(0, last, ends),
        )
