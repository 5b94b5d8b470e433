"""GRU4Rec (Hidasi et al.: "Session-based recommendations with recurrent neural networks", ICLR 2016)."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import GRU4RecConfig
from retrieval.encoder.protocol import UserEncoder, normalize

__all__ = ["GRU4RecEncoder"]


class GRU4RecEncoder(UserEncoder):
    """A GRU over the items, projected to the item table's width; no positions and no times."""

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__(config, has_positions=False)
        between = config.dropout if config.num_layers > 1 else 0.0
        self.gru = nn.GRU(config.width, config.hidden, config.num_layers, dropout=between)
        self.output = nn.Linear(config.hidden, config.width)

    def _encode(self, x_TD: Tensor, tokens: JaggedTensors) -> Tensor:
        order, sizes = _time_major(tokens.offsets)
        if not len(order):
            return normalize(self.output(x_TD.new_empty(0, self.gru.hidden_size)))
        order = order.to(x_TD.device)
        packed, _ = self.gru(PackedSequence(x_TD[order], sizes))
        states = torch.empty_like(packed.data).index_copy(0, order, packed.data)
        return normalize(self.output(states))


def _time_major(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The order that packs a jagged batch for a recurrent network, and how many rows are alive at each place."""
    lengths = offsets.diff()
    longest_first = lengths.argsort(descending=True, stable=True)
    place = torch.arange(int(lengths.max()) if len(lengths) else 0)
    alive = place.unsqueeze(1) < lengths[longest_first]
    tokens = offsets[longest_first] + place.unsqueeze(1)
    return tokens[alive], alive.sum(1)
