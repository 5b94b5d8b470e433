"""Does a model, or the way its input is made, see what it is asked for?"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from retrieval.data.sequences import TrainingBatch
from retrieval.types import EventColumns, SideRows

__all__ = ["Leak", "assert_no_leak"]

Gather = Callable[[EventColumns, SideRows | None], TrainingBatch]
"""One user's events, and what stands beside them, as a training batch that holds all of it."""


class Leak(AssertionError):
    """A position's output depends on its target or on what came later."""


def assert_no_leak(
    encode: Callable[[TrainingBatch], Tensor],
    gather: Gather,
    events: EventColumns,
    side: SideRows | None,
    num_items: int,
) -> None:
    """Change each target's item, and all that is recorded with or after it: what comes before must stay as it was.

    The target's time and action stay: they are inputs of a query.

    Args:
        encode: outputs of a batch's tokens, `[T, D]`.
        gather: makes the batch.
        events: of one user.
        side: of the same user, as one row.
        num_items: N.

    Raises:
        Leak: an output before some target's token changed.
    """
    base = gather(events, side)
    before = encode(base)
    places = np.append(np.flatnonzero(base.inputs.main), len(before))
    for target in range(len(events.items)):
        items, actions = np.array(events.items), np.array(events.actions)
        items[target:] = (items[target:] + 1) % num_items
        actions[target + 1 :] = (actions[target + 1 :] + 1) % 3
        changed = side
        if side is not None:
            later = side.timestamps >= events.timestamps[target]
            changed = replace(side, values=np.where(later, 1 - np.minimum(side.values, 1), side.values))
        after = encode(gather(replace(events, items=items, actions=actions), changed))
        known = int(places[target])
        moved = (before[:known] - after[:known]).abs().amax(1) > 1e-5
        if moved.any():
            raise Leak(f"token {int(moved.nonzero()[0])} sees event {target}, which comes after it")
    assert torch.isfinite(before).all()
