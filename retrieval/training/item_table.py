"""Item embeddings made of the item's own and those of its attributes, while they are learned.

With E the id table, F_i the features of item i and A their table

    e_i = m_i·E_i + (1 / |F_i|) Σ_{f ∈ F_i} A_f,    m_i = 0 where the item is rare or, in a step, its id is dropped.

The encoder and the loss see e alone. When learning is done e takes the place of E in the encoder that is kept: an item
that no event has shown has its embedding there, and serving is what it is without attributes.

Legend: N items, U rows that a step names, D width.
"""

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from retrieval.data.item_features import ItemFeatures, ItemFeatureSchema

__all__ = ["ItemTable"]


class ItemTable(nn.Module):
    """The table A and which items have embeddings of their own.

    Args:
        features: of every item.
        schema: dropout and admission.
        item_counts: training events of each item, int64 `[N]`.
        width: D.
    """

    def __init__(self, features: ItemFeatures, schema: ItemFeatureSchema, item_counts: NDArray, width: int) -> None:
        super().__init__()
        self._id_dropout = schema.id_dropout
        self.weight = nn.Parameter(torch.empty(features.size, width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.offsets: Tensor
        self.features: Tensor
        self.admitted: Tensor
        for name, tensor in (
            ("offsets", torch.from_numpy(features.offsets)),
            ("features", torch.from_numpy(features.features)),
            ("admitted", torch.from_numpy(item_counts >= schema.min_count)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, ids_UD: Tensor, rows: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """E of the rows named, int64 `[U]`, or of all; `ids_UD` is E there. With a generator ids are dropped."""
        keep = self.admitted if rows is None else self.admitted[rows]
        offsets, features = self.offsets, self.features
        lengths = offsets.diff() if rows is None else offsets[rows + 1] - offsets[rows]
        if generator is not None:
            drawn = torch.rand(len(keep), generator=generator) >= self._id_dropout
            # An item without features keeps its id: nothing else makes it.
            keep = keep & (drawn.to(keep.device) | (lengths == 0))
        if rows is not None:
            starts = offsets[rows]
            offsets = functional.pad(lengths.cumsum(0), (1, 0))
            shifts = torch.repeat_interleave(starts - offsets[:-1], lengths)
            features = features[torch.arange(len(shifts), device=shifts.device) + shifts]
        described = functional.embedding_bag(features, self.weight, offsets, mode="mean", include_last_offset=True)
        return ids_UD * keep.unsqueeze(1) + described
