"""What changed in a catalogue since its index was built: items added, and items withdrawn.

Added items are few, so they are always scored exactly; withdrawn ones are dropped like items that no filter lets
through. Rows of added items follow those of the index: the a-th has row N + a.

Shape legend: N items of the index, A added items, D embedding width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.index.attributes import Attributes, Eligible

__all__ = ["Changes", "alive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Everything that changed since an index was built. An item whose embedding changed is withdrawn and added.

    Attributes:
        vectors: embeddings of the added items, of unit length, float32 `[A, D]`.
        withdrawn: rows of the index, or of added items, that are no longer answered, int64, in any order.
        attributes: of the added items; None if the catalogue has none.
    """

    vectors: NDArray[np.float32]
    withdrawn: NDArray[np.int64]
    attributes: Attributes | None = None


def alive(withdrawn: NDArray[np.int64], begin: int, end: int) -> Eligible:
    """Rows `begin:end`, counted from `begin`, without the withdrawn ones."""
    mask = np.ones(end - begin, bool)
    mask[withdrawn[(withdrawn >= begin) & (withdrawn < end)] - begin] = False
    return Eligible.of(mask)
