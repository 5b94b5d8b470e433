"""What a GPU's indexes cannot do is refused; a stand-in for Faiss's GPU part tells which thread calls it."""

import threading
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest

from retrieval.errors import ConfigError
from retrieval.index import faiss_gpu
from retrieval.index.backend import FaissBackend
from retrieval.index.builder import build_index
from retrieval.index.faiss_gpu import FaissGpuBackend
from retrieval.index.planner import Costs, Planner
from retrieval.index.spec import IndexSpec
from retrieval.types import Plan

VECTORS = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)

pytestmark = pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this Faiss has a GPU part of its own")


class Moved(FaissBackend):
    """An index whose copy on a GPU is itself, and remembers who asks it."""

    def moved(self, resources: Any, device: int) -> Any:
        if self.spec.factory.startswith("HNSW"):
            raise RuntimeError("Error in virtual foo at /x/GpuCloner.cpp:1: This index type is not implemented on GPU.")
        self.threads = {threading.current_thread().name}

        def search(queries: Any, k: int, params: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            return self._index.search(queries, k, params=params)

        return SimpleNamespace(search=search, nlist=8)


def moved(factory: str, **search: float) -> Moved:
    built = build_index(VECTORS, IndexSpec(factory=factory))
    assert isinstance(built, FaissBackend)
    return Moved(built._index, VECTORS, IndexSpec(factory=factory, search=search))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"StandardGpuResources": object, "get_num_gpus": lambda: 1}
    monkeypatch.setattr(faiss_gpu, "_FAISS", SimpleNamespace(**vars(faiss) | more))


def test_without_a_gpu_each_index_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'IVF8,Flat' on a GPU needs a Faiss that is built for GPUs"):
        FaissGpuBackend(moved("IVF8,Flat"))
    with pytest.raises(ConfigError, match=r"'CAGRA64' needs a Faiss that is built for GPUs; faiss .* here is not"):
        build_index(VECTORS, IndexSpec(factory="CAGRA64"))
    one = {"StandardGpuResources": object, "get_num_gpus": lambda: 0}
    monkeypatch.setattr(faiss_gpu, "_FAISS", SimpleNamespace(**one))
    with pytest.raises(ConfigError, match="'CAGRA64' needs a GPU, and Faiss finds none"):
        build_index(VECTORS, IndexSpec(factory="CAGRA64"))


@pytest.mark.usefixtures("gpu")
def test_limits_of_faiss_on_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="'CAGRA64' needs a Faiss that is built with cuVS"):
        build_index(VECTORS, IndexSpec(factory="CAGRA64"))
    with pytest.raises(ConfigError, match="'HNSW8' does not run on a GPU: This index type is not implemented"):
        FaissGpuBackend(moved("HNSW8"))
    with pytest.raises(ConfigError, match="nprobe=600 is more than 512"):
        FaissGpuBackend(moved("IVF8,Flat", nprobe=600))
    index = FaissGpuBackend(moved("IVF8,Flat", nprobe=2))
    with pytest.raises(ConfigError, match="at most 2048 answers, not 2049"):
        index.search(VECTORS[:1], 2049)
    with pytest.raises(ConfigError, match="cannot be restricted"):
        index.search(VECTORS[:1], 5, allowed=np.full(375, 255, np.uint8))


@pytest.mark.usefixtures("gpu")
def test_one_thread_owns_the_index_whoever_asks() -> None:
    backend = moved("IVF8,Flat", nprobe=2)
    index = FaissGpuBackend(backend)
    answers: list[Any] = []
    askers = [threading.Thread(target=lambda: answers.append(index.search(VECTORS[:4], 5))) for _ in range(3)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    expected = backend.search(VECTORS[:4], 5)
    assert all(np.array_equal(one.rows, expected.rows) for one in answers)
    assert len(backend.threads) == 1
    assert backend.threads != {threading.current_thread().name}
    deeper = index.search(VECTORS[:4], 5, effort=3.0)
    np.testing.assert_array_equal(deeper.rows, backend.search(VECTORS[:4], 5, effort=3.0).rows)


@pytest.mark.usefixtures("gpu")
def test_a_filtered_search_never_goes_to_the_gpu_as_a_selector() -> None:
    planner = Planner(
        FaissGpuBackend(moved("IVF8,Flat", nprobe=2)),
        Costs(search=1e-9, candidate=0, restricted=1e-12, gather=1, score=1),
    )
    assert planner.first(128, 2900).plan is Plan.INDEX
    assert planner.first(128, 100).plan is Plan.SCAN
    assert planner.first(2048, 2000).plan is Plan.SCAN, "more than 2048 would have to be fetched"
