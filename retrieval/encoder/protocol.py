"""What every encoder of user histories is, whatever happens inside."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.config import EncoderConfig
from retrieval.kernels.dropout import dropout

__all__ = ["UserEncoder", "normalize"]


def normalize(x: Tensor) -> Tensor:
    """Scale vectors along the last axis to length 1 (cosine similarity's operands)."""
    return functional.normalize(x, dim=-1, eps=1e-6)


class UserEncoder(nn.Module):
    """Histories in, user embeddings of unit length out; an item scores u·e, e its normalised row of the item table.

    With popularity an item scores u·e + p, p its log popularity of late in units of the loss's temperature. What is
    served are then the vectors (u, 1) and (e, p), whose inner product that is.

    Rows of a batch do not depend on each other. Subclasses implement `_encode`; `last` may be overridden by something
    that computes less.

    Attributes:
        config: the encoder's shape.
        objective: how it learns: "next", by guessing the item after each token, or "cloze", by guessing masked items.
        item_embedding: the item table E, `[N, D]`.
        action_embedding: the table of actions, or None where they are not read.
        query_embedding: the table of actions that are asked for, or None where requests name none.
        side_embedding: the tables of all kinds beside the main series, end to end, or None where there are none.
        position_embedding: the table of positions, or None where there is none.
        popularity: p of each item, float32 `[N]`, set by training, not learned; None where scores have no such part.
    """

    objective: ClassVar[Literal["next", "cloze"]] = "next"

    def __init__(self, config: EncoderConfig, *, has_positions: bool = True) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.num_items, config.width)
        self.action_embedding = nn.Embedding(config.num_actions, config.width) if config.num_actions else None
        self.query_embedding = nn.Embedding(config.num_actions, config.width) if config.query_actions else None
        self.side_embedding = nn.Embedding(sum(config.kinds), config.width) if config.kinds else None
        self.position_embedding = nn.Embedding(config.positions, config.width) if has_positions else None
        self.popularity: Tensor | None
        self.register_buffer("popularity", torch.zeros(config.num_items) if config.popularity else None)
        # Where each kind's table begins; the main series has none.
        self.side_starts: Tensor
        self.register_buffer("side_starts", torch.tensor([0, 0, *config.kinds]).cumsum(0)[:-1], persistent=False)
        nn.init.trunc_normal_(self.item_embedding.weight, std=0.02)
        if self.position_embedding is not None:
            nn.init.xavier_normal_(self.position_embedding.weight)
        if self.action_embedding is not None:
            # Actions start without effect, so that one which training never meets has none when it is served.
            nn.init.zeros_(self.action_embedding.weight)
        if self.query_embedding is not None:
            nn.init.zeros_(self.query_embedding.weight)
        if self.side_embedding is not None:
            nn.init.trunc_normal_(self.side_embedding.weight, std=0.02)
            with torch.no_grad():  # What is not known starts without effect, too.
                self.side_embedding.weight[self.side_starts[1:]] = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.item_embedding.weight.device

    def forward(self, batch: JaggedTensors) -> Tensor:
        """User embeddings after every token, `[T, D]`; after an event whose action is a token of its own, that one."""
        if self.config.layout == "joined":
            return self.outputs(batch)
        tokens, last = batch.interleaved()
        return self.outputs(tokens).index_select(0, last)

    def outputs(self, tokens: JaggedTensors) -> Tensor:
        """Embeddings after every token as they are laid out, `[T, D]`.

        Interleaved, those at items know the item and not yet what was done with it: what ranking reads.
        """
        return self._encode(self._embed(self._look_up(tokens), tokens), tokens)

    def _encode(self, x_TD: Tensor, tokens: JaggedTensors) -> Tensor:
        """From x_0 to embeddings of unit length, `[T, D]`."""
        raise NotImplementedError

    def last(self, batch: JaggedTensors) -> Tensor:
        """User embeddings at the request that follows each row's last token, `[B, D]`: what serving asks for.

        Rows must not be empty. Evaluation mode.
        """
        out: Tensor = self(batch)
        return out[(batch.offsets[1:] - 1).to(out.device)]

    def item_vectors(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """What is served of items: embeddings of unit length, and p where there is popularity, `[N, D or D + 1]`.

        Args:
            rows: those items, as an index into the table; all by default.
        """
        vectors = normalize(self.item_embedding.weight[rows])
        return vectors if self.popularity is None else torch.cat([vectors, self.popularity[rows].unsqueeze(1)], 1)

    def user_vectors(self, users_BD: Tensor) -> Tensor:
        """What is served of users with these embeddings: the same, and 1 where there is popularity."""
        return users_BD if self.popularity is None else functional.pad(users_BD, (0, 1), value=1.0)

    def _look_up(self, batch: JaggedTensors) -> Tensor:
        """E_kind[id] of each token, `[T, D]`, E_0 the item table."""
        if self.side_embedding is None:
            items: Tensor = self.item_embedding(batch.items)
            return items
        assert batch.kinds is not None, "the encoder reads kinds of tokens that the batch does not have"
        main = batch.kinds == 0
        items = self.item_embedding(batch.items.masked_fill(~main, 0))
        side = self.side_embedding((batch.items + self.side_starts[batch.kinds]).masked_fill(main, 0))
        return torch.where(main.unsqueeze(1), items, side)

    def _embed(self, tokens_TD: Tensor, batch: JaggedTensors) -> Tensor:
        """x_0 = dropout((E_kind[id] + A[action] + Q[action asked for])·√D + P[position]), `[T, D]`.

        Interleaved, E[id] and A[action] are those of two tokens. The action asked for is that of the token's target.
        What it stands beside is known by then to later tokens, so nothing of the future is in it.
        """
        if batch.is_action is not None:
            assert self.action_embedding is not None
            actions_TD = self.action_embedding(batch.actions)
            tokens_TD = torch.where(batch.is_action.unsqueeze(1), actions_TD, tokens_TD)
        elif self.action_embedding is not None:
            tokens_TD = tokens_TD + self.action_embedding(batch.actions)
        if self.query_embedding is not None:
            assert batch.query_actions is not None, "the encoder is asked for actions that the batch does not name"
            tokens_TD = tokens_TD + self.query_embedding(batch.query_actions)
        x = tokens_TD * math.sqrt(self.config.width)
        if self.position_embedding is not None:
            x = x + self.position_embedding(batch.positions())
        return dropout(x, self.config.dropout, training=self.training)
