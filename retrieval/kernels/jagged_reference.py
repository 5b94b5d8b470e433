"""The operations of `jagged` row by row, in plain differentiable torch."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["jagged_to_padded_reference", "padded_to_jagged_reference"]


def jagged_to_padded_reference(values_TX: Tensor, offsets: Tensor, max_length: int, fill: float = 0.0) -> Tensor:
    """As `jagged.jagged_to_padded`."""
    bounds = offsets.tolist()
    rows = [values_TX[start:end][:max_length] for start, end in pairwise(bounds)]
    after = [0, 0] * (values_TX.ndim - 1)
    padded = [functional.pad(row, (*after, 0, max_length - len(row)), value=fill) for row in rows]
    return torch.stack(padded) if padded else values_TX[:0].unsqueeze(1).expand(0, max_length, *values_TX.shape[1:])


def padded_to_jagged_reference(padded_BNX: Tensor, offsets: Tensor) -> Tensor:
    """As `jagged.padded_to_jagged`."""
    after = [0, 0] * (padded_BNX.ndim - 2)
    longest = padded_BNX.shape[1]
    values = [padded_BNX[:0].flatten(0, 1)]
    for row, length in zip(padded_BNX, offsets.diff().tolist(), strict=True):
        values.append(functional.pad(row[:length], (*after, 0, max(0, length - longest))))
    return torch.cat(values)
