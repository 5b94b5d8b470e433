"""A snapshot's item embeddings on a GPU, scored there: `index.device_backend.ItemScorer` by `kernels.topk_scores`."""

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.kernels.backend import Backend
from retrieval.kernels.topk_scores import topk_scores
from retrieval.types import SearchResult

__all__ = ["DeviceItems"]


class DeviceItems:
    """See `index.device_backend.ItemScorer`.

    Args:
        vectors: float32 `[N, D]`; copied to the device.
        device: where to.
        backend: of the kernel.
    """

    def __init__(self, vectors: NDArray[np.float32], device: torch.device | str, backend: Backend = "auto") -> None:
        self._items, self._backend = torch.from_numpy(np.array(vectors, np.float32)).to(device), backend

    @torch.inference_mode()
    def best(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint8] | None) -> SearchResult:
        """As the protocol says."""
        asked = torch.from_numpy(queries).to(self._items.device)
        bitmap = None if allowed is None else torch.from_numpy(np.array(allowed)).to(self._items.device)
        scores, rows = topk_scores(asked, self._items, k, bitmap, backend=self._backend)
        return SearchResult(rows=rows.cpu().numpy(), scores=scores.cpu().numpy())
