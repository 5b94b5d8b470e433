"""The HSTU user encoder and its item table."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.layer import HSTULayer
from retrieval.kernels.backend import Backend
from retrieval.kernels.hstu_attention import AttentionPlan, plan_attention

__all__ = ["HSTUEncoder", "normalize"]


def normalize(x: Tensor) -> Tensor:
    """Scale vectors along the last axis to length 1 (cosine similarity's operands)."""
    return functional.normalize(x, dim=-1, eps=1e-6)


class HSTUEncoder(nn.Module):
    """Histories in, one embedding per token out (arXiv 2402.17152).

        x_0 = dropout((E[item] + A[action]) · √D + P[position]);  x_{l+1} = layer_l(x_l);  u = x_L / |x_L|

    u at a token is the user's embedding just after that event, for a request at the token's query time. Candidates
    are scored by u·e with e the normalised row of the same item table E.
    """

    def __init__(self, config: HSTUConfig, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        # Which kernels run is a matter of the machine, not of the model: it is not saved with the weights.
        self.backend: Backend = backend
        self.item_embedding = nn.Embedding(config.num_items, config.width)
        self.action_embedding = nn.Embedding(config.num_actions, config.width) if config.num_actions else None
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        nn.init.trunc_normal_(self.item_embedding.weight, std=0.02)
        nn.init.xavier_normal_(self.position_embedding.weight)
        if self.action_embedding is not None:
            # Actions start without effect, so that one which training never meets has none when it is served.
            nn.init.zeros_(self.action_embedding.weight)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.item_embedding.weight.device

    def forward(self, batch: JaggedTensors) -> Tensor:
        """User embeddings of unit length after every token, `[T, D]`."""
        x = self._embed(batch)
        plan = self._plan(batch, len(self.layers))
        for layer in self.layers:
            x = layer(x, plan)
        return normalize(x)

    def last(self, batch: JaggedTensors) -> Tensor:
        """User embeddings of unit length after each row's last token, `[B, D]`: what serving asks for.

        Equal to `forward` at those tokens up to rounding; the last layer computes one query per row. Rows must not be
        empty. Evaluation mode and no gradient.
        """
        x = self._embed(batch)
        plan = self._plan(batch, len(self.layers) - 1)
        for layer in self.layers[:-1]:
            x = layer(x, plan)
        final = self.layers[-1]
        assert isinstance(final, HSTULayer)
        return normalize(final.last(x, plan))

    def _plan(self, batch: JaggedTensors, full_layers: int) -> AttentionPlan:
        """Prepare what that many layers of attention between all tokens share."""
        time_bias = self.config.time_bias and full_layers > 0
        where = (batch.offsets, batch.timestamps, batch.query_times)
        return plan_attention(*where, time_bias=time_bias, backend=self.backend)

    def _embed(self, batch: JaggedTensors) -> Tensor:
        """x_0, `[T, D]`."""
        tokens = self.item_embedding(batch.items)
        if self.action_embedding is not None:
            tokens = tokens + self.action_embedding(batch.actions)
        x = tokens * math.sqrt(self.config.width) + self.position_embedding(batch.positions())
        return functional.dropout(x, self.config.dropout, self.training)

    def item_vectors(self) -> Tensor:
        """Item embeddings of unit length, `[N, D]`."""
        return normalize(self.item_embedding.weight)
