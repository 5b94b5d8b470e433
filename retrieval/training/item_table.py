"""Item embeddings made of the item's own and those of its attributes, while they are learned.

With E the id table, F_i the features of item i and A their table, v_i the vectors that came with it, each of length 1
or 0, and W their projection

    e_i = m_i·E_i + (1 / |F_i|) Σ_{f ∈ F_i} A_f + v_i·W,
    m_i = 0 where the item is rare or, in a step, its id is dropped.

The encoder and the loss see e alone. When learning is done e takes the place of E in the encoder that is kept: an item
that no event has shown has its embedding there, and serving is what it is without attributes.

Legend: N items, U rows that a step names, V numbers of an item's vectors, D width.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from retrieval.data.item_features import ItemFeatures, ItemFeatureSchema

__all__ = ["ItemTable"]


class ItemTable(nn.Module):
    """The table A, the projection W and which items have embeddings of their own.

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
        self.projection: nn.Parameter | None = None
        if features.vectors.shape[1]:
            # A vector of length 1 then begins as large as a row of the table.
            self.projection = nn.Parameter(torch.empty(features.vectors.shape[1], width))
            nn.init.trunc_normal_(self.projection, std=0.02)
        self.offsets: Tensor
        self.features: Tensor
        self.vectors: Tensor
        self.admitted: Tensor
        self.described: Tensor
        for name, tensor in (
            ("offsets", torch.from_numpy(features.offsets)),
            ("features", torch.from_numpy(features.features)),
            ("vectors", torch.from_numpy(features.vectors)),
            ("admitted", torch.from_numpy(item_counts >= schema.min_count)),
            ("described", torch.from_numpy((np.diff(features.offsets) > 0) | features.vectors.any(1))),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, ids_UD: Tensor, rows: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """E of the rows named, int64 `[U]`, or of all; `ids_UD` is E there. With a generator ids are dropped."""
        keep = _at(self.admitted, rows)
        if generator is not None:
            drawn = torch.rand(len(keep), generator=generator) >= self._id_dropout
            # An item without features keeps its id: nothing else makes it.
            keep = keep & (drawn.to(keep.device) | ~_at(self.described, rows))
        table_UD = ids_UD * keep.unsqueeze(1)
        if len(self.weight):
            features, offsets = self._features_of(rows)
            table_UD = table_UD + functional.embedding_bag(
                features, self.weight, offsets, mode="mean", include_last_offset=True
            )
        if self.projection is not None:
            table_UD = table_UD + _at(self.vectors, rows) @ self.projection
        return table_UD

    def _features_of(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of the items named, end to end, and where each item's begin and the last one's end."""
        if rows is None:
            return self.features, self.offsets
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = functional.pad(lengths.cumsum(0), (1, 0))
        shifts = torch.repeat_interleave(starts - offsets[:-1], lengths)
        return self.features[torch.arange(len(shifts), device=shifts.device) + shifts], offsets


def _at(field: Tensor, rows: Tensor | None) -> Tensor:
    return field if rows is None else field[rows]
