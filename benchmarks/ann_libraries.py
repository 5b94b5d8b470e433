"""The indexes that `benchmarks.ann` compares: how each is built, kept, opened, and searched at rising effort.

Legend: N items, D width, B queries, K answers per query.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.backend import Index
from retrieval.index.builder import build_index, open_index
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec

__all__ = ["LIBRARIES", "K", "Library", "Setting", "kept_bytes", "opened"]

K = 100
# Of this process before anything of ours runs.
_FAISS_THRESHOLD = faiss.cvar.distance_compute_blas_threshold
_PROBES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_EFFORTS = (100, 150, 200, 300, 400, 600, 800, 1600)
_HNSW_STEP = 50_000
"""Items that are added between two chances to stop."""

Vectors = NDArray[np.float32]
Search = Callable[[Vectors], NDArray[np.int64]]


@dataclass(frozen=True)
class Setting:
    """One index at one setting.

    Attributes:
        library: `ours`, `ours, Searcher` or a rival's name.
        parameters: as shown.
        search: rows of the best K `[B, K]`, −1 where it found fewer.
    """

    library: str
    parameters: str
    search: Search


@dataclass(frozen=True)
class Library:
    """One way to make an index.

    Attributes:
        name: of the column `library`.
        module: what must be installed.
        index: what is built over so many items of such a width, as the column `index` says it.
        build: of the items and threads.
        save, load: to and from a file; None where the library cannot.
        settings: by rising effort, of the index, its name and threads.
        size: bytes of the index, where the library tells them.
    """

    name: str
    module: str
    index: Callable[[int, int], str]
    build: Callable[[Vectors, str, int], Any]
    settings: Callable[[Any, str, int], Iterator[Setting]]
    size: Callable[[Any], int | None]
    save: Callable[[Any, Path], object] | None = None
    load: Callable[[Path, str, Vectors], Any] | None = None


def opened(library: Library, items: Vectors, threads: int, kept: Path | None) -> tuple[Any, float]:
    """An index and the seconds that it took to build; kept in a folder, if there is one, and then built once."""
    name = library.index(*items.shape)
    file = _file(library, name, kept)
    if file is not None and library.load is not None and (about := file.with_name(file.name + ".json")).exists():
        return library.load(file, name, items), float(json.loads(about.read_text())["seconds"])
    begun = time.perf_counter()
    index = library.build(items, name, threads)
    seconds = time.perf_counter() - begun
    if file is not None and library.save is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        library.save(index, file)
        file.with_name(file.name + ".json").write_text(json.dumps({"seconds": seconds, "threads": threads}))
    return index, seconds


def _file(library: Library, index: str, kept: Path | None) -> Path | None:
    return None if kept is None or library.save is None else kept / f"{library.name}-{index}".replace(" ", "-")


def kept_bytes(library: Library, index: str, kept: Path | None) -> int | None:
    """Bytes of what is kept of an index."""
    file = _file(library, index, kept)
    if file is None:
        return None
    return sum(one.stat().st_size for one in [file, *file.rglob("*")] if one.is_file())


def _lists(count: int) -> int:
    return min(int(2 ** np.round(np.log2(4 * np.sqrt(count)))), count // 39)


def _our_settings(index: Index, name: str, threads: int) -> Iterator[Setting]:
    """The backend, and `Searcher` over it: ours come in pairs."""
    for search in _our_searches(name):
        backend = index.tuned(search)
        searcher = Searcher(backend, np.arange(backend.count))
        shown = " ".join(f"{name}={value:g}" for name, value in search.items())
        yield Setting("ours, Searcher", shown, lambda asked, to=searcher: to.search(asked, [K] * len(asked)).rows)  # type: ignore[misc]
        yield Setting("ours", shown, lambda asked, to=backend: to.search(asked, K).rows)  # type: ignore[misc]


def _our_searches(name: str) -> list[dict[str, float]]:
    if name == "Flat":
        return [{}]
    if name.startswith("HNSW"):
        return [{"efSearch": float(n)} for n in _EFFORTS]
    refining = {"k_factor_rf": 4.0} if "Refine" in name else {}
    return [{"nprobe": float(n)} | refining for n in _PROBES if n <= int(name[3:].split(",")[0])]


def _ours(index: Callable[[int, int], str]) -> Library:
    def load(path: Path, name: str, items: Vectors) -> Index:
        return open_index(path, IndexSpec(factory=name), items)

    return Library(
        name="ours",
        module="retrieval",
        index=index,
        build=lambda items, name, threads: build_index(items, IndexSpec(factory=name)),
        settings=_our_settings,
        size=lambda built: built.size,
        # Opening "Flat" takes as long as building it, and its file holds the vectors.
        save=None if index(100, 1) == "Flat" else lambda built, path: built.save(path),
        load=load,
    )


def _faiss_build(items: Vectors, name: str, threads: int) -> Any:
    index = faiss.index_factory(items.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    # Faiss samples as many itself; of a memory-mapped array it would copy all to do so.
    rows = np.arange(len(items))
    if isinstance(index, faiss.IndexIVF) and len(items) > 256 * index.nlist:
        rows = np.sort(np.random.default_rng(0).choice(len(items), 256 * index.nlist, replace=False))
    if not index.is_trained:
        index.train(np.ascontiguousarray(items[rows]))
    for start in range(0, len(items), 1 << 20):
        index.add(np.ascontiguousarray(items[start : start + (1 << 20)]))
    return index


def _faiss_settings(index: Any, name: str, threads: int) -> Iterator[Setting]:
    # Ours change it for the whole process.
    ours = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _FAISS_THRESHOLD
    for probes in _PROBES if name.startswith("IVF") else (0,):
        if probes:
            index.nprobe = probes
        yield Setting("faiss", f"nprobe={probes}" if probes else "", lambda asked: index.search(asked, K)[1])
    faiss.cvar.distance_compute_blas_threshold = ours


def _faiss(index: Callable[[int, int], str]) -> Library:
    return Library(
        name="faiss",
        module="faiss",
        index=index,
        build=_faiss_build,
        settings=_faiss_settings,
        size=lambda built: int(built.ntotal * (4 * built.d + (8 if isinstance(built, faiss.IndexIVF) else 0))),
        save=lambda built, path: faiss.write_index(built, str(path)),
        load=lambda path, name, items: faiss.read_index(str(path)),
    )


def _hnswlib_build(items: Vectors, name: str, threads: int) -> Any:
    import hnswlib

    index: Any = hnswlib.Index("ip", items.shape[1])
    index.init_index(len(items), M=32, ef_construction=200)
    index.set_num_threads(threads)
    for start in range(0, len(items), _HNSW_STEP):
        index.add_items(items[start : start + _HNSW_STEP])
    return index


def _hnswlib_load(path: Path, name: str, items: Vectors) -> Any:
    import hnswlib

    index: Any = hnswlib.Index("ip", items.shape[1])
    index.load_index(str(path), len(items))
    return index


def _hnswlib_settings(index: Any, name: str, threads: int) -> Iterator[Setting]:
    index.set_num_threads(threads)
    for effort in _EFFORTS:
        index.set_ef(effort)
        yield Setting("hnswlib", f"ef={effort}", lambda asked: index.knn_query(asked, K)[0].astype(np.int64))


def _usearch_empty(width: int) -> Any:
    from usearch.index import Index

    return Index(ndim=width, metric="ip", dtype="f32", connectivity=32, expansion_add=200)


def _usearch_build(items: Vectors, name: str, threads: int) -> Any:
    index = _usearch_empty(items.shape[1])
    index.add(np.arange(len(items)), items, threads=threads)
    return index


def _usearch_load(path: Path, name: str, items: Vectors) -> Any:
    index = _usearch_empty(items.shape[1])
    index.load(str(path))
    return index


def _usearch_settings(index: Any, name: str, threads: int) -> Iterator[Setting]:
    def search(asked: Vectors) -> NDArray[np.int64]:
        rows: NDArray[np.int64] = index.search(asked, K, threads=threads).keys.astype(np.int64).reshape(len(asked), K)
        return rows

    for effort in _EFFORTS:
        index.expansion_search = effort
        yield Setting("usearch", f"expansion={effort}", search)


def _leaves(count: int) -> int:
    return min(max(int(np.sqrt(count) * 1.25), 10), max(count // 50, 1))


def _scann_build(items: Vectors, name: str, threads: int) -> Any:
    import scann

    leaves = _leaves(len(items))
    builder: Any = scann.scann_ops_pybind.builder(items, K, "dot_product").set_n_training_threads(threads)
    builder = builder.tree(leaves, leaves, training_sample_size=min(len(items), 250_000))
    return builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(K).build()


def _scann_save(index: Any, path: Path) -> None:
    path.mkdir()
    index.serialize(str(path))


def _scann_load(path: Path, name: str, items: Vectors) -> Any:
    import scann

    return scann.scann_ops_pybind.load_searcher(str(path))


def _scann_settings(index: Any, name: str, threads: int) -> Iterator[Setting]:
    index.set_num_threads(threads)
    leaves = int(name.split()[1].rstrip(","))
    for reorder in (3, 5, 10, 20):
        for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8):
            effort = {"leaves_to_search": max(1, round(share * leaves)), "pre_reorder_num_neighbors": reorder * K}

            def search(asked: Vectors, effort: dict[str, int] = effort) -> NDArray[np.int64]:
                if len(asked) == 1 or threads == 1:
                    rows, scores = index.search_batched(asked, **effort)
                else:
                    size = -(-len(asked) // threads)
                    rows, scores = index.search_batched_parallel(asked, **effort, batch_size=size)
                return np.where(np.isfinite(scores), rows.astype(np.int64), -1)

            yield Setting("ScaNN", " ".join(f"{name}={value}" for name, value in effort.items()), search)


def _svs_build(items: Vectors, name: str, threads: int) -> Any:
    import svs

    parameters: Any = svs.VamanaBuildParameters(alpha=0.95, graph_max_degree=64, window_size=128)
    return svs.Vamana.build(parameters, items, svs.DistanceType.MIP, num_threads=threads)


def _svs_save(index: Any, path: Path) -> None:
    path.mkdir()
    index.save(*(str(path / part) for part in ("config", "graph", "data")))


def _svs_load(path: Path, name: str, items: Vectors) -> Any:
    import svs

    loaders: Any = svs.GraphLoader(str(path / "graph")), svs.VectorDataLoader(str(path / "data"), svs.DataType.float32)
    return svs.Vamana(str(path / "config"), *loaders, svs.DistanceType.MIP)


def _svs_settings(index: Any, name: str, threads: int) -> Iterator[Setting]:
    index.num_threads = threads
    for window in (100, 150, 200, 300, 400, 600):
        index.search_window_size = window
        yield Setting("svs", f"window={window}", lambda asked: index.search(asked, K)[0].astype(np.int64))


_GRAPH = "HNSW M=32"
LIBRARIES: dict[str, list[Library]] = {
    "ours": [
        _ours(lambda count, width: "Flat"),
        _ours(lambda count, width: f"IVF{max(1, _lists(count) // 2)},Int8"),
        _ours(lambda count, width: f"IVF{_lists(count)},PQ{width // 2}x4fsr,Refine(SQfp16)"),
        _ours(lambda count, width: "HNSW32"),
    ],
    "faiss": [_faiss(lambda count, width: "Flat"), _faiss(lambda count, width: f"IVF{min(_lists(count), 8192)},Flat")],
    "hnswlib": [
        Library(
            name="hnswlib",
            module="hnswlib",
            index=lambda count, width: _GRAPH,
            build=_hnswlib_build,
            settings=_hnswlib_settings,
            size=lambda built: built.index_file_size(),
            save=lambda built, path: built.save_index(str(path)),
            load=_hnswlib_load,
        )
    ],
    "usearch": [
        Library(
            name="usearch",
            module="usearch",
            index=lambda count, width: _GRAPH,
            build=_usearch_build,
            settings=_usearch_settings,
            size=lambda built: built.serialized_length,
            save=lambda built, path: built.save(str(path)),
            load=_usearch_load,
        )
    ],
    "scann": [
        Library(
            name="ScaNN",
            module="scann",
            index=lambda count, width: f"tree {_leaves(count)}, AH 2",
            build=_scann_build,
            settings=_scann_settings,
            size=lambda built: None,
            save=_scann_save,
            load=_scann_load,
        )
    ],
    "svs": [
        Library(
            name="svs",
            module="svs",
            index=lambda count, width: "Vamana 64",
            build=_svs_build,
            settings=_svs_settings,
            size=lambda built: None,
            save=_svs_save,
            load=_svs_load,
        )
    ],
}
