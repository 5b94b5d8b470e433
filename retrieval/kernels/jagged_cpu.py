"""`jagged` by one gather, which leaves the device's own indexing kernels to do the copying."""

import torch
from torch import Tensor

__all__ = ["jagged_to_padded_cpu", "padded_to_jagged_cpu"]


def jagged_to_padded_cpu(values_TC: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    """See `jagged.jagged_to_padded`; one axis of channels."""
    place = torch.arange(max_length).unsqueeze(0)
    inside = place < offsets.diff().unsqueeze(1)
    out = values_TC.new_full((*inside.shape, values_TC.shape[1]), fill)
    out[inside] = values_TC[(offsets[:-1].unsqueeze(1) + place)[inside]]
    return out


def padded_to_jagged_cpu(padded_BNC: Tensor, offsets: Tensor, total: int) -> Tensor:
    """See `jagged.padded_to_jagged`; one axis of channels."""
    place = torch.arange(padded_BNC.shape[1]).unsqueeze(0)
    inside = place < offsets.diff().unsqueeze(1)
    out = padded_BNC.new_zeros(total, padded_BNC.shape[2])
    out[(offsets[:-1].unsqueeze(1) + place)[inside]] = padded_BNC[inside]
    return out
