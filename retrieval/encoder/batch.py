"""A jagged batch as tensors on a device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrieval.types import JaggedBatch

__all__ = ["JaggedTensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JaggedTensors:
    """`types.JaggedBatch` as int64 tensors; `offsets` stays on the CPU, the rest is on the encoder's device.

    Attributes:
        is_action: which tokens are the action of the event before them, bool `[T]`; None where items and actions are
            not interleaved.
    """

    offsets: Tensor
    items: Tensor
    actions: Tensor
    timestamps: Tensor
    query_times: Tensor
    query_actions: Tensor | None = None
    kinds: Tensor | None = None
    is_action: Tensor | None = None

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

    def interleaved(self) -> tuple["JaggedTensors", Tensor]:
        """Each event as two tokens, its item and then its action; tokens of other kinds stay one.

        The next item is asked for at the action, when all of the event is known. What an item is followed by is its own
        action, which is asked for at the event's own time and for no action.

        Returns:
            The tokens, and the place among them of each token's last part, int64 `[T]`.
        """
        places = torch.arange(len(self.items), device=self.items.device)
        parts = torch.full_like(places, 2) if self.kinds is None else 2 - (self.kinds != 0).long()
        until = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
        source = torch.repeat_interleave(places, parts)
        last = until[1:] - 1
        is_last = torch.zeros(len(source), dtype=torch.bool, device=source.device).index_fill(0, last, True)
        asked = None if self.query_actions is None else self.query_actions[source].masked_fill(~is_last, 0)
        tokens = replace(
            self,
            offsets=until.cpu()[self.offsets],
            items=self.items[source],
            actions=self.actions[source],
            timestamps=self.timestamps[source],
            query_times=torch.where(is_last, self.query_times[source], self.timestamps[source]),
            query_actions=asked,
            kinds=None if self.kinds is None else self.kinds[source],
            is_action=is_last & (parts[source] == 2),
        )
        return tokens, last

    def positions(self) -> Tensor:
        """Place of each token in its row, int64 `[T]`."""
        starts = torch.repeat_interleave(self.offsets[:-1], self.offsets.diff())
        return (torch.arange(len(starts)) - starts).to(self.items.device)
