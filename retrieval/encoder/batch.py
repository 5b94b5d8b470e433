"""A jagged batch as tensors on a device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.types import JaggedBatch

__all__ = ["JaggedTensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JaggedTensors:
    """`types.JaggedBatch` as int64 tensors; `offsets` stays on the CPU, the rest is on the encoder's device."""

    offsets: Tensor
    items: Tensor
    actions: Tensor
    timestamps: Tensor
    query_times: Tensor
    query_actions: Tensor | None = None
    kinds: Tensor | None = None

    @classmethod
    def of(cls, batch: JaggedBatch, device: torch.device) -> "JaggedTensors":
        """Copy a numpy batch to `device`."""
        return cls(
            offsets=torch.from_numpy(batch.offsets),
            items=torch.from_numpy(batch.items).to(device),
            actions=torch.from_numpy(batch.actions).to(device),
            timestamps=torch.from_numpy(batch.timestamps).to(device),
            query_times=torch.from_numpy(batch.query_times).to(device),
            query_actions=None if batch.query_actions is None else torch.from_numpy(batch.query_actions).to(device),
            kinds=None if batch.kinds is None else torch.from_numpy(batch.kinds).to(device),
        )

    def positions(self) -> Tensor:
        """Place of each token in its row, int64 `[T]`."""
        starts = torch.repeat_interleave(self.offsets[:-1], self.offsets.diff())
        return (torch.arange(len(starts)) - starts).to(self.items.device)
