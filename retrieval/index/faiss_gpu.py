"""Faiss's indexes on a GPU, within what they can do there; what they cannot is refused.

A Faiss built for GPUs, and for CAGRA one built with cuVS, is needed. Neither has been run: there was no GPU.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.errors import ConfigError
from retrieval.index.backend import FaissBackend, faiss_reason
from retrieval.types import SearchResult

__all__ = ["FaissGpuBackend", "cagra_degree", "cagra_index"]

# Its stubs are those of a build for CPUs.
_FAISS: Any = faiss
_MOST: Final = 2048
"""Answers per query, and lists looked into, that Faiss allows on a GPU."""
_MOST_EFFORT: Final = 4
"""That a planner asks for at such a depth."""
_CAGRA: Final = re.compile(r"CAGRA([1-9][0-9]{0,2})")


def _resources(what: str) -> Any:
    """What Faiss allocates on a GPU.

    Raises:
        ConfigError: this Faiss has none, or there is no GPU.
    """
    if not hasattr(_FAISS, "StandardGpuResources"):
        raise ConfigError(f"{what} needs a Faiss that is built for GPUs; faiss {faiss.__version__} here is not")
    if not _FAISS.get_num_gpus():
        raise ConfigError(f"{what} needs a GPU, and Faiss finds none")
    return _FAISS.StandardGpuResources()


class FaissGpuBackend:
    """A Faiss index searched on a GPU: see `backend.IndexBackend`.

    Faiss's indexes on GPUs give at most 2048 answers, pass over selectors without a word, and belong to one thread. So
    `max_k` is 2048 and `supports_allowed` false, which keeps planners away; whoever asks all the same gets an error.
    All calls run in one thread of its own.

    Args:
        backend: the index as it was built or opened.
        device: number of the GPU.

    Raises:
        ConfigError: there is no GPU or no Faiss for it, the index does not run there, or its `nprobe` leaves no room
            for deep searches.
    """

    max_k: int | None = _MOST
    true_scores = False
    supports_allowed = False
    exact_from = math.inf

    def __init__(self, backend: FaissBackend, device: int = 0) -> None:
        self.spec, self.vectors = backend.spec, backend.vectors
        self._resources, factory = _resources(f"index {self.spec.factory!r} on a GPU"), self.spec.factory
        self._probes = int(self.spec.search.get("nprobe", 1))
        if self._probes * _MOST_EFFORT > _MOST:
            raise ConfigError(
                f"index {factory!r}: nprobe={self._probes} is more than {_MOST // _MOST_EFFORT}, beyond which deep "
                f"searches would need more than the {_MOST} lists that Faiss allows on a GPU"
            )
        self._owner = ThreadPoolExecutor(1, "faiss-gpu")
        try:
            self._index: Any = self._owner.submit(backend.moved, self._resources, device).result()
        except RuntimeError as error:
            raise ConfigError(f"index {factory!r} does not run on a GPU: {faiss_reason(error)}") from None

    @property
    def count(self) -> int:
        """N."""
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        allowed: NDArray[np.uint8] | None = None,
        effort: float = 1.0,
    ) -> SearchResult:
        """As the protocol says.

        Raises:
            ConfigError: k is more than 2048, or there is a bitmap.
        """
        if allowed is not None:
            raise ConfigError(f"index {self.spec.factory!r} on a GPU cannot be restricted to some items")
        if k > _MOST:
            raise ConfigError(f"index {self.spec.factory!r} on a GPU gives at most {_MOST} answers, not {k}")
        return self._owner.submit(self._search, np.ascontiguousarray(queries, np.float32), k, effort).result()

    def _search(self, queries: NDArray[np.float32], k: int, effort: float) -> SearchResult:
        parameters = None
        if effort != 1.0 and "nprobe" in self.spec.search:
            probes = min(math.ceil(self._probes * effort), self._index.nlist, _MOST)
            parameters = _FAISS.SearchParametersIVF(nprobe=probes)
        scores, rows = self._index.search(queries, k, params=parameters)
        return SearchResult(rows=rows, scores=scores)


def cagra_degree(factory: str) -> int | None:
    """Neighbours per item of an index "CAGRA64"; None of any other."""
    found = _CAGRA.fullmatch(factory)
    return int(found[1]) if found else None


def cagra_index(vectors: NDArray[np.float32], degree: int) -> faiss.Index:
    """A graph that cuVS builds on a GPU, as the CPU searches it (`efSearch`).

    Raises:
        ConfigError: there is no GPU, or this Faiss was built without cuVS.
    """
    what = f"index 'CAGRA{degree}'"
    resources = _resources(what)
    if not hasattr(_FAISS, "GpuIndexCagra"):
        raise ConfigError(f"{what} needs a Faiss that is built with cuVS; faiss {faiss.__version__} here is not")
    config = _FAISS.GpuIndexCagraConfig()
    config.graph_degree, config.intermediate_graph_degree = degree, 2 * degree
    on_gpu = _FAISS.GpuIndexCagra(resources, vectors.shape[1], faiss.METRIC_INNER_PRODUCT, config)
    on_gpu.train(vectors)
    graph = _FAISS.IndexHNSWCagra()
    graph.base_level_only = True
    on_gpu.copyTo(graph)
    return graph
